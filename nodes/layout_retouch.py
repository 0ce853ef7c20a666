"""Layout-and-Retouch (arXiv 2407.09779): a personalised subject in compositions of the base model.

Stage one lets the plain model lay the picture out and the personalised one finish it (Step Blend Sampler); stage two
samples it again from there, with the subject's look fed from a photo and the surroundings from stage one (Multi Source
Swap).
"""

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..kernels import adaptive_mask as kernel
from ..methods.layout_retouch import FromBoth, FromLayout, FromReference, LiveMask, ObjectMask, Place
from ..methods.position_shift import AUTO, shift_of
from ..patching import refusals
from ..patching.attention_maps import TokenMap, marked
from ..patching.install import install
from ..patching.models import parse_sites
from ..patching.recipe import Recipe
from ..patching.schedule import Window, step_of
from ..patching.step_blend import Stage, StepBlend
from ..patching.streams import LATENT_KEY, Recording, Run, Stream, check_together, streams_of, with_prompt
from ..patching.tokens import token_runs
from ..patching.weights import Weights
from .inputs import (
    connected,
    encoded,
    exact_input,
    fraction,
    latent_of,
    mask_for_run,
    mask_of,
    refuse_nan,
    start_latent,
)

CATEGORY = "montage/retouch"
RUNNING = io.Custom("MONTAGE_RUNNING_MASK")


class StepBlendSampler(io.ComfyNode):
    NAME = "Step Blend Sampler"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StepBlendSampler",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Starts an image with one model and finishes it with another, within one sampling run: the base "
                "model decides the composition, the personalised model draws your subject (Layout-and-Retouch, "
                "stage one). Connect its GUIDER to SamplerCustomAdvanced."
            ),
            search_aliases=[
                "layout and retouch",
                "switch model",
                "two models",
                "refiner",
                "step blended denoising",
                "dreambooth",
                "lora schedule",
            ],
            inputs=[
                io.Guider.Input(
                    "first",
                    tooltip=(
                        "The guider that starts: the base model with the class noun in its prompt (CFG Guider). "
                        "Connect another Step Blend Sampler to use three models or more."
                    ),
                ),
                io.Guider.Input(
                    "then",
                    tooltip=(
                        "The guider that takes over: the personalised model with the subject's trigger word in its "
                        "prompt (CFG Guider)."
                    ),
                ),
                fraction(
                    "switch",
                    default=0.1,
                    tooltip=(
                        "When the second model takes over, as a fraction of the schedule (lambda 1 of the paper): "
                        "0.1 is after 5 of 50 steps (paper: 5; 3 for hard prompts). 0 is the second alone, 1 the "
                        "first alone."
                    ),
                ),
                fraction(
                    "ramp",
                    default=0.0,
                    advanced=True,
                    tooltip=(
                        "Length of a gradual transition, as a fraction of the schedule: both predictions are "
                        "mixed, the second's share growing. 0 switches at once (paper). Both models are evaluated "
                        "while it lasts."
                    ),
                ),
            ],
            outputs=[
                io.Guider.Output(
                    "guider",
                    display_name="GUIDER",
                    tooltip="The combined guider, for SamplerCustomAdvanced or another Step Blend Sampler.",
                )
            ],
        )

    @classmethod
    def execute(cls, first: Any, then: Any, switch: float, ramp: float) -> io.NodeOutput:
        refuse_nan(cls.NAME, switch=switch, ramp=ramp)
        if isinstance(then, StepBlend):
            raise ValueError(
                f"{cls.NAME}: the input then is itself a Step Blend Sampler. Connect that one to the input"
                " first, and the guider that follows it to then."
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
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TokenAttentionMap",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Records the cross-attention map of some prompt words while a model samples: where those words act "
                "in the picture. Nodes after it on the MODEL can use the map during the run; the sampled LATENT "
                "carries the final map."
            ),
            search_aliases=[
                "cross attention map",
                "attention heatmap",
                "attention mask",
                "daam",
                "mask from text",
                "layout and retouch",
            ],
            not_idempotent=True,  # as Feature Recorder: each has a recording of its own
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with. Its pictures do not change."),
                io.Latent.Input("latent", tooltip="The latent that the sampler starts from."),
                io.Clip.Input("clip", tooltip="The model's text encoder."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="The positive prompt."),
                io.String.Input(
                    "words",
                    tooltip=(
                        "Words to map, exactly as they occur in the prompt. Several phrases, separated by commas, "
                        "count together; so do all occurrences of one."
                    ),
                ),
                io.String.Input(
                    "sites",
                    default="d@2-4,u@2-4",
                    advanced=True,
                    tooltip=(
                        "Cross-attention blocks to use. d@2-4,u@2-4: the down and up path at 1/2 and 1/4 of the "
                        "latent's resolution. On a transformer, which has no such levels, this default means the "
                        "middle half of its blocks; write all, first half, last half, middle half, or a list such as "
                        "double0-18,single0-37."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    "measuring_model",
                    display_name="MODEL",
                    tooltip="The measuring model. Connect it to one sampler.",
                ),
                io.Latent.Output(
                    "measuring_latent",
                    display_name="LATENT",
                    tooltip=(
                        "The same latent. Connect it to the same sampler: the LATENT that the sampler returns "
                        "carries the map to Adaptive Mask Blend."
                    ),
                ),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="CONDITIONING",
                    tooltip=(
                        "The encoded prompt. Connect it to the same sampler's positive input: the map is measured "
                        "for this conditioning only."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, latent: dict[str, Any], clip: CLIP, prompt: str, words: str, sites: str
    ) -> io.NodeOutput:
        found = parse_sites(cls.NAME, model, sites)
        latent_of(cls.NAME, model, latent)
        tokens = tokens_of(cls.NAME, connected(cls.NAME, "clip", clip), prompt, words)
        refusals.check_read(cls.NAME, model, tokens)
        token_map = TokenMap(words, prompt, tokens, found)
        recording = Recording()
        conditioning = encoded(cls.NAME, clip, prompt)
        return io.NodeOutput(
            install(model, recording=recording, token_map=token_map),
            {**latent, LATENT_KEY: recording},
            marked(conditioning, prompt),
        )


def tokens_of(node: str, clip: CLIP, prompt: str, words: str) -> tuple[int, ...]:
    """The token positions of comma-separated phrases in a prompt, all occurrences."""
    try:
        runs = [run for phrase in words.split(",") for run in token_runs(clip, prompt, phrase.strip())]
    except ValueError as error:
        raise ValueError(f"{node}: words: {error}") from None
    return tuple(sorted({token for run in runs for token in run}))


class AdaptiveMaskBlend(io.ComfyNode):
    NAME = "Adaptive Mask Blend"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="AdaptiveMaskBlend",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Combines a cross-attention map and a segmentation mask into a soft object mask: 1 where the words "
                "act, falling to a half at the object's edge, 0 outside (Layout-and-Retouch)."
            ),
            search_aliases=["layout and retouch", "attention mask", "soft mask", "mask from text", "sam"],
            inputs=[
                fraction(
                    "threshold",
                    default=0.1,
                    tooltip=(
                        "Threshold of the attention map, which runs from 0 to 1. 0.1 selects a large area, 0.3 the "
                        "core."
                    ),
                ),
                io.Float.Input(
                    "min_area",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    advanced=True,
                    tooltip="Regions smaller than this fraction of the picture are treated as noise and removed.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(kernel.MODES),
                    default="or",
                    advanced=True,
                    tooltip=(
                        "How the two are combined: or (either one, paper), and (where both agree), sam or cross "
                        "(one of them alone)."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "The LATENT of a sampler behind Token Attention Map. Without it the segmentation alone is used."
                    ),
                ),
                io.Mask.Input(
                    "sam_mask",
                    optional=True,
                    tooltip=(
                        "Segmentation of the object in the layout image: from Subject Localize, or painted. "
                        "Without it the attention map alone is used."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output(
                    "mask",
                    tooltip=(
                        "The soft mask, in the size of the segmentation or else of the picture. For Multi Source Swap."
                    ),
                ),
                RUNNING.Output(
                    "running",
                    display_name="running mask",
                    tooltip=(
                        "The same rule, applied at every step to the attention map of the run that uses it. For "
                        "Multi Source Swap, instead of mask."
                    ),
                ),
                io.Image.Output(
                    "pictures",
                    tooltip=(
                        "The steps of the computation, six pictures per image: map, threshold, small regions "
                        "removed, object, depth inside it, mask."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        threshold: float,
        min_area: float,
        mode: str,
        latent: dict[str, Any] | None = None,
        sam_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, threshold=threshold, min_area=min_area)
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
                    f"{cls.NAME}: the latent carries no map. Connect MODEL, LATENT and CONDITIONING of Token Attention"
                    " Map to the sampler that makes it."
                )
            found = torch.stack([list(run.maps.values())[-1][row] for run, row in streams])
            run = streams[0].run
            size = run.picture_size
            segment = None if segment is None else mask_for_run(cls.NAME, "sam_mask", segment, run)
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
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MultiSourceSwap",
            display_name=cls.NAME,
            category=CATEGORY,
            description=(
                "Samples a layout image again with the appearance of your subject: first the layout's own latents, "
                "then the subject's keys and values in the self-attention, and around the object the layout itself "
                "(Layout-and-Retouch, stage two)."
            ),
            search_aliases=[
                "layout and retouch",
                "masactrl",
                "dreammatcher",
                "appearance transfer",
                "style transfer",
                "character swap",
                "face swap",
                "dreambooth",
                "reference image",
                "personalized subject",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The personalised model that finished the layout image."),
                io.Latent.Input(
                    "layout",
                    tooltip=(
                        "The layout image with its recording: a recorded sampler output (Feature Recorder on the "
                        "personalised MODEL), or Invert Image. A batch of N gives N images."
                    ),
                ),
                io.Latent.Input(
                    "reference",
                    tooltip=(
                        "The reference image of the subject, from Invert Image. One for all layouts, or one for each."
                    ),
                ),
                fraction(
                    "layout_end",
                    default=0.2,
                    tooltip=(
                        "Until when the layout is followed exactly, as a fraction of the schedule (lambda 2 of the "
                        "paper): 0.2 is 10 of 50 steps. These steps cost nothing. 1 returns the layout."
                    ),
                ),
                fraction(
                    "mask_start",
                    default=0.6,
                    tooltip=(
                        "When the mask starts to keep the layout around the object, as a fraction of the schedule: "
                        "0.6 is after 30 of 50 steps (paper)."
                    ),
                ),
                fraction(
                    "end",
                    default=1.0,
                    advanced=True,
                    tooltip=(
                        "When the subject's keys and values stop, as a fraction of the schedule. 1 is after "
                        "the last step (paper)."
                    ),
                ),
                io.String.Input(
                    "sites",
                    default="u@1-2",
                    advanced=True,
                    tooltip=(
                        "Self-attention blocks that read the reference: u@1-2 is the up path at the latent's "
                        "resolution and at half of it (layers 10 to 15 of SD1.5). On a transformer, which has no such "
                        "levels, this default means the last half of its blocks (our choice, measured on the demo "
                        "transformer); write all, first half, last half, middle half, or a list such as "
                        "double0-18,single0-37."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "Soft mask of the object, from Adaptive Mask Blend or painted; one for all layouts, or one "
                        "for each. Without it nothing is blended."
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
                    tooltip=(
                        "Prompt for reading the layout's attention, for a layout that was inverted with an "
                        "empty prompt."
                    ),
                ),
                io.Conditioning.Input(
                    "reference_prompt",
                    optional=True,
                    tooltip=(
                        "Prompt for reading the reference's attention (paper: a photo of the trigger word). "
                        "Without it, that of Invert Image, which costs half."
                    ),
                ),
                io.Mask.Input(
                    "reference_mask",
                    optional=True,
                    tooltip=(
                        "Transformers only: where the subject is in the reference image, for shift; one for all "
                        "references, or one for each."
                    ),
                ),
                io.String.Input(
                    "shift",
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Transformers only (not SD3): moves the reference's keys so that its subject stands where the "
                        "object of the layout is, since a query looks first at its own place in the other image. auto: "
                        "from the centre of reference_mask to that of mask or running_mask, if both are connected. "
                        "none: not at all. Or pixels to the right and down, such as 64, -32."
                    ),
                ),
                exact_input(),
            ],
            outputs=[
                io.Model.Output(
                    "retouching_model",
                    display_name="MODEL",
                    tooltip=(
                        "The retouching model. Sample it with the sampler settings of the layout and the subject's "
                        "prompt."
                    ),
                ),
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip=(
                        "The start latent of the layout. Any seed will do, since the noise is the layout's; with an "
                        "ancestral or SDE sampler, the layout's own."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        layout: dict[str, Any],
        reference: dict[str, Any],
        layout_end: float,
        mask_start: float,
        end: float,
        sites: str,
        mask: torch.Tensor | None = None,
        running_mask: LiveMask | None = None,
        layout_prompt: list | None = None,
        reference_prompt: list | None = None,
        reference_mask: torch.Tensor | None = None,
        shift: str = AUTO,
        exact: bool = False,
    ) -> io.NodeOutput:
        refuse_nan(cls.NAME, layout_end=layout_end, mask_start=mask_start, end=end)
        layouts, references = (
            streams_of(f"{cls.NAME}: {name}", [latent])
            for name, latent in (("layout", layout), ("reference", reference))
        )
        run = layouts[0].run
        mask = None if mask is None else mask_for_run(cls.NAME, "mask", mask, run).clamp(0, 1)
        cls.check(model, layouts, references, mask, running_mask)
        known = mask if running_mask is None else running_mask
        inside = None if known is None else ObjectMask(known)
        place = cls.place(model, shift, reference_mask, len(references), inside, run)
        found = parse_sites(cls.NAME, model, sites)
        latent = start_latent(layouts)
        layouts, references = prompted(layouts, model, layout_prompt), prompted(references, model, reference_prompt)
        recipes: list[Recipe] = [FromLayout(layouts, layout_end, end)]
        if inside is None:
            recipes.append(FromReference(Window(layout_end, end, found), references, place, exact))
        else:
            blended = max(layout_end, min(mask_start, end))
            recipes += [
                FromReference(Window(layout_end, blended, found), references, place, exact),
                FromBoth(Window(blended, end, found), references, layouts, inside, place, exact),
            ]
        return io.NodeOutput(install(model, *recipes), latent)

    @classmethod
    def place(
        cls,
        model: ModelPatcher,
        text: str,
        subject: torch.Tensor | None,
        references: int,
        inside: ObjectMask | None,
        run: Run,
    ) -> Place | None:
        """Where the references' keys are to be. subject: the input reference_mask. run: of a layout."""
        shift = shift_of(cls.NAME, model, text, run.picture_size)
        if subject is not None:
            subject = mask_for_run(cls.NAME, "reference_mask", subject, run).clamp(0, 1)
            if len(subject) not in (1, references):
                raise ValueError(
                    f"{cls.NAME}: {len(subject)} reference_masks for {references} references. Give one for all, or one"
                    " for each."
                )
        return shift and Place(shift, subject, inside)

    @classmethod
    def check(
        cls,
        model: ModelPatcher,
        layouts: list[Stream],
        references: list[Stream],
        mask: torch.Tensor | None,
        running_mask: LiveMask | None,
    ) -> None:
        check_together(
            cls.NAME, [*layouts, *references], names=["the layout"] * len(layouts) + ["the reference"] * len(references)
        )
        family, images = Weights(model).family, len(layouts)
        for run, _ in (*layouts, *references):
            if run.weights.family != family:
                raise ValueError(
                    f"{cls.NAME}: the MODEL is {family} and a recording was made with {run.weights}. Use models of one"
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


def prompted(streams: list[Stream], model: ModelPatcher, conditioning: list | None) -> list[Stream]:
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
