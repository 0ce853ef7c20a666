"""Generative Photomontage (arXiv 2408.07116): strokes on an image stack, a graph cut in the space of self-attention
keys, and one image sampled with self-attention composed from all of them."""

import logging
import zlib
from typing import Any

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import graphcut, labels
from ..kernels.strokes import draw, parse_document
from ..methods.photomontage import CompositeAttention
from ..patching.install import install
from ..patching.models import parse_sites
from ..patching.schedule import Window
from ..patching.streams import Stream, check_together, streams_of
from . import previews
from .inputs import exact_input, fraction, image_of, mask_for_run, mask_of, refuse_nan, start_latent

Tensor = torch.Tensor

STACK = 32  # inputs of a stack; each may be a batch
HALVES = ("positive", "negative")  # of CFG
UNMARKED_AUTO, UNMARKED_AS_SET = "auto", "as unmarked_is_base"  # what decides about unpainted areas
COLOURS = [
    "#{:02x}{:02x}{:02x}".format(*tuple(colour)) for colour in (labels.palette(2 * STACK) * 255).round().int().tolist()
]  # for the stroke editor


def stack_input(kind: Any, name: str, tooltip: str) -> io.Autogrow.Input:
    return io.Autogrow.Input(
        name + "s",
        template=io.Autogrow.TemplatePrefix(kind.Input(name), prefix=name, min=1, max=STACK),
        tooltip=tooltip,
    )


class GraphCutMontage(io.ComfyNode):
    NAME = "Graph Cut Montage"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GraphCutMontage",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Decides which image each pixel comes from: paint on each recorded image what to keep, and a graph "
                "cut places the seams where they are least visible (Generative Photomontage)."
            ),
            is_output_node=True,  # its own run button: cut again without sampling again
            has_intermediate_output=True,  # a cached run still shows its pictures, after a reload for one
            search_aliases=[
                "generative photomontage",
                "graph cut",
                "graphcut",
                "seam",
                "brush strokes",
                "paint mask",
                "combine images",
                "merge images",
                "inpaint",
            ],
            inputs=[
                stack_input(
                    io.Latent,
                    "latent",
                    (
                        "Recorded latents (from a sampler behind Feature Recorder, or Invert Image). A batch counts as "
                        "several images."
                    ),
                ),
                stack_input(io.Image, "image", "The same images, decoded, in the same order."),
                io.Int.Input(
                    "base",
                    default=0,
                    min=0,
                    max=999,
                    tooltip=(
                        "The base image, counted from 0: the composite uses its prompt, its noise and its composition."
                    ),
                ),
                io.String.Input(
                    "strokes",
                    default="",
                    socketless=True,
                    optional=True,
                    extra_dict={"widgetType": "MONTAGE_STROKES", "colours": COLOURS},
                    tooltip=(
                        "What to keep, painted in the node. As text: "
                        '{"v":1,"base":0,"strokes":[{"k":image,"r":radius,"p":[x,y,...]}]}, all lengths in 1/10000 '
                        "of the picture."
                    ),
                ),
                io.Mask.Input(
                    "stroke_masks",
                    optional=True,
                    tooltip="What to keep, as masks: one per image, in the same order and size as the images.",
                ),
                io.Image.Input(
                    "stroke_picture",
                    optional=True,
                    tooltip=(
                        "What to keep, as one picture in the colours of the labels output. Everything else counts "
                        "as unpainted: black, white, and colours far from those."
                    ),
                ),
                io.Boolean.Input(
                    "unmarked_is_base",
                    default=False,
                    tooltip=(
                        "Unpainted areas always come from the base image. Off, they follow the strokes around them,"
                        " unless `unmarked` decides otherwise."
                    ),
                ),
                io.Float.Input(
                    "lam",
                    display_name="lambda",
                    default=100.0,
                    min=0.0,
                    max=1000.0,
                    step=1.0,
                    advanced=True,
                    tooltip="How strongly seams avoid smooth areas; higher follows edges more (paper: 100).",
                ),
                io.Float.Input(
                    "sigma",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip=(
                        "Edge sensitivity: the feature distance treated as an edge. 0 measures it (the median "
                        "distance between neighbouring tokens), right for every model (paper: 10, for SD1.5)."
                    ),
                ),
                io.Int.Input(
                    "components",
                    default=10,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Number of principal components of the attention keys (paper: 10).",
                ),
                io.Combo.Input(
                    "solver",
                    options=["auto", "scipy", "gco"],
                    default="auto",
                    advanced=True,
                    tooltip=(
                        "Both find a cut of the same cost. gco is faster and needs the package gco-wrapper, whose "
                        "core is for research use only; auto uses it when it is installed."
                    ),
                ),
                io.Combo.Input(
                    "unmarked",
                    options=[UNMARKED_AUTO, UNMARKED_AS_SET],
                    default=UNMARKED_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "auto: unpainted areas come from the base image when the base has no strokes of its own. as"
                        " unmarked_is_base: that switch alone decides, as in older workflows."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "masks", tooltip="One mask per image, in the same order. Together they cover every pixel once."
                ),
                io.Image.Output("labels", tooltip="Which image each pixel comes from, each image in its colour."),
                io.Image.Output(
                    "paste", tooltip="The images' pixels pasted together along the seams: a preview of the composite."
                ),
                io.Int.Output("base", tooltip="The base image, for cut_base of Composite Attention Inject."),
            ],
        )

    @classmethod
    def execute(
        cls,
        latents: dict[str, dict],
        images: dict[str, Tensor],
        base: int,
        lam: float,
        sigma: float,
        components: int,
        solver: str,
        unmarked_is_base: bool,
        strokes: str = "",
        stroke_masks: Tensor | None = None,
        stroke_picture: Tensor | None = None,
        unmarked: str = UNMARKED_AS_SET,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, lam=lam, sigma=sigma)
        stack = streams_of(cls.NAME, latents.values())
        check_together(cls.NAME, stack)
        pictures = cls.pictures(images, stack)
        count = len(stack)
        check_base(cls.NAME, base, count)
        marks = cls.marks(pictures, base, strokes, stroke_masks, stroke_picture)

        keys = [keys_of(stream) for stream in stack]
        grid = cls.grid(stack)
        distances = [graphcut.image_distances(one, grid, components) for one in keys]
        sigma = sigma or graphcut.median_distance(distances) or 1.0
        edges = graphcut.edge_weights(distances, lam, sigma)
        cells = labels.pool(marks, grid).numpy()
        painted = bool((cells >= 0).any())
        if painted:
            from_base = unmarked_is_base or (unmarked == UNMARKED_AUTO and not (cells == base).any())
            costs = graphcut.stroke_costs(cells, count, base if from_base else None, edges)
            owner = torch.from_numpy(graphcut.cut(costs, edges, solver))
        else:
            logging.info("%s: nothing is painted, so everything is kept from the base image.", cls.NAME)
            owner = torch.full(grid, base)

        owner = labels.at_grid(owner, pictures.shape[1:3])
        masks = labels.to_masks(owner, count)
        paste = labels.paste(pictures, owner)
        regions = labels.picture(owner, count)
        shown = {  # in private keys: "images" would make ComfyUI add a gallery of its own
            "montage_images": [previews.photograph(picture) for picture in pictures],
            "montage_regions": [previews.diagram(regions)],
            "montage_size": [pictures.shape[2], pictures.shape[1]],
            "montage_base": [base],
            "montage_strokes": [zlib.crc32(strokes.encode())],  # which strokes this run and its result are of
        }
        if stroke_masks is None and stroke_picture is None:  # the editor knows all strokes, and can cut again itself
            shown["montage_cut"] = [cls.live_cut(edges, grid)]
        return io.NodeOutput(masks, regions[None], paste[None], base, ui=shown)

    @classmethod
    def grid(cls, stack: list[Stream]) -> tuple[int, int]:
        """(h, w) of the tokens whose keys are cut by, which must be of one kind of model."""
        first, grid = stack[0].run, stack[0].run.keys_grid
        assert grid is not None  # taken down with the keys
        for number, (run, _) in enumerate(stack):
            if run.keys_grid != grid or run.weights.family != first.weights.family:
                raise ValueError(
                    f"{cls.NAME}: image 0 was recorded with {first.weights} and image {number} with {run.weights}:"
                    " their attention cannot be compared. Use one model for all."
                )
        return grid

    @staticmethod
    def live_cut(edges: tuple[np.ndarray, np.ndarray], grid: tuple[int, int]) -> dict:
        """What the editor needs to repeat the cut: the grid, the weights' file (right, then down, as little-endian
        uint32, exactly those that were cut with) and what an unpainted cell pays for leaving the base.
        """
        weights = np.concatenate([w.ravel() for w in edges]).astype("<u4")
        return {
            "grid": list(grid),
            "weights": previews.numbers(weights.tobytes()),
            "preference": graphcut.preference(edges, max(grid)),
        }

    @classmethod
    def pictures(cls, images: dict[str, torch.Tensor], stack: list[Stream]) -> torch.Tensor:
        """The images as one batch [N, H, W, 3], checked against the stack."""
        batches = [image_of(cls.NAME, name, batch) for name, batch in images.items()]
        sizes = {tuple(batch.shape[1:3]) for batch in batches}
        if len(sizes) > 1:
            raise ValueError(
                f"{cls.NAME}: the images have different sizes ({', '.join(f'{w}x{h}' for h, w in sorted(sizes))})."
                " Connect the decoded latents, all of one size."
            )
        pictures = torch.cat([batch[..., :3] for batch in batches])
        if len(pictures) != len(stack):
            raise ValueError(
                f"{cls.NAME}: {len(stack)} latents and {len(pictures)} images. Connect one image for each latent, in"
                " the same order."
            )
        (height, width), (h, w) = pictures.shape[1:3], stack[0].run.size
        if height * w != width * h:
            raise ValueError(
                f"{cls.NAME}: the images are {width}x{height} pixels and the latents {w}x{h}, another aspect ratio."
                " Connect the decoded latents."
            )
        return pictures

    @classmethod
    def marks(
        cls,
        pictures: torch.Tensor,
        base: int,
        strokes: str,
        stroke_masks: torch.Tensor | None,
        stroke_picture: torch.Tensor | None,
    ) -> torch.Tensor:
        """All strokes [N, H, W] in [0, 1], from the three ways to give them."""
        count, height, width = pictures.shape[:3]
        try:
            painted_base, drawn = parse_document(strokes, count)
        except ValueError as error:
            alone = " The latents of a list (Rebatch Latents) come one by one: connect a batch." if count == 1 else ""
            raise ValueError(f"{cls.NAME}: {error}.{alone}") from None
        if painted_base not in (None, base):
            raise ValueError(
                f"{cls.NAME}: base is {base}, but the strokes were painted for base {painted_base}. Press *Base* on"
                f" that image in the editor, or set base to {painted_base}."
            )
        marks = draw(drawn, count, height, width)
        if stroke_masks is not None:
            stroke_masks = mask_of(cls.NAME, "stroke_masks", stroke_masks)
            if stroke_masks.shape != marks.shape:
                raise ValueError(
                    f"{cls.NAME}: stroke_masks are {len(stroke_masks)} of"
                    f" {stroke_masks.shape[-1]}x{stroke_masks.shape[-2]}, and there are {count} images of"
                    f" {width}x{height}. Give one mask of that size for each image (an empty one where you keep"
                    " nothing)."
                )
            marks = torch.maximum(marks, stroke_masks)
        if stroke_picture is not None:
            stroke_picture = image_of(cls.NAME, "stroke_picture", stroke_picture)
            if stroke_picture.shape[1:3] != marks.shape[1:]:
                raise ValueError(
                    f"{cls.NAME}: stroke_picture is {stroke_picture.shape[2]}x{stroke_picture.shape[1]} and the images"
                    f" are {width}x{height}. Use a picture of that size."
                )
            marks = torch.maximum(marks, labels.from_picture(stroke_picture[0], count))
        twice = (marks > 0.5).sum(0) > 1
        if twice.any():
            y, x = twice.nonzero()[0].tolist()
            both = (marks[:, y, x] > 0.5).nonzero().flatten().tolist()
            raise ValueError(
                f"{cls.NAME}: {int(twice.sum())} pixels are painted for several images at once, the first at ({x}, {y})"
                f" for images {' and '.join(map(str, both))}. A pixel can be kept from one image only: erase one of the"
                " strokes there."
            )
        return marks


def keys_of(stream: Stream) -> list[torch.Tensor]:
    """K of the first self-attention at the end of the run, [tokens, channels] for each CFG half: of the positive and
    the negative conditioning, or of others where a guider has none of that name.
    """
    halves = sorted((half for half in stream.run.keys if half.number == 0), key=lambda half: half.role not in HALVES)
    keys = [stream.run.keys[half][stream.row] for half in halves]
    if not keys:
        raise ValueError(
            f"{GraphCutMontage.NAME}: the recording holds no attention keys: another node ran the first attention block"
            " in its own way. Disconnect it from the recorded MODEL."
        )
    return keys[:2]


def check_base(node: str, base: int, count: int) -> None:
    if not 0 <= base < count:
        raise ValueError(f"{node}: base is image {base}, and there are {count} images (0 to {count - 1}).")


class CompositeAttentionInject(io.ComfyNode):
    NAME = CompositeAttention.node

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CompositeAttentionInject",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Samples one seamless image from several recorded ones, by composing their self-attention region "
                "by region (Generative Photomontage). Sample its MODEL and LATENT with the base image's prompt, "
                "ControlNet and sampler settings."
            ),
            search_aliases=[
                "generative photomontage",
                "combine images",
                "merge images",
                "blend images",
                "seamless composite",
                "flux photomontage",
                "qwen-image photomontage",
                "z-image photomontage",
                "attention composite",
                "inpaint",
                "seam",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the images were recorded with."),
                stack_input(io.Latent, "latent", "The recorded latents, in the same order as for Graph Cut Montage."),
                io.Mask.Input(
                    "masks",
                    tooltip=(
                        "One mask per image, from Graph Cut Montage or your own. Where masks overlap the larger "
                        "value wins; uncovered pixels come from the base."
                    ),
                ),
                io.Int.Input(
                    "base",
                    default=0,
                    min=0,
                    max=999,
                    tooltip=(
                        "The base image, counted from 0: the composite starts from its noise. Give the sampler its"
                        " prompt and ControlNet. Only for masks of your own: with cut_base connected, leave it at 0."
                    ),
                ),
                fraction(
                    "start",
                    default=0.0,
                    advanced=True,
                    tooltip="Start, as a fraction of the schedule: 0 is the first step.",
                ),
                fraction(
                    "end",
                    default=1.0,
                    advanced=True,
                    tooltip=(
                        "End, as a fraction of the schedule: 1 is after the last step. 0.8 leaves the last fifth "
                        "to the model alone."
                    ),
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    advanced=True,
                    tooltip=(
                        "Self-attention blocks to compose: all (paper), encoder, middle, decoder, or a list such "
                        "as d0-3,m0,u2-5. On a transformer: all, first half, last half, middle half, or a list such "
                        "as double0-18,single0-37."
                    ),
                ),
                io.Combo.Input(
                    "base_q",
                    options=["model", "stored"],
                    default="model",
                    advanced=True,
                    tooltip=(
                        "Queries in the base's region: from the running composite (paper), which lets it adapt at "
                        "the seams, or from the recorded base."
                    ),
                ),
                io.Combo.Input(
                    "kv",
                    options=["composite", "concat", "model"],
                    default="composite",
                    advanced=True,
                    tooltip=(
                        "Keys and values: composite (paper); or, as in the paper's ablations, concat (those of all "
                        "images together) or model (the running model's own)."
                    ),
                ),
                io.Int.Input(
                    "cut_base",
                    default=0,
                    min=0,
                    max=999,
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "The base output of Graph Cut Montage: the composite then follows the base chosen there, and"
                        " the number above is ignored."
                    ),
                ),
                exact_input(),
            ],
            outputs=[
                io.Model.Output(
                    "composing_model",
                    display_name="MODEL",
                    tooltip="The composing model. Sample it with the settings of the recording.",
                ),
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip=(
                        "The start latent of the base image. Any seed will do, since the noise is the base's; with an "
                        "ancestral or SDE sampler, the base's own."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        latents: dict[str, dict],
        masks: Tensor,
        base: int,
        start: float,
        end: float,
        sites: str,
        base_q: str,
        kv: str,
        cut_base: int | None = None,
        exact: bool = False,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, start=start, end=end)
        base = cls.base(base, cut_base)
        stack = streams_of(cls.NAME, latents.values())
        check_together(cls.NAME, stack, model)
        check_base(cls.NAME, base, len(stack))
        masks = mask_for_run(cls.NAME, "masks", masks, stack[0].run)
        if len(masks) != len(stack):
            raise ValueError(
                f"{cls.NAME}: {len(masks)} masks for {len(stack)} images. Give one mask for each image, in their order."
            )
        window = Window(start, end, parse_sites(cls.NAME, model, sites))
        recipe = CompositeAttention(window, stack, labels.from_masks(masks, base), base, base_q, kv, exact)
        return io.NodeOutput(install(model, recipe), start_latent([stack[base]]))

    @classmethod
    def base(cls, base: int, cut_base: int | None) -> int:
        """The cut's base where it is connected. Raises ValueError where the own number was set to another image."""
        if cut_base is None:
            return base
        if base not in (0, cut_base):
            raise ValueError(
                f"{cls.NAME}: its own base is image {base}, but Graph Cut Montage has base {cut_base}. Set base"
                f" of {cls.NAME} to 0 (cut_base decides), or disconnect cut_base."
            )
        return cut_base


NODES = [GraphCutMontage, CompositeAttentionInject]
