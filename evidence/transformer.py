"""Collage, subject swap, insertion, generation and personal subject on the demo transformer: does what the UNet shows
hold there, does a shift of the subject's keys help, and which blocks read the subject best? The photomontage on it is
in photomontage.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..demo import detector, metrics
from ..kernels import grid_masks
from ..nodes.layout_retouch import AdaptiveMaskBlend
from ..workshop.random_models import demo_transformer
from . import collage, layout_retouch, mca_ctrl, measurements
from .layout_retouch import BASE, BLEND, OURS, PLAIN, SOURCES

COLLAGES, LEVELS, SWAPS, ADDITIONS, GENERATIONS, PERSONAL = 40, 24, 32, 32, 32, 24  # samples
SETTINGS = ("euler", "simple", 16)  # sampler, scheduler, steps
ITERATIONS = 3  # of each step of an inversion: 44.7 dB instead of 19 on a trained flow
IMG2IMG, BIASED = collage.PLAIN, collage.BIASED
SWAP, UNSHIFTED, ALONE = "MCA-Ctrl", "without the shift", "the prompt alone"
LATE, LATE_UNSHIFTED = "SALQ in the last half", "the same without the shift"
SHIFTED = "+ the reference's keys shifted"


# ---------------------------------------------------------------- collage


class Layers(collage.Example):
    """A collage of the objects of a scene, each a layer where it stands there."""

    SETTINGS = SETTINGS

    @staticmethod
    def models() -> tuple:
        return demo_transformer()


class Collage(Layers):
    """One of two or three objects."""

    def __init__(self, number: int) -> None:
        super().__init__(number, 2 + number % 2)

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


# ---------------------------------------------------------------- subject swap, insertion and generation


class OnTransformer:
    """What differs in a mca_ctrl.Pair."""

    SETTINGS, ITERATIONS, SITES = SETTINGS, ITERATIONS, "first third"

    @staticmethod
    def models() -> tuple:
        return demo_transformer()


class Pair(OnTransformer, mca_ctrl.Pair):
    pass


class Apart(OnTransformer, mca_ctrl.Apart):
    pass


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


def swaps_by_sites(sites: Sequence[str], number: int) -> dict[str, dict]:
    """{sites: figures} of one pair: SALQ in each part of the blocks."""
    pair, windows = Pair(number), {"sagi": mca_ctrl.UNIFORM.sagi, "salq": mca_ctrl.UNIFORM.salq}
    return {part: likeness(pair, pair.edited(**windows, sites=part)) for part in sites}


def generations_by_sites(sites: Sequence[str], number: int) -> dict[str, dict]:
    """{sites: figures} of one new picture: SALQ in each part of the blocks, by the soft map."""
    pair, everywhere = Pair(number), torch.ones(mca_ctrl.SIZE, mca_ctrl.SIZE)
    pictures = {part: pair.generated("soft", sites=part) for part in sites}
    return {
        part: mca_ctrl.likeness(pair, picture, metrics.look(collage.judge(), picture)[2], everywhere)
        for part, picture in pictures.items()
    }


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


def retouches_by_sites(sites: Sequence[str], number: int) -> dict[str, dict]:
    """{sites: figures} of one prompt: the blocks that read the reference."""
    example, judge = Personal(number), detector.load()
    plain, layout, reference = example.blended(1.0), example.blended(0.1), example.reference()
    mask = AdaptiveMaskBlend.execute(layout_retouch.LEAST, 0.01, "cross", layout).args[0]
    given = {"mask": mask, "reference_mask": example.inside[None].float()}
    shown = {"its layout": layout}
    shown |= {part: example.retouched(layout, reference, sites=part, **given) for part in sites}
    return {
        name: layout_retouch.figures(
            example, judge, example.decode(latent), example.decode(plain), example.decode(layout), mask[0]
        )
        for name, latent in shown.items()
    }


# ---------------------------------------------------------------- which blocks


class Blocks(NamedTuple):
    """A comparison of the parts of the blocks that read a subject. measure: (parts, sample) -> {part: figures}.
    default: the part that the node reads it in. figures: {key: title}.
    """

    name: str
    measure: Callable[[Sequence[str], int], dict[str, dict]]
    default: str
    figures: dict[str, str]

    def study(
        self, parts: Sequence[str], samples: range, folder: Path, address: str | None = None
    ) -> measurements.Study:
        parts = list(dict.fromkeys([self.default, *parts]))
        name = f"transformer-presets-{self.name}-{'-'.join(part.replace(' ', '') for part in parts)}"
        return measurements.Study(name, folder, "dit").run(samples, partial(self.measure, parts), address)


BLOCKS = {
    "swap": Blocks(
        "swap",
        swaps_by_sites,
        Pair.SITES,
        {"present": "right object", "colour": "colour distance", "psnr": "background"},
    ),
    "generate": Blocks("generate", generations_by_sites, "all", {"present": "right object", "style": "style error"}),
    "retouch": Blocks(
        "retouch",
        retouches_by_sites,
        Personal.SITES,
        {name: layout_retouch.COLUMNS[name] for name in ("colour", "subject", "prompt", "around", "layout")},
    ),
}
CONFIRMED = range(100, 140)  # none of those that a default was chosen on
GENERATED_TWICE = 16  # of these


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

    def size(count: int) -> range:
        return range(max(2, count // 10) if options.quick else count)

    yield of_collages(options, size(COLLAGES))
    yield of_levels(options, size(LEVELS))
    yield of_swaps(options, size(SWAPS))
    yield of_additions(options, size(ADDITIONS))
    yield of_generations(options, size(GENERATIONS))
    yield of_subject_blocks(options, CONFIRMED[: len(size(len(CONFIRMED)))])
    yield of_personal(options, size(PERSONAL))
    yield of_reference_blocks(options, CONFIRMED[: len(size(len(CONFIRMED)))])


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


def of_levels(options: argparse.Namespace, samples: range) -> measurements.Section:
    name = "transformer-noise"
    found = measurements.Study(name, options.folder, "dit").run(
        samples, partial(collage.noise_levels, kind=Layers), options.address
    )
    return measurements.Section(
        "Collage Diffusion, on the transformer: denoise per layer", collage.traded(found, name, Layers)
    )


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


def of_additions(options: argparse.Namespace, samples: range) -> measurements.Section:
    found = measurements.Study("transformer-addition", options.folder, "dit").run(
        samples, partial(mca_ctrl.measure_addition, kind=Apart), options.address
    )
    text = (
        f"{len(samples)} subjects inserted into an empty place of the other picture, at the position that they have in"
        " their own, with the notebook's windows and SALQ in the first third of the blocks. Rows and columns as for"
        " the UNet."
    )
    return measurements.Section(
        "MCA-Ctrl, on the transformer: inserting a subject", "\n\n".join([text, mca_ctrl.added(found)])
    )


def of_generations(options: argparse.Namespace, samples: range) -> measurements.Section:
    name = "transformer-generation"
    found = measurements.Study(name, options.folder, "dit").run(
        samples, partial(mca_ctrl.measure_generation, kind=Pair), options.address
    )
    text = (
        f"{len(samples)} new pictures of the subject on another background, from its words; the edited area is taken"
        " during sampling from the map of those words in the middle half of the blocks, and the subject's keys are"
        " shifted onto it. SALQ in all blocks, and in the first third where the place is given. Rows and columns as"
        " for the UNet."
    )
    return measurements.Section(
        "MCA-Ctrl, on the transformer: generating with a subject",
        "\n\n".join([text, mca_ctrl.generated(found, name, Pair)]),
    )


def of_subject_blocks(options: argparse.Namespace, samples: range) -> measurements.Section:
    blocks = BLOCKS["swap"]
    found = blocks.study(["last half", "all"], samples, options.folder, options.address)
    claims = [
        (
            f"with SALQ in the first third, the right object is present more often than in {other}",
            blocks.default,
            part,
            "present",
            1,
        )
        for part, other in (("last half", "the last half"), ("all", "all blocks"))
    ]
    claims.append(
        (
            "with SALQ in the first third, the subject's colours are closer than in the last half",
            blocks.default,
            "last half",
            "colour",
            -1,
        )
    )
    text = (
        "By default, SALQ reads the subject in the first third of the blocks, which was chosen on 12 pairs of scenes."
        f" These are {len(samples)} other pairs, swapped as above."
    )
    new = BLOCKS["generate"]
    generated = new.study(["first third"], samples[:GENERATED_TWICE], options.folder, options.address)
    claim = (
        "generating by the soft map: with SALQ in the first third, the right object is present more often than in all"
        " blocks",
        "first third",
        new.default,
        "present",
        1,
    )
    parts = [
        text,
        found.table(**blocks.figures),
        claims_of(found, claims),
        f"A generation reads the subject in all blocks. {len(generated.samples)} new pictures by the soft map:",
        generated.table(**new.figures),
        claims_of(generated, [claim]),
    ]
    return measurements.Section("MCA-Ctrl, on the transformer: the blocks that read the subject", "\n\n".join(parts))


def of_reference_blocks(options: argparse.Namespace, samples: range) -> measurements.Section:
    blocks = BLOCKS["retouch"]
    others = ("first third", "middle half", "all")
    found = blocks.study(others, samples, options.folder, options.address)
    claims = [
        (
            f"with the reference in the last half, there is more likeness than in {other}",
            blocks.default,
            part,
            "colour",
            -1,
        )
        for part, other in zip(others, ("the first third", "the middle half", "all blocks"))
    ]
    claims.append(
        (
            "with the reference in the last half, the layout is preserved better than in all blocks",
            blocks.default,
            "all",
            "layout",
            1,
        )
    )
    text = (
        "By default, the reference is read in the last half of the blocks, which was compared with the others on 40"
        f" scenes. These are {len(samples)} other scenes, with the mask and the shift, as above."
    )
    return measurements.Section(
        "Layout-and-Retouch, on the transformer: the blocks that read the reference",
        "\n\n".join([text, found.table(**blocks.figures), claims_of(found, claims)]),
    )


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
