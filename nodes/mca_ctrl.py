"""MCA-Ctrl (arXiv 2505.01428): the subject of one image in a region of another, by masked self-attention."""

import logging
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..kernels import grid_masks
from ..methods.mca_ctrl import (
    CUSTOM,
    FORWARD,
    LATE,
    PRESETS,
    REVERSE,
    SAGI,
    SALQ,
    BackgroundLock,
    MaskArea,
    MaskedAttention,
    Preset,
    WordsArea,
)
from ..methods.position_shift import AUTO, shift_of
from ..patching.install import install, installed_in
from ..patching.models import parse_sites
from ..patching.recipe import Recipe
from ..patching.schedule import Window
from ..patching.streams import Run, Stream, check_together, streams_of, with_prompt
from .inputs import exact_input, fraction, mask_for_run, refuse_nan, start_latent

# ---------------------------------------------------------------- the node


def window_inputs(name: str, start: float, end: float) -> list:
    return [
        fraction(
            f"{name.lower()}_start",
            default=start,
            tooltip=f"Start of {name}, as a fraction of the schedule: 0 is the first step.",
        ),
        fraction(
            f"{name.lower()}_end",
            default=end,
            tooltip=(
                f"End of {name}, as a fraction of the schedule: 1 is after the last step. "
                f"At or below its start: no {name}."
            ),
        ),
        io.String.Input(
            f"{name.lower()}_sites",
            default="all" if name == "SAGI" else LATE,
            tooltip=(
                f"Self-attention blocks of {name}: all, encoder, middle, decoder, or a list such as d0-3,m0,u2-. "
                f"The paper: all for SAGI, {LATE} for SALQ when editing and all when generating. On a transformer "
                f"{LATE} means the first third of its blocks (our choice, measured on the demo transformer); write all,"
                " first third, first half, last half, middle half, or a list such as double0-18,single0-37."
            ),
        ),
    ]


class CollaborativeAttention(io.ComfyNode):
    NAME = MaskedAttention.node

    @classmethod
    def define_schema(cls) -> io.Schema:
        custom = io.DynamicCombo.Option(CUSTOM, [*window_inputs("SAGI", 0.0, 0.1), *window_inputs("SALQ", 0.1, 1.0)])
        return io.Schema(
            node_id="CollaborativeAttention",
            display_name=cls.NAME,
            category="montage",
            description=(
                "Subject-driven editing: places the subject of one image into a region of another, or into a new "
                "image, by attending to both while sampling (MCA-Ctrl). Swap a subject, insert one, or generate "
                "with one."
            ),
            search_aliases=[
                "mca-ctrl",
                "mca ctrl",
                "subject swap",
                "subject driven",
                "masactrl",
                "mutual self-attention",
                "character swap",
                "flux subject swap",
                "qwen-image subject swap",
                "z-image subject swap",
                "face swap",
                "object replacement",
                "insert subject",
                "inpaint with reference",
                "reference image",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that the images were inverted or recorded with."),
                io.Latent.Input(
                    "subject",
                    tooltip="The image with the subject (reference image), from Invert Image or recorded.",
                ),
                io.Mask.Input("subject_mask", tooltip="Mask of the subject in its own image (M_S)."),
                io.Latent.Input(
                    "condition",
                    optional=True,
                    tooltip=(
                        "The image to edit, from Invert Image or recorded, in the same size. Leave it out to "
                        "generate a new image: the running image then serves as its own background."
                    ),
                ),
                io.Mask.Input(
                    "edit_mask",
                    optional=True,
                    tooltip=(
                        "Where the subject goes (M_C): the object to replace, or an empty place. Leave it out to "
                        "take it from a Token Attention Map on the MODEL."
                    ),
                ),
                io.DynamicCombo.Input(
                    "preset",
                    options=[*(io.DynamicCombo.Option(name, []) for name in PRESETS), custom],
                    tooltip=(
                        "When SAGI (injects attention outputs) and SALQ (reads keys and values) act. notebook: as "
                        "in the released notebooks; paper: as printed; custom: your own numbers."
                    ),
                ),
                io.Int.Input(
                    "dilation",
                    default=5,
                    min=0,
                    max=256,
                    tooltip=(
                        "Grows edit_mask, in pixels of the image (at 512 px: 5 in the authors' code, 1 in the paper). "
                        "0 for a mask that is grown already, as Subject Localize's edit_mask."
                    ),
                ),
                io.Boolean.Input(
                    "background_lock",
                    default=True,
                    tooltip=(
                        "Keeps everything outside the edited area exactly as in the image to edit. Needs condition "
                        "and edit_mask; without them it does nothing."
                    ),
                ),
                io.Boolean.Input(
                    "fresh_noise",
                    default=False,
                    tooltip=(
                        "Starts the edited area from the sampler's noise (its seed then matters) instead of the "
                        "inverted noise. For inserting into an empty place of an inverted image, whose own noise "
                        "leads back to the empty place. Needs condition and edit_mask."
                    ),
                ),
                io.Combo.Input(
                    "order",
                    options=[FORWARD, REVERSE],
                    default=FORWARD,
                    advanced=True,
                    tooltip="SALQ first is the paper's ablation: the two swap their parts of the schedule.",
                ),
                io.Float.Input(
                    "map_share",
                    default=0.3,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip=(
                        "Without edit_mask: the fraction of the image, where the words act most, that belongs to "
                        "the subject alone (authors' code: 0.3)."
                    ),
                ),
                io.Combo.Input(
                    "map_form",
                    options=["soft", "hard"],
                    default="soft",
                    advanced=True,
                    tooltip=(
                        "Without edit_mask: outside that fraction the subject acts as strongly as the attention "
                        "map says (soft), or not at all (hard)."
                    ),
                ),
                io.Conditioning.Input(
                    "subject_positive",
                    optional=True,
                    tooltip=(
                        "Reads the subject's image with a prompt of its own, as the paper does, instead of the "
                        "prompt of its inversion. Costs a second evaluation per step."
                    ),
                ),
                io.Conditioning.Input("condition_positive", optional=True, tooltip="The same for the image to edit."),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="Negative prompt for these two (paper: the sampler's)."
                ),
                io.String.Input(
                    "shift",
                    default=AUTO,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Transformers only (not SD3): moves the subject's keys onto the edited area, since a query "
                        "looks first at its own place in the other image. auto: from the centre of subject_mask to "
                        "that of the edited area. none: not at all. Or pixels to the right and down, such as 64, -32."
                    ),
                ),
                exact_input(),
            ],
            outputs=[
                io.Model.Output(
                    "collaborating_model",
                    display_name="MODEL",
                    tooltip=(
                        "The model that attends to both images. Sample it with the sampler settings of their "
                        "inversions or recordings."
                    ),
                ),
                io.Latent.Output(
                    "start_latent",
                    display_name="LATENT",
                    tooltip=(
                        "The start latent of the image to edit: any seed will do, unless fresh_noise is on or the "
                        "sampler is an ancestral or SDE one. Without an image to edit: an empty latent, and the seed "
                        "decides the image."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        subject: dict[str, Any],
        subject_mask: torch.Tensor,
        preset: dict[str, Any],
        dilation: int,
        background_lock: bool,
        fresh_noise: bool,
        order: str,
        map_share: float,
        map_form: str,
        condition: dict[str, Any] | None = None,
        edit_mask: torch.Tensor | None = None,
        subject_positive: list | None = None,
        condition_positive: list | None = None,
        negative: list | None = None,
        shift: str = AUTO,
        exact: bool = False,
    ) -> io.NodeOutput:
        refuse_nan(
            cls.NAME, map_share=map_share, **{name: value for name, value in preset.items() if isinstance(value, float)}
        )
        source = cls.stream("subject", subject)
        kept = cls.stream("condition", condition) if condition else None
        check_together(
            cls.NAME,
            [stream for stream in (source, kept) if stream],
            model,
            names=["the subject", "the condition"],
        )
        subject_mask = cls.mask("subject_mask", subject_mask, source.run)
        if not subject_mask.any():
            raise ValueError(
                f"{cls.NAME}: subject_mask is empty: nothing of the subject's image is selected. Paint the subject,"
                " or lower the thresholds of what finds it."
            )
        painted = None
        if edit_mask is not None:
            painted = MaskArea(grid_masks.dilate(cls.mask("edit_mask", edit_mask, source.run), dilation))
            if not painted.mask.any():
                logging.warning(
                    "%s: edit_mask is empty, so that the image to edit comes back unchanged. Paint what to replace.",
                    cls.NAME,
                )
        if painted is None and not installed_in(model).maps:
            raise ValueError(
                f"{cls.NAME}: there is no edit_mask, and no Token Attention Map on the MODEL to take it from. Connect"
                " one of them."
            )
        area = painted or WordsArea(map_share, map_form == "soft")
        moved = shift_of(cls.NAME, model, shift, source.run.picture_size)
        sagi, salq = cls.windows(model, preset, order)
        feeding = (
            cls.prompted(model, source, subject_positive, negative),
            kept and cls.prompted(model, kept, condition_positive, negative),
        )
        fresh = painted.mask if kept and painted and fresh_noise else None
        recipes: list[Recipe] = []
        for recipe, window in ((SAGI, sagi), (SALQ, salq)):
            if not window.is_empty:
                recipes.append(recipe(window, *feeding, subject_mask, area, fresh, moved, exact))
        if recipes and background_lock and kept and painted:
            recipes.append(BackgroundLock(kept, painted.mask))
        run, row = source
        latent = start_latent([kept]) if kept else {"samples": torch.zeros_like(run.latent_image[row : row + 1])}
        return io.NodeOutput(install(model, *recipes), latent)

    @classmethod
    def stream(cls, name: str, latent: dict[str, Any]) -> Stream:
        streams = streams_of(f"{cls.NAME}: {name}", [latent])
        if len(streams) > 1:
            raise ValueError(
                f"{cls.NAME}: {name} is a batch of {len(streams)}, and one image was expected. Pick one with Latent"
                " From Batch."
            )
        return streams[0]

    @classmethod
    def prompted(cls, model: ModelPatcher, stream: Stream, positive: list | None, negative: list | None) -> Stream:
        """The stream with prompts of its own, where they are given."""
        if positive is None:
            return stream
        return with_prompt(stream, model, positive=positive, **({"negative": negative} if negative else {}))

    @classmethod
    def mask(cls, name: str, mask: torch.Tensor, run: Run) -> torch.Tensor:
        """A MASK input as bool at the size of a run's pictures."""
        mask = mask_for_run(cls.NAME, name, mask, run)
        if len(mask) > 1:
            raise ValueError(
                f"{cls.NAME}: {name} is a batch of {len(mask)}, and one mask was expected. Join them "
                "with MaskComposite, or connect one."
            )
        return grid_masks.at_size(mask[0], run.picture_size)

    @classmethod
    def windows(cls, model: ModelPatcher, preset: dict[str, Any], order: str) -> tuple[Window, Window]:
        """The windows of SAGI and SALQ."""
        name = preset["preset"]
        chosen = PRESETS.get(name) or Preset(
            (preset["sagi_start"], preset["sagi_end"]),
            (preset["salq_start"], preset["salq_end"]),
            preset["salq_sites"],
        )
        sagi, salq = (chosen.sagi, chosen.salq) if order == FORWARD else (chosen.salq, chosen.sagi)
        sites = []
        for part, text in (("sagi", preset.get("sagi_sites", "all")), ("salq", chosen.salq_sites)):
            sites.append(parse_sites(cls.NAME, model, text, f"{part}_sites"))
        if max(sagi[0], salq[0]) < min(sagi[1], salq[1]) and set(sites[0]) & set(sites[1]):
            raise ValueError(
                f"{cls.NAME}: SAGI ({sagi[0]:g} to {sagi[1]:g}) and SALQ ({salq[0]:g} to {salq[1]:g}) overlap in the"
                " same blocks. Let one begin where the other ends: each replaces the whole attention of a block."
            )
        return Window(*sagi, sites[0]), Window(*salq, sites[1])


NODES = [CollaborativeAttention]
