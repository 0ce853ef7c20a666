"""Tests of why a claim was not found: the same measurement where the supposed cause is taken away."""

import argparse
from collections.abc import Iterator, Sequence

import comfy.sd
import comfy.utils
import torch

from ..demo import detector, metrics, scenes, supported_model
from ..kernels import grid_masks
from . import layout_retouch, mca_ctrl, measurements, perceptual

OPEN, WEAK = 20, 24  # samples
STRENGTHS = {"half": 0.5, "none": 0.0}  # of the subject's LoRA


class OpenWords(mca_ctrl.Pair):
    """A pair whose prompt names the shape and the place alone: the subject's look can come from its image only."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        place = list(scenes.BACKGROUNDS.values())[self.drawn.background[1]]
        self.prompt = f"a {scenes.SHAPES[int(self.drawn.shape[0, 0])]} {place}"


ALONE = "neither: the prompt alone"


def open_words(number: int) -> dict[str, dict]:
    pair, reading = OpenWords(number), detector.load()
    windows = {"sagi": mca_ctrl.UNIFORM.sagi, "salq": mca_ctrl.UNIFORM.salq}
    pictures = {
        mca_ctrl.OURS: pair.edited(**windows),
        "without SALQ": pair.edited(**windows | {"salq": mca_ctrl.NEVER}),
        "without SAGI": pair.edited(**windows | {"sagi": mca_ctrl.NEVER}),
        mca_ctrl.MASA: pair.mutual(),
        ALONE: pair.decode(pair.sampled(pair.model, {"samples": pair.noise["samples"][1:]})),
    }
    outside = 1 - grid_masks.dilate(pair.object_mask, mca_ctrl.DILATION).float()
    found = {}
    for name, picture in pictures.items():
        found[name] = mca_ctrl.likeness(pair, picture, metrics.look(reading, picture)[2], pair.object_mask)
        found[name] |= {
            "psnr": metrics.masked_psnr(picture, pair.pictures[1], outside),
            "around": perceptual.embedding_cosine(picture, pair.pictures[1], outside, outside),
        }
    return found


OPEN_CLAIMS = (  # what, first, second, figure, sign, the paper's numbers
    ("the subject's colours are closer than with the prompt alone", mca_ctrl.OURS, ALONE, "colour", -1, "(our test)"),
    (
        "it looks more like the subject than with the prompt alone",
        mca_ctrl.OURS,
        ALONE,
        "subject",
        1,
        "DINOsub .633 / .510 (DiffEdit)",
    ),
    (
        "the subject's colours are closer than with mutual self-attention",
        mca_ctrl.OURS,
        mca_ctrl.MASA,
        "colour",
        -1,
        "(our test)",
    ),
    (
        "without SALQ, the subject's colours are further off",
        "without SALQ",
        mca_ctrl.OURS,
        "colour",
        1,
        "DINOsub .424 / .633",
    ),
    (
        "without SALQ, it looks less like the subject",
        "without SALQ",
        mca_ctrl.OURS,
        "subject",
        -1,
        "DINOsub .424 / .633",
    ),
    (
        "without SALQ, the background looks more like the original",
        "without SALQ",
        mca_ctrl.OURS,
        "around",
        1,
        "DINOback .749 / .668",
    ),
    (
        "without SAGI, the subject's colours are further off",
        "without SAGI",
        mca_ctrl.OURS,
        "colour",
        1,
        "DINOsub .590 / .633",
    ),
    (
        "without SAGI, it looks less like the subject",
        "without SAGI",
        mca_ctrl.OURS,
        "subject",
        -1,
        "DINOsub .590 / .633",
    ),
)


class Personal(layout_retouch.Example):
    """A sample whose personalised model has the subject's LoRA at a part of its strength."""

    def __init__(self, number: int, strength: float) -> None:
        super().__init__(number)
        lora = comfy.utils.load_torch_file(
            str(supported_model.WEIGHTS.with_name("demo-subject-lora.safetensors")), safe_load=True
        )
        self.personal, _ = comfy.sd.load_lora_for_models(self.model, None, lora, strength, 0.0)


def personal(number: int) -> dict[str, dict]:
    reading, found = detector.load(), {}
    for name, strength in STRENGTHS.items():
        example = Personal(number, strength)
        alone = example.blended(0.0)
        swapped = example.retouched(alone, example.reference(), layout_end=0.0)
        for what, latent in (("alone", alone), ("reference swap", swapped)):
            picture = example.decode(latent)
            found[f"{what}, LoRA: {name}"] = layout_retouch.figures(
                example, reading, picture, picture, picture, torch.zeros(layout_retouch.SIZE, layout_retouch.SIZE)
            )
    return found


def sections(options: argparse.Namespace) -> Iterator[measurements.Section]:
    if "unet" not in measurements.models(options):
        return
    tenth = 10 if options.quick else 1
    found = measurements.Study("collaborate-open", options.folder).run(
        range(OPEN // tenth), open_words, options.address
    )
    yield measurements.Section(
        "MCA-Ctrl: prompts that leave the appearance open",
        "\n\n".join(
            [
                (
                    f"{len(found.samples)} of the pairs above, with a prompt that names only the subject's shape and"
                    " the place. The demo UNet takes colour and texture from the words; where the prompt does not"
                    " name them, they can only come from the subject's image. *subject*, *surroundings*: embedding"
                    " cosines of the subject with its own image (both cut out, on grey), and of what is outside the"
                    " edit mask with the original picture."
                ),
                found.table(
                    colour="colour distance",
                    texture="texture similarity",
                    style="style error",
                    subject="subject",
                    psnr="background",
                    around="surroundings",
                ),
                _claims(found, OPEN_CLAIMS),
            ]
        ),
    )

    found = measurements.Study("retouch-weak", options.folder).run(
        range(max(2, WEAK // tenth)), personal, options.address
    )
    yield measurements.Section(
        "Layout-and-Retouch: with a weaker personalisation",
        "\n\n".join(
            [
                (
                    f"{len(found.samples)} of the prompts above, with the subject's LoRA at half strength and without"
                    " it. The paper's own gain shrinks as the personalisation improves: I-DINO .527 to .600 with"
                    " textual inversion, .658 to .659 with Custom Diffusion."
                ),
                found.table(
                    colour="colour distance to the photo",
                    texture="texture similarity",
                    subject="embedding cosine",
                    prompt="prompt",
                ),
                _claims(
                    found,
                    [
                        (
                            f"the reference swap alone gains likeness (LoRA: {name})",
                            f"reference swap, LoRA: {name}",
                            f"alone, LoRA: {name}",
                            "colour",
                            -1,
                            "I-DINO .707 / .637",
                        )
                        for name in STRENGTHS
                    ],
                ),
            ]
        ),
    )


def _claims(found: measurements.Study, claims: Sequence[tuple]) -> str:
    return measurements.markdown(
        measurements.CLAIMS,
        [
            measurements.claim(what, found.difference(a, b, figure), sign, paper)
            for what, a, b, figure, sign, paper in claims
        ],
    )
