"""Layout-and-Retouch (arXiv 2407.09779): a personal subject in a layout of the plain model.

Stage one lets the plain model lay the picture out and the personalised one finish it (Step Blend Sampler); stage two
samples it again from there, with the subject's look fed from a photo and the surroundings from stage one (Multi Source
Swap).
"""

import torch
from comfy_api.latest import io

from ..kernels import adaptive_mask as kernel
from ..methods.layout_retouch import FromBoth, FromLayout, FromReference, LiveMask
from ..patching.attention_maps import TokenMap, marked
from ..patching.install import install
from ..patching.models import parse_sites
from ..patching.schedule import Window, step_of
from ..patching.step_blend import Stage, StepBlend
from ..patching.streams import LATENT_KEY, Recording, Stream, check_together, streams_of, with_prompt
from ..patching.tokens import token_runs
from ..patching.weights import Weights
from .inputs import mask_of, numbers

CATEGORY = "montage/retouch"
RUNNING = io.Custom("MONTAGE_RUNNING_MASK")


class StepBlendSampler(io.ComfyNode):
    NAME = "Step Blend Sampler"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="StepBlendSampler",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Lets one model begin an image and another finish it, in one run of one sampler: the plain model lays"
                " the picture out, the personalised one fills it (Layout-and-Retouch, stage one). Connect its GUIDER to"
                " SamplerCustomAdvanced."
            ),
            search_aliases=["layout and retouch", "switch model", "two models", "refiner", "step blended denoising"],
            inputs=[
                io.Guider.Input(
                    "first",
                    tooltip=(
                        "Who begins: the plain model with the class noun in its prompt (CFG Guider). Another Step Blend"
                        " Sampler makes it three or more."
                    ),
                ),
                io.Guider.Input(
                    "then",
                    tooltip=(
                        "Who takes over: the personalised model with the subject's word in its prompt (CFG Guider)."
                    ),
                ),
                io.Float.Input(
                    "switch",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Where in the schedule the second takes over, lambda 1 of the paper: 0.1 is after 5 of 50 steps"
                        " (paper: 5; 3 for hard prompts). 0 is the second alone, 1 the first alone."
                    ),
                ),
                io.Float.Input(
                    "ramp",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Over which part of the schedule both predictions are mixed from there, the second's share"
                        " growing. 0 switches at once (paper). Costs both models' evaluations while it lasts."
                    ),
                ),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="GUIDER",
                    tooltip="Both, for SamplerCustomAdvanced or another Step Blend Sampler.",
                )
            ],
        )

    @classmethod
    def execute(cls, first, then, switch, ramp):
        numbers(cls.NAME, switch=switch, ramp=ramp)
        if isinstance(then, StepBlend):
            raise ValueError(
                f"{cls.NAME}: then is itself a Step Blend Sampler. Connect that one to first, and to then the guider"
                " that follows."
            )
        stages = first.stages if isinstance(first, StepBlend) else (Stage(first, 0.0, 0.0),)
        models = [guider.model_patcher for guider in (stages[0].guider, then)]
        if len({type(model.model.latent_format) for model in models}) > 1:
            raise ValueError(
                f"{cls.NAME}: the first MODEL is {Weights(models[0]).family} and the other {Weights(models[1]).family},"
                " whose latents differ. Use models that share an autoencoder."
            )
        if switch < stages[-1].start:
            raise ValueError(
                f"{cls.NAME}: this one takes over at {switch:g}, before the one it follows ({stages[-1].start:g}). Give"
                " it a later switch."
            )
        return io.NodeOutput(StepBlend((*stages, Stage(then, switch, ramp))))


# ---------------------------------------------------------------- where the words are


class TokenAttentionMap(io.ComfyNode):
    NAME = "Token Attention Map"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TokenAttentionMap",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Measures where a model looks for some words of its prompt while it samples: the running mean of its"
                " cross-attention maps. Nodes behind it on the MODEL read the map during the run; the sampled LATENT"
                " carries the finished one."
            ),
            search_aliases=["cross attention map", "attention heatmap", "daam", "layout and retouch"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model. It samples as before, bit for bit."),
                io.Latent.Input("latent", tooltip="The latent that the sampler starts from."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="The positive prompt."),
                io.String.Input(
                    "words",
                    tooltip=(
                        "What to look for, as it stands in the prompt. Several phrases, separated by commas, count"
                        " together; so do all occurrences of one."
                    ),
                ),
                io.String.Input(
                    "sites",
                    default="d@2-4,u@2-4",
                    advanced=True,
                    tooltip=(
                        "The cross-attention blocks to look at. d@2-4,u@2-4: down and up path at 1/2 and 1/4 of the"
                        " latent."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "measuring_model",
                    display_name="MODEL",
                    tooltip="The model that measures. Connect it to one sampler.",
                ),
                io.Latent.Output(
                    "measuring_latent",
                    display_name="LATENT",
                    tooltip=(
                        "The same latent. Connect it to the same sampler: what that returns carries the map to Adaptive"
                        " Mask Blend."
                    ),
                ),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip=(
                        "The prompt, encoded. Connect it to the same sampler's positive: only where it acts is"
                        " measured."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent, clip, prompt, words, sites):
        found = parse_sites(cls.NAME, model, sites)
        token_map = TokenMap(words, prompt, tokens_of(cls.NAME, clip, prompt, words), found)
        recording = Recording()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return io.NodeOutput(
            install(model, recording=recording, token_map=token_map),
            {**latent, LATENT_KEY: recording},
            marked(conditioning, prompt),
        )


def tokens_of(node, clip, prompt, words):
    """The token positions of comma-separated phrases in a prompt, all occurrences."""
    try:
        runs = [run for phrase in words.split(",") for run in token_runs(clip, prompt, phrase.strip())]
    except ValueError as error:
        raise ValueError(f"{node}: words: {error}") from None
    return tuple(sorted({token for run in runs for token in run}))


class AdaptiveMaskBlend(io.ComfyNode):
    NAME = "Adaptive Mask Blend"

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="AdaptiveMaskBlend",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "A soft mask of an object out of where the model looked for its words and a segmentation: 1 where the"
                " words are, falling to a half at the object's edge, 0 outside (Layout-and-Retouch)."
            ),
            search_aliases=["layout and retouch", "attention mask", "soft mask"],
            inputs=[
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Of the map, which runs from 0 to 1: from where on a place counts. 0.1 takes much; 0.3 the"
                        " core."
                    ),
                ),
                io.Float.Input(
                    "min_area",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Pieces of less than this part of the picture are noise and left out.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(kernel.MODES),
                    default="or",
                    advanced=True,
                    tooltip=(
                        "What the object is: or (the words or the segmentation, paper), and (where both agree), sam or"
                        " cross (one alone)."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="What a sampler behind Token Attention Map returned. Without it, no words count.",
                ),
                io.Mask.Input(
                    "sam_mask",
                    optional=True,
                    tooltip=(
                        "The object in the layout picture: from Subject Localize, or painted. Without it, the words"
                        " alone count."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "mask", tooltip="The mask, of the segmentation's size or else the picture's. For Multi Source Swap."
                ),
                RUNNING.Output(
                    "running",
                    display_name="running mask",
                    tooltip=(
                        "The same rule, with the map as it is at every step of the run that reads it. For Multi Source"
                        " Swap, instead of mask."
                    ),
                ),
                io.Image.Output(
                    "pictures",
                    tooltip=(
                        "How it came about, six pictures for each image: map, thresholded, without small pieces,"
                        " object, depth inside it, mask."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(cls, threshold, min_area, mode, latent=None, sam_mask=None):
        numbers(cls.NAME, threshold=threshold, min_area=min_area)
        if sam_mask is None and mode in ("and", "sam"):
            raise ValueError(
                f'{cls.NAME}: mode "{mode}" needs sam_mask, and none is connected. Connect one, or set mode to or.'
            )
        segment = None if sam_mask is None else mask_of(cls.NAME, "sam_mask", sam_mask)
        found, size = torch.zeros(1 if segment is None else len(segment), 8, 8), (64, 64)
        if latent is not None:
            streams = streams_of(cls.NAME, [latent])
            if not all(run.maps for run, _ in streams):
                raise ValueError(
                    f"{cls.NAME}: the latent carries no map. Wire MODEL, LATENT and CONDITIONING of Token Attention Map"
                    " into the sampler that makes it."
                )
            found = torch.stack([list(run.maps.values())[-1][row] for run, row in streams])
            size = tuple(8 * side for side in streams[0].run.size)
        if segment is not None:
            size = tuple(segment.shape[1:])
            if len(segment) not in (1, len(found)):
                raise ValueError(
                    f"{cls.NAME}: {len(segment)} sam_masks for {len(found)} images. Give one for each image, or one for"
                    " all."
                )
        result = kernel.adaptive(found, segment, size, threshold, min_area, mode)
        steps = torch.stack([kernel.at_size(found, size), *result], 1).flatten(0, 1)
        return io.NodeOutput(
            result.mask, LiveMask(segment, threshold, min_area, mode), steps[..., None].expand(-1, -1, -1, 3)
        )


# ---------------------------------------------------------------- the swap


class MultiSourceSwap(io.ComfyNode):
    NAME = FromBoth.node

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="MultiSourceSwap",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Samples a layout again with the look of a personal subject: the layout's trajectory first, then the"
                " subject's keys and values in the self-attention, and around the object the layout itself"
                " (Layout-and-Retouch, stage two)."
            ),
            search_aliases=["layout and retouch", "masactrl", "dreammatcher", "appearance transfer", "subject"],
            inputs=[
                io.Model.Input("model", tooltip="The personalised model that the layout was finished with."),
                io.Latent.Input(
                    "layout",
                    tooltip=(
                        "The layout with its history: a recorded sampler output (Feature Recorder on the personalised"
                        " MODEL), or a picture from Invert Image. A batch of N is N layouts for N images."
                    ),
                ),
                io.Latent.Input(
                    "reference",
                    tooltip="A photo of the subject with its history, from Invert Image. One, or one for each layout.",
                ),
                io.Float.Input(
                    "layout_end",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How long everything is the layout's, lambda 2 of the paper: 0.2 is 10 of 50 steps. They cost"
                        " nothing. 1 returns the layout."
                    ),
                ),
                io.Float.Input(
                    "mask_start",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "From where on the mask blends the layout in around the object: 0.6 is after 30 of 50 steps"
                        " (paper)."
                    ),
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where the subject's keys and values end. 1 is after the last step (paper).",
                ),
                io.String.Input(
                    "sites",
                    default="u@1-2",
                    advanced=True,
                    tooltip=(
                        "The self-attention blocks that are fed: u@1-2 is the up path at the latent's resolution and at"
                        " half of it (layers 10 to 15 of SD1.5)."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Where the object is, softly, from Adaptive Mask Blend or painted; one, or one for each layout."
                        " Without it nothing is blended."
                    ),
                ),
                RUNNING.Input(
                    "running_mask",
                    optional=True,
                    tooltip="From Adaptive Mask Blend, instead of mask: follows Token Attention Map on this MODEL.",
                ),
                io.Conditioning.Input(
                    "layout_prompt",
                    optional=True,
                    tooltip="The prompt that the layout is read with, for one that was inverted with an empty prompt.",
                ),
                io.Conditioning.Input(
                    "reference_prompt",
                    optional=True,
                    tooltip=(
                        "The prompt that the photo is read with (paper: a photo of the subject's word). Without it the"
                        " one of Invert Image, which costs half."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "retouching_model",
                    display_name="MODEL",
                    tooltip=(
                        "The model that retouches. Sample it with the sampler settings of the layout and the subject's"
                        " prompt."
                    ),
                ),
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip="Where the layout started. Any seed will do: the noise is the layout's.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        layout,
        reference,
        layout_end,
        mask_start,
        end,
        sites,
        mask=None,
        running_mask=None,
        layout_prompt=None,
        reference_prompt=None,
    ):
        numbers(cls.NAME, layout_end=layout_end, mask_start=mask_start, end=end)
        layouts, references = (
            streams_of(f"{cls.NAME}: {name}", [latent])
            for name, latent in (("layout", layout), ("reference", reference))
        )
        mask = None if mask is None else mask_of(cls.NAME, "mask", mask).clamp(0, 1)
        cls.check(model, layouts, references, mask, running_mask)
        found = parse_sites(cls.NAME, model, sites)
        latent = {"samples": torch.cat([run.latent_image[row : row + 1] for run, row in layouts])}
        if layouts[0].run.denoise_mask is not None:
            latent["noise_mask"] = torch.cat([run.denoise_mask[row : row + 1, :1] for run, row in layouts])
        layouts, references = prompted(layouts, model, layout_prompt), prompted(references, model, reference_prompt)
        recipes = [FromLayout(layouts, layout_end, end)]
        if mask is None and running_mask is None:
            recipes.append(FromReference(Window(layout_end, end, found), references))
        else:
            blended = max(layout_end, min(mask_start, end))
            recipes += [
                FromReference(Window(layout_end, blended, found), references),
                FromBoth(
                    Window(blended, end, found), references, layouts, mask if running_mask is None else running_mask
                ),
            ]
        return io.NodeOutput(install(model, *recipes), latent)

    @classmethod
    def check(cls, model, layouts, references, mask, running_mask):
        check_together(
            cls.NAME, [*layouts, *references], names=["the layout"] * len(layouts) + ["the reference"] * len(references)
        )
        family, images = Weights(model).family, len(layouts)
        for run, _ in (*layouts, *references):
            if run.weights.family != family:
                raise ValueError(
                    f"{cls.NAME}: the MODEL is {family} and a history was made with {run.weights}. Use models of one"
                    " family."
                )
        for run in dict.fromkeys(run for run, _ in layouts):
            seen, steps = step_of(next(reversed(run.evaluations))[0], run.sigmas) + 1, len(run.sigmas) - 1
            if seen < steps:
                raise ValueError(
                    f"{cls.NAME}: the layout was recorded over {seen} of its {steps} steps. Put Feature Recorder on the"
                    " MODEL that finishes it (the last of a Step Blend Sampler), and use no adaptive sampler."
                )
        if len(references) not in (1, images):
            raise ValueError(
                f"{cls.NAME}: {len(references)} references for {images} layouts. Give one for all, or one for each."
            )
        if mask is not None and running_mask is not None:
            raise ValueError(f"{cls.NAME}: mask and running_mask are both connected. Disconnect one.")
        masks = mask if running_mask is None else running_mask.segment
        if masks is not None and len(masks) not in (1, images):
            raise ValueError(f"{cls.NAME}: {len(masks)} masks for {images} layouts. Give one for all, or one for each.")


def prompted(streams, model, conditioning):
    """The streams with a positive prompt of its own, where one is given. Streams of one run stay together, to be
    replayed at once.
    """
    if conditioning is None:
        return streams
    runs = {
        run: with_prompt(Stream(run, 0), model, positive=conditioning).run
        for run in dict.fromkeys(stream.run for stream in streams)
    }
    return [Stream(runs[run], row) for run, row in streams]


NODES = [StepBlendSampler, TokenAttentionMap, AdaptiveMaskBlend, MultiSourceSwap]
