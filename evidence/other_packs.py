"""What two methods cost beside what the field does for the same wish."""

import argparse
from collections.abc import Iterator

from . import measurements
from .benchmarks import bench, other_packs
from .cost import MODELS, relative

ROUNDS = 3


def beside_plain(name: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{case: figures} of a model."""
    side, steps, _ = MODELS[name]
    on = bench.Bench(name, side, steps)
    return relative(on, other_packs.cases(on, options.packs), ROUNDS)


def sections(options: argparse.Namespace) -> Iterator[measurements.Section]:
    options.packs = options.packs or other_packs.default_folder()
    models = ["demo"] if options.quick else ["demo", "sd15"]
    found = measurements.Study("cost-other-packs", options.folder).run(models, lambda name: beside_plain(name, options))
    sizes = ", ".join(f"{name}: latent {MODELS[name][0]}x{MODELS[name][0]}" for name in models)
    cases = list(found.samples[models[0]])
    yield measurements.Section(
        "Cost: beside what else the field does",
        "\n\n".join(
            [
                "Time relative to plain sampling of one image in the same run, median of"
                f" {ROUNDS} rounds (CPU, fp32, processor time; {sizes}; SD1.5 at full size with random weights)."
                " *areas*: ComfyUI's own. *attention couple*"
                " and *style aligned*: the packs attention-couple-ComfyUI (laksjdjf) and style_aligned_comfy"
                " (brianfitzgerald), as they are. Attention couple needs an embedding for every region, and its cost"
                " grows with them; a style-aligned batch makes its images at once, where a composite is one image of"
                " others that were made before.",
                measurements.markdown(
                    ["", *models],
                    [[case, *(f"{found.samples[m][case]['ratio']:.2f}" for m in models)] for case in cases],
                ),
            ]
        ),
    )
