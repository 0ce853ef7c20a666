"""Collage, subject swap and personal subject on the demo transformer: does what the UNet shows hold there, and does a
shift of the subject's keys help? The photomontage on it is in photomontage.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from ..demo import detector, metrics
from ..kernels import grid_masks
from ..nodes.layout_retouch import AdaptiveMaskBlend
from ..workshop.random_models import demo_transformer
from . import collage, layout_retouch, mca_ctrl, measurements
from .layout_retouch import BASE, BLEND, OURS, PLAIN, SOURCES

COLLAGES, SWAPS, PERSONAL = 40, 32, 24  # samples
SETTINGS = ("euler", "simple", 16)  # sampler, scheduler, steps
ITERATIONS = 3  # of each step of an inversion: 44.7 dB instead of 19 on a trained flow
IMG2IMG, BIASED = collage.PLAIN, collage.BIASED
SWAP, UNSHIFTED, ALONE = "MCA-Ctrl", "without the shift", "the prompt alone"
LATE, LATE_UNSHIFTED = "SALQ in the last half", "the same without the shift"
SHIFTED = "+ the reference's keys shifted"


# ---------------------------------------------------------------- collage


class Collage(collage.Example):
    """A collage of the two or three objects of a scene, each a layer where it stands there."""

    SETTINGS = SETTINGS

    def __init__(self, number: int) -> None:
        super().__init__(number, 2 + number % 2)

    @staticmethod
    def models() -> tuple:
        return demo_transformer()

    def found(self, made: Any, picture: torch.Tensor) -> dict[str, float]:
        """Shares of the layers whose object the reader finds where the layer is: in its colour, and in its shape
        too.
        """
        _, _, objects = metrics.look(collage.judge(), picture)
        placed = shaped = 0
        for slot, mask in enumerate(made.masks):
            colour, shape = self.scene.colour[0, slot], self.scene.shape[0, slot]
            right = [one for one in objects if one.colour == colour and metrics.placed(one, mask)]
            placed += bool(right)
            shaped += any(one.shape == shape for one in right)
        return {"placed": placed / self.count, "shaped": shaped / self.count}


def collages(number: int) -> dict[str, tuple]:
    """{variant: (Collage, picture)}."""
    example = Collage(number)
    made, image = example.collage()
    found = {collage.PASTED: (made, image[0])}
    for name in (IMG2IMG, BIASED):
        found[name] = made, example.sampled(made, image, bias=name == BIASED)[1]
    return found


def measure_collage(number: int) -> dict[str, dict]:
    return {name: Collage(number).found(*variant) for name, variant in collages(number).items()}


# ---------------------------------------------------------------- subject swap


class Pair(mca_ctrl.Pair):
    SETTINGS, ITERATIONS, SITES = SETTINGS, ITERATIONS, "first third"

    @staticmethod
    def models() -> tuple:
        return demo_transformer()


def swaps(pair: Pair) -> dict[str, torch.Tensor]:
    """{variant: picture}."""
    windows = {"sagi": mca_ctrl.UNIFORM.sagi, "salq": mca_ctrl.UNIFORM.salq}
    late = {**windows, "sites": "last half"}
    return {
        SWAP: pair.edited(**windows),
        UNSHIFTED: pair.edited(**windows, shift="none"),
        LATE: pair.edited(**late),
        LATE_UNSHIFTED: pair.edited(**late, shift="none"),
        ALONE: pair.decode(pair.sampled(pair.model, {"samples": pair.noise["samples"][1:]})),
    }


def likeness(pair: Pair, picture: torch.Tensor) -> dict[str, float | None]:
    seen = metrics.look(collage.judge(), picture)[2]
    inside = grid_masks.dilate(pair.object_mask, mca_ctrl.DILATION)
    found = mca_ctrl.likeness(pair, picture, seen, pair.object_mask)
    return {**found, "psnr": metrics.background_psnr(picture, pair.pictures[1], inside)}


def measure_swap(number: int) -> dict[str, dict]:
    pair = Pair(number)
    return {name: likeness(pair, picture) for name, picture in swaps(pair).items()}


# ---------------------------------------------------------------- personal subject


class Personal(layout_retouch.Example):
    SETTINGS, ITERATIONS, MAP, SITES = SETTINGS, ITERATIONS, "middle half", "last half"

    @staticmethod
    def models() -> tuple:
        return demo_transformer()


def retouches(example: Personal) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """({variant: picture}, mask of the subject in the layout [H, W])."""
    latents = {name: example.blended(switch) for name, switch in ((PLAIN, 1.0), (BASE, 0.0), (BLEND, 0.1))}
    reference, layout = example.reference(), latents[BLEND]
    mask = AdaptiveMaskBlend.execute(layout_retouch.LEAST, 0.01, "cross", layout).args[0]
    inside = example.inside[None].float()
    latents[SOURCES] = example.retouched(layout, reference)
    latents[OURS] = example.retouched(layout, reference, mask=mask)
    latents[SHIFTED] = example.retouched(layout, reference, mask=mask, reference_mask=inside)
    return {name: example.decode(latent) for name, latent in latents.items()}, mask[0]


def measure_personal(number: int) -> dict[str, dict]:
    example, judge = Personal(number), detector.load()
    pictures, mask = retouches(example)
    return {
        name: layout_retouch.figures(example, judge, picture, pictures[PLAIN], pictures[BLEND], mask)
        for name, picture in pictures.items()
    }


# ---------------------------------------------------------------- the page


def claims_of(study: measurements.Study, claims: Sequence[tuple]) -> str:
    """A table of claims: (what, first variant, second, figure, sign)."""
    rows = [
        measurements.claim(what, study.difference(first, second, figure), sign, "(our claim)")
        for what, first, second, figure, sign in claims
    ]
    return measurements.markdown(measurements.CLAIMS, rows)


def sections(options: argparse.Namespace) -> Any:
    if "dit" not in measurements.models(options):
        return
    if "dit" not in measurements.models(options):
        return

    def size(count: int) -> range:
        return range(max(2, count // 10) if options.quick else count)

    yield of_collages(options, size(COLLAGES))
    yield of_swaps(options, size(SWAPS))
    yield of_personal(options, size(PERSONAL))


def of_collages(options: argparse.Namespace, samples: range) -> measurements.Section:
    found = measurements.Study("transformer-collage", options.folder, "dit").run(
        samples, measure_collage, options.address
    )
    claims = (
        ("regional prompting (CA) puts more objects in place than img2img", BIASED, IMG2IMG, "placed", 1),
        ("regional prompting (CA) puts more objects in place and shape than img2img", BIASED, IMG2IMG, "shaped", 1),
    )
    shown = [[picture for _, picture in collages(number).values()] for number in samples[:4]]
    text = (
        f"{len(samples)} collages of the two or three objects of a scene on a grey canvas of 128x128 pixels, denoise"
        f" {collage.FREE} everywhere; the bias is a mask on the rows of the image tokens and the columns of the text"
        " tokens in the joint attention. Columns as for the UNet."
    )
    parts = [
        text,
        found.table(placed="in place", shaped="in place and shape"),
        claims_of(found, claims),
        measurements.grid("transformer-collage", shown, ["layers", "GH", "GH+CA"]),
    ]
    return measurements.Section("Collage Diffusion, on the transformer", "\n\n".join(parts))


def of_swaps(options: argparse.Namespace, samples: range) -> measurements.Section:
    found = measurements.Study("transformer-swap", options.folder, "dit").run(samples, measure_swap, options.address)
    claims = (
        ("the right object is present more often than with the prompt alone", SWAP, ALONE, "present", 1),
        ("the subject's colours are closer than with the prompt alone", SWAP, ALONE, "colour", -1),
        ("with the shift, the right object is present more often", SWAP, UNSHIFTED, "present", 1),
        ("with the shift, the subject's colours are closer", SWAP, UNSHIFTED, "colour", -1),
        (
            "SALQ in the last half: with the shift, the right object is present more often",
            LATE,
            LATE_UNSHIFTED,
            "present",
            1,
        ),
        ("SALQ in the last half: with the shift, the subject's colours are closer", LATE, LATE_UNSHIFTED, "colour", -1),
        (
            "with SALQ in the first third, the right object is present more often than in the last half",
            SWAP,
            LATE,
            "present",
            1,
        ),
    )
    pairs = [Pair(number) for number in samples[:4]]
    pictures = [swaps(pair) for pair in pairs]
    text = (
        f"{len(samples)} pairs of scenes as for the UNet, inverted over {SETTINGS[2]} steps with {ITERATIONS}"
        " iterations each, with the paper's uniform windows and SALQ in the first third of the blocks. *Shift*: the"
        " positions (RoPE) of the subject's keys are moved from the centre of the one mask to that of the other, as"
        " if the subject stood on the edited area. Columns as for the UNet."
    )
    parts = [
        text,
        found.table(**mca_ctrl.FIGURES, psnr="background"),
        claims_of(found, claims),
        measurements.grid(
            "transformer-swap",
            [[*pair.pictures, *row.values()] for pair, row in zip(pairs, pictures)],
            ["subject", "picture", *pictures[0]],
        ),
    ]
    return measurements.Section("MCA-Ctrl, on the transformer", "\n\n".join(parts))


def of_personal(options: argparse.Namespace, samples: range) -> measurements.Section:
    found = measurements.Study("transformer-retouch", options.folder, "dit").run(
        samples, measure_personal, options.address
    )
    names = [PLAIN, BASE, BLEND, SOURCES, OURS, SHIFTED]
    claims = (
        ("step blending brings the layout closer to the base model's", BLEND, BASE, "layout", 1),
        ("the mask blend preserves what is around the subject", OURS, SOURCES, "around", 1),
        ("the full method has more likeness than its layout", SHIFTED, BLEND, "colour", -1),
        ("with the reference's keys shifted, there is more likeness", SHIFTED, OURS, "colour", -1),
        ("with the reference's keys shifted, the prompt is followed better", SHIFTED, OURS, "prompt", 1),
    )
    shown = []
    for number in samples[:4]:
        example = Personal(number)
        pictures, _ = retouches(example)
        shown.append([example.photo[0], *(pictures[name] for name in names)])
    text = (
        f"{len(samples)} prompts of the subject, another object and a place, with the transformer's own LoRA;"
        f" {SETTINGS[2]} steps, with the paper's fractions of the schedule, and the reference in the last half of the"
        " blocks. Columns as for the UNet."
    )
    parts = [
        text,
        layout_retouch.table(found, names),
        claims_of(found, claims),
        measurements.grid("transformer-retouch", shown, ["photo", *names]),
    ]
    return measurements.Section("Layout-and-Retouch, on the transformer", "\n\n".join(parts))
