"""Collage Diffusion (arXiv 2303.00262): layers on a canvas, each with its words, harmonised into one image."""

import logging
import re
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..kernels import collage as kernel
from ..kernels.noise_map import noise_map
from ..kernels.token_bias import GROWTH
from ..methods.collage import Collage, CollageBias, Layer, owned_tokens, placed
from ..patching import bias, refusals, run_masks
from ..patching.install import install
from ..patching.models import parse_sites
from ..patching.schedule import Window
from ..patching.tokens import offset_of_words
from . import previews
from .inputs import connected, encoded, fraction, image_of, mask_for, refuse_nan

CATEGORY = "montage/collage"
Tensor = torch.Tensor
MASK_AUTO, MASK_SHAPE, MASK_TRANSPARENCY = "auto", "shape", "transparency"  # what a layer's mask is
LAYERS, COLLAGE = io.Custom("MONTAGE_LAYERS"), io.Custom("MONTAGE_COLLAGE")


class CollageLayer(io.ComfyNode):
    NAME = "Collage Layer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CollageLayer",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "One layer of a collage: a cut-out with its prompt words, its place, and its denoise (Collage "
                "Diffusion). Chain layers from back to front and end with Collage Canvas."
            ),
            search_aliases=["collage diffusion", "cutout", "place image", "layer", "paste image", "regional prompt"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip=(
                        "The layer's image. Its alpha channel cuts it out, if there is one; Load Image gives that as "
                        "MASK: connect both."
                    ),
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    default="",
                    tooltip=(
                        "The prompt words of this layer, exactly as they occur in Collage Canvas's prompt: a red "
                        "ball. Empty: this layer has no words to bind."
                    ),
                ),
                io.Float.Input(
                    "x",
                    default=0.5,
                    min=-2.0,
                    max=3.0,
                    step=0.001,
                    round=False,
                    tooltip="Horizontal centre: 0 is the canvas's left edge, 1 the right edge.",
                ),
                io.Float.Input(
                    "y",
                    default=0.5,
                    min=-2.0,
                    max=3.0,
                    step=0.001,
                    round=False,
                    tooltip="Vertical centre: 0 is the canvas's top edge, 1 the bottom edge.",
                ),
                io.Float.Input(
                    "scale",
                    default=0.5,
                    min=0.001,
                    max=10.0,
                    step=0.001,
                    round=False,
                    tooltip="Size: 1 fits the layer into the canvas.",
                ),
                io.Float.Input(
                    "rotation",
                    default=0.0,
                    min=-360.0,
                    max=360.0,
                    step=0.1,
                    round=False,
                    tooltip="Rotation in degrees, clockwise.",
                ),
                io.Int.Input(
                    "depth",
                    default=0,
                    min=-999,
                    max=999,
                    tooltip="Higher layers cover lower ones. Layers of equal depth lie in the order of the chain.",
                ),
                io.Float.Input(
                    "w_pos",
                    display_name="attract",
                    default=0.4,
                    min=0.0,
                    max=5.0,
                    step=0.01,
                    tooltip=(
                        "Attract: strengthens this layer's prompt words inside its visible area. Paper: 0.2 to "
                        "0.6, more for small layers; 0 is off."
                    ),
                ),
                io.Float.Input(
                    "w_neg",
                    display_name="repel",
                    default=0.7,
                    min=0.0,
                    max=5.0,
                    step=0.01,
                    tooltip=(
                        "Repel: suppresses this layer's prompt words outside its visible area. Paper: 0.4 to 0.9; "
                        "0 is off."
                    ),
                ),
                fraction(
                    "noise",
                    display_name="denoise",
                    default=0.8,
                    tooltip=(
                        "Denoise of this layer: 0 unchanged, 0.4 keeps shape and colours, 0.8 keeps only the "
                        "place. Used by Collage Noise."
                    ),
                ),
                io.Float.Input(
                    "control",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip=(
                        "Multiplies the ControlNet strength in this layer's visible area. Used by Collage Control."
                    ),
                ),
                io.Boolean.Input(
                    "trim",
                    default=True,
                    advanced=True,
                    tooltip=(
                        "Crops transparent borders, so that x, y and scale refer to what is visible. Turn it off "
                        "for a picture made for its place on a canvas."
                    ),
                ),
                LAYERS.Input("collage", optional=True, tooltip="The layers behind this one."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Cuts the layer out, instead of the image's alpha: Load Image's MASK, or one that is white"
                        " where the layer is, as from Subject Localize. mask_is says which."
                    ),
                ),
                io.Combo.Input(
                    "mask_is",
                    options=[MASK_AUTO, MASK_SHAPE, MASK_TRANSPARENCY],
                    default=MASK_AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "shape: the mask is white where the layer is. transparency: white where it is transparent, as"
                        " Load Image gives it. auto: transparency for a mask straight from Load Image, unless it was"
                        " painted in the Mask Editor; shape for all others."
                    ),
                ),
                io.Boolean.Input(
                    "flip", default=False, optional=True, advanced=True, tooltip="Mirrors the layer, left to right."
                ),
            ],
            outputs=[
                LAYERS.Output(
                    "layers",
                    display_name="collage",
                    tooltip="All layers so far, for the next Collage Layer or for Collage Canvas.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        text: str,
        x: float,
        y: float,
        scale: float,
        rotation: float,
        depth: int,
        w_pos: float,
        w_neg: float,
        noise: float,
        control: float,
        trim: bool = True,
        collage: tuple[Layer, ...] = (),
        mask: Tensor | None = None,
        mask_is: str = MASK_SHAPE,
        flip: bool = False,
    ) -> io.NodeOutput:
        refuse_nan(
            cls.NAME, x=x, y=y, scale=scale, rotation=rotation, w_pos=w_pos, w_neg=w_neg, noise=noise, control=control
        )
        if mask_is == MASK_AUTO:
            is_alpha = is_alpha_of_load_image(cls.hidden.prompt or {}, str(cls.hidden.unique_id), "mask")
            mask_is = MASK_TRANSPARENCY if is_alpha else MASK_SHAPE
        picture = cls.picture(image, mask, trim, mask_is)
        if flip:
            picture = picture.flip(-1)
        place = x, y, scale, rotation, depth
        layer = Layer(str(cls.hidden.unique_id), picture, text.strip(), *place, w_pos, w_neg, noise, control, flip=flip)
        return io.NodeOutput((*collage, layer))

    @classmethod
    def picture(cls, image: Tensor, mask: Tensor | None, trim: bool, mask_is: str = MASK_SHAPE) -> Tensor:
        """The layer cut out, [4, h, w], premultiplied RGBA. Raises ValueError for a batch, for a mask of another size,
        and for a layer of which nothing is left.
        """
        image = image_of(cls.NAME, "image", image)
        if len(image) > 1:
            raise ValueError(
                f"{cls.NAME}: {len(image)} images came in one batch, and a layer is one. Pick one (Get Image from"
                " Batch)."
            )
        image = image[0]
        alpha = image[..., 3] if image.shape[-1] == 4 else torch.ones(image.shape[:2])
        if mask is not None:
            alpha = cls.alpha(mask, image.shape[:2], mask_is)
        picture = kernel.premultiplied(image[..., :3], alpha.clamp(0, 1))
        trimmed = kernel.trim(picture)
        if trimmed is None:
            raise ValueError(f"{cls.NAME}: the layer is invisible, {cls.why_invisible(mask, mask_is)}")
        return trimmed.contiguous() if trim else picture

    @classmethod
    def alpha(cls, mask: Tensor, size: torch.Size, mask_is: str) -> Tensor:
        """The alpha that a MASK means, of the image's size [H, W]."""
        if mask_is == MASK_TRANSPARENCY and not mask.any():
            return torch.ones(size)  # Load Image's MASK of a picture without alpha: 64x64, whatever the picture's size
        mask = mask_for(cls.NAME, "mask", mask, (size[0], size[1]))[0]
        if mask.shape != size:
            raise ValueError(
                f"{cls.NAME}: the mask is {mask.shape[1]}x{mask.shape[0]} and the image {size[1]}x{size[0]}. Give a"
                " mask of the image's size."
            )
        return 1 - mask if mask_is == MASK_TRANSPARENCY else mask

    @staticmethod
    def why_invisible(mask: Tensor | None, mask_is: str) -> str:
        if mask is None:
            return "its alpha is 0 everywhere. Connect a picture of which something can be seen."
        if mask_is == MASK_TRANSPARENCY:
            return (
                "its mask is 1 everywhere and was taken as transparency. If it is white where the layer is, set mask_is"
                " to shape."
            )
        return (
            "its mask is 0 everywhere and was taken as the layer's shape, white where the layer is. If it is Load"
            " Image's MASK, set mask_is to transparency (or use Invert Mask)."
        )


def is_alpha_of_load_image(prompt: dict[str, dict], node: str, name: str) -> bool:
    """Whether an input of a node in a prompt gets Load Image's MASK, which is white where the file is transparent. One
    that was painted in the Mask Editor is white where somebody painted instead; its file lies in the folder clipspace.
    """
    link = prompt.get(node, {}).get("inputs", {}).get(name)
    if not isinstance(link, list):
        return False
    source = prompt.get(link[0], {})
    file = source.get("inputs", {}).get("image")
    is_painted = isinstance(file, str) and file.startswith("clipspace/")
    return source.get("class_type") in ("LoadImage", "LoadImageOutput") and link[1] == 1 and not is_painted


class CollageCanvas(io.ComfyNode):
    """Lays the layers over each other.

    What its editor in the browser gets and does (`ui`): {"montage_canvas": [{"width", "height": the canvas in pixels,
    "background": "#rrggbb" or the name of a preview (temp/montage/NAME.jpg), "layers": [...]}]}, and of each layer,
    back to front: {"node": the id of its CollageLayer node ("7", or "5:7" inside a subgraph), "picture": the name of
    its preview with alpha (temp/montage/NAME.png), "width", "height": the cut-out in pixels, "text",
    "flip": whether it is mirrored}. Where a layer
    lies the editor reads in the widgets x, y, scale, rotation and depth of that node, with the meaning they have there,
    and writes it back to them.
    """

    NAME = "Collage Canvas"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CollageCanvas",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Composites the layers of a collage and shows them in the node, where they can be moved, scaled "
                "and rotated: gives the image to start from, each layer's visible area, and the denoise map "
                "(Collage Diffusion)."
            ),
            is_output_node=True,  # its own run button: see the collage without sampling
            has_intermediate_output=True,  # a cached run still shows its pictures
            search_aliases=[
                "collage diffusion",
                "composite layers",
                "image composite",
                "layout",
                "layer editor",
                "regional prompting",
            ],
            inputs=[
                LAYERS.Input("collage", tooltip="The last Collage Layer of the chain, the topmost one."),
                io.Int.Input("width", default=512, min=64, max=8192, step=8, tooltip="Size of the canvas, in pixels."),
                io.Int.Input("height", default=512, min=64, max=8192, step=8, tooltip="Size of the canvas, in pixels."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip=(
                        "Prompt for the whole image. It must contain the text of every layer, word for word. "
                        "Empty: the layers' texts, joined with commas."
                    ),
                ),
                io.String.Input(
                    "background", default="#969696", tooltip="Background colour, #rrggbb (paper: grey, #969696)."
                ),
                fraction(
                    "background_noise",
                    display_name="background denoise",
                    default=0.8,
                    tooltip=(
                        "Denoise of the background. Paper: the highest denoise of the layers. 0 keeps it, for a "
                        "finished background_image."
                    ),
                ),
                io.Float.Input(
                    "blur",
                    default=10.0,
                    min=0.0,
                    max=500.0,
                    step=0.5,
                    tooltip=(
                        "Softness of the transition between the layers' denoise values: Gaussian blur of the "
                        "denoise map, in pixels of the canvas (paper: 10 at 512)."
                    ),
                ),
                io.Image.Input(
                    "background_image",
                    optional=True,
                    tooltip="Picture behind all layers, instead of the colour; scaled to cover the canvas.",
                ),
            ],
            outputs=[
                COLLAGE.Output(
                    "placed",
                    display_name="collage",
                    tooltip="For Collage Cross Attention, Collage Noise, Collage Control and Learn Layer Token.",
                ),
                io.Image.Output(
                    "image", tooltip="The composited layers. Encode this image with the VAE and sample from it."
                ),
                io.Mask.Output(
                    "masks",
                    tooltip=(
                        "Visible area of each layer, one mask per layer from back to front. Together with the "
                        "background's they sum to one."
                    ),
                ),
                io.Mask.Output(
                    "noise_map",
                    display_name="denoise map",
                    tooltip="The denoise map: how much each place may change, 0 to 1.",
                ),
                io.String.Output(
                    "full_prompt",
                    display_name="prompt",
                    tooltip="The prompt as text, for nodes that encode it themselves.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        collage: tuple[Layer, ...],
        width: int,
        height: int,
        prompt: str,
        background: str,
        background_noise: float,
        blur: float,
        background_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, background_noise=background_noise, blur=blur)
        layers = tuple(sorted(collage, key=lambda layer: layer.depth))
        behind = cls.background(background, background_image, width, height)

        def lay(number: int) -> Tensor:
            picture = placed(layers[number], (height, width))
            if not picture[3].any():
                layer = layers[number]
                logging.warning('%s: the layer "%s" (node %s) lies off the canvas.', cls.NAME, layer.text, layer.node)
            return picture

        composite, masks = kernel.over(lay, len(layers), behind)
        noise = noise_map(masks, [layer.noise for layer in layers], background_noise, blur)
        prompt = prompt.strip() or ", ".join(layer.text for layer in layers if layer.text)
        image = composite.movedim(0, -1)
        shown = {
            "width": width,
            "height": height,
            "background": (
                background.strip() if background_image is None else previews.photograph(behind.movedim(0, -1))
            ),
            "layers": [cls.shown(layer) for layer in layers],
        }
        return io.NodeOutput(
            Collage(layers, masks, noise, prompt, behind),
            image[None],
            masks,
            noise[None],
            prompt,
            ui={"montage_canvas": [shown]},
        )

    @staticmethod
    def shown(layer: Layer) -> dict[str, Any]:
        colour, alpha = layer.picture[:3], layer.picture[3:]
        straight = torch.cat([colour / alpha.clamp(min=1e-6), alpha]).movedim(0, -1)
        return {
            "node": layer.node,
            "picture": previews.cutout(straight),
            "width": layer.picture.shape[2],
            "height": layer.picture.shape[1],
            "text": layer.text,
            "flip": layer.flip,
        }

    @classmethod
    def background(cls, colour: str, image: torch.Tensor | None, width: int, height: int) -> torch.Tensor:
        """What lies behind all layers, [3, H, W]."""
        if image is None:
            if not re.fullmatch(r"#[0-9a-fA-F]{6}", colour.strip()):
                raise ValueError(
                    f'{cls.NAME}: background "{colour}" is not a colour. Write it as #rrggbb: grey is #969696.'
                )
            rgb = torch.tensor([int(colour.strip()[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            return rgb[:, None, None].expand(3, height, width)
        image = image_of(cls.NAME, "background_image", image)
        if len(image) > 1:
            raise ValueError(
                f"{cls.NAME}: background_image is a batch of {len(image)}, and there is one background. Pick one (Get"
                " Image from Batch)."
            )
        picture = image[..., :3].movedim(-1, 1)
        if picture.shape[2:] != (height, width):
            picture = comfy.utils.common_upscale(picture, width, height, "bicubic", "center").clamp(0, 1)
        return picture[0]


class CollageCrossAttn(io.ComfyNode):
    NAME = CollageBias.node

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CollageCrossAttn",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Regional prompting: binds each layer's words to its visible area (Collage Diffusion). Sample its "
                "MODEL with its CONDITIONING as positive."
            ),
            search_aliases=[
                "collage diffusion",
                "regional prompt",
                "regional prompting",
                "layout control",
                "attention couple",
                "flux regional prompt",
                "qwen-image regional prompt",
                "z-image regional prompt",
                "attention mask",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                COLLAGE.Input("collage", tooltip="From Collage Canvas, whose prompt is encoded."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies every layer's attract and repel; 0 is off.",
                ),
                io.Combo.Input(
                    "growth",
                    options=list(GROWTH),
                    default="log log",
                    advanced=True,
                    tooltip=(
                        "How the bias depends on the noise level sigma. log log: log(log(sigma + 1.01) + 1), the "
                        "authors' default. log: log(sigma + 1.01), stronger in the first steps. constant: 1 at "
                        "every step."
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
                    tooltip="End, as a fraction of the schedule: 1 is after the last step.",
                ),
                io.String.Input(
                    "sites",
                    default="all",
                    advanced=True,
                    tooltip=(
                        "Cross-attention blocks: all (paper), encoder, middle, decoder, or a list such as d0-3,m0,u2-5."
                        " On a transformer: all, first half, last half, middle half, or a list such as "
                        "double0-18,single0-37."
                    ),
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "The canvas's prompt, if another node has encoded it already, such as CLIP Text Encode SDXL."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "biased_model",
                    display_name="MODEL",
                    tooltip="The model with regional prompting. It acts on this node's CONDITIONING only.",
                ),
                io.Conditioning.Output(
                    "biased",
                    display_name="CONDITIONING",
                    tooltip="The encoded prompt, for the sampler's positive input.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        collage: Collage,
        strength: float,
        growth: str,
        start: float,
        end: float,
        sites: str,
        conditioning: list | None = None,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, strength=strength, start=start, end=end)
        window = Window(start, end, parse_sites(cls.NAME, model, sites))
        owned = owned_tokens(cls.NAME, connected(cls.NAME, "clip", clip), collage)
        steered = {
            position: layers
            for position, layers in owned.items()
            if any(collage.layers[layer].w_pos or collage.layers[layer].w_neg for layer in layers)
        }
        own = encoded(cls.NAME, clip, collage.prompt)
        given = own if conditioning is None else conditioning
        if not steered or strength == 0 or window.is_empty:
            return io.NodeOutput(model, given)
        biased = []
        for entry, offset in zip(given, cls.offsets(own, given, list(steered))):
            moved = {position + offset: layers for position, layers in steered.items()} if offset is not None else {}
            refusals.check_read(cls.NAME, model, moved)
            biased += bias.attach([entry], CollageBias(window, collage, moved, strength, growth)) if moved else [entry]
        return io.NodeOutput(install(model, heed_bias=True), biased)

    @classmethod
    def offsets(cls, own: list, given: list, positions: list[int]) -> list[int | None]:
        """How far the words stand behind their positions in each part of a CONDITIONING; None where they are not in it
        (a prompt that was combined with the canvas's). own: the CONDITIONING of the canvas's prompt.
        """
        if given is own:
            return [0] * len(own)
        found = [offset_of_words(own[0], entry, positions) for entry in given]
        if all(offset is None for offset in found):
            raise ValueError(
                f"{cls.NAME}: the canvas's words are not in the conditioning as this CLIP encodes them, so that none"
                " could be bound to its layer. Encode the prompt that Collage Canvas gives in one piece (no BREAK),"
                " with the CLIP that is connected here."
            )
        return found


class CollageNoise(io.ComfyNode):
    NAME = "Collage Noise"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CollageNoise",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Per-layer denoise: each layer changes as much as its denoise says, and 0 stays exactly as it "
                "is (Collage Diffusion, per-layer harmonisation). Sample the encoded image of Collage Canvas."
            ),
            search_aliases=[
                "collage diffusion",
                "harmonize",
                "harmonise",
                "differential diffusion",
                "per-region denoise",
                "regional denoise",
                "inpaint",
                "img2img",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Collage Cross Attention, or any model."),
                COLLAGE.Input("collage", tooltip="From Collage Canvas, whose denoise map is followed."),
                io.Float.Input(
                    "dilation",
                    default=4.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    advanced=True,
                    tooltip=(
                        "Latent pixels by which the still locked area grows while the noise is strong (paper: 4 at "
                        "512 px; 0 is off)."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "harmonising_model",
                    display_name="MODEL",
                    tooltip="The model that follows the denoise map. A noise_mask in the latent acts as well.",
                ),
                io.Float.Output("denoise", tooltip="For the sampler's denoise: the highest value of the denoise map."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, collage: Collage, dilation: float) -> io.NodeOutput:
        refuse_nan(cls.NAME, dilation=dilation)
        # rounded, since samplers take int(steps / denoise) steps of a schedule and 0.8 is 0.800000012 in float32
        denoise = round(float(collage.noise.max()), 4)
        return io.NodeOutput(run_masks.with_noise_map(model, cls.NAME, collage.noise, dilation), denoise)


class CollageControl(io.ComfyNode):
    NAME = "Collage Control"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CollageControl",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Regional ControlNet strength: each layer's control value scales ControlNets in its visible area "
                "(Collage Diffusion). Apply the ControlNets to the conditioning as usual."
            ),
            search_aliases=["collage diffusion", "controlnet mask", "regional controlnet", "controlnet strength"],
            inputs=[
                io.Model.Input("model", tooltip="From Collage Cross Attention, or any model."),
                COLLAGE.Input("collage", tooltip="From Collage Canvas."),
                io.Float.Input(
                    "background",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies the ControlNet strength where there is no layer (paper: 0).",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "controlled_model",
                    display_name="MODEL",
                    tooltip="The model that scales what ControlNets add, in both CFG halves.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, collage: Collage, background: float) -> io.NodeOutput:
        refuse_nan(cls.NAME, background=background)
        factors = torch.tensor([layer.control for layer in collage.layers])
        strength = torch.einsum("n,nhw->hw", factors, collage.masks) + background * (1 - collage.masks.sum(0))
        return io.NodeOutput(run_masks.with_control_map(model, cls.NAME, strength))


NODES = [CollageLayer, CollageCanvas, CollageCrossAttn, CollageNoise, CollageControl]
