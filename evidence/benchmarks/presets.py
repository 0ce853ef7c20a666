"""Which blocks and steps of the demo transformer the subject is best read in: the choice of the nodes' presets.

python dev.py benchmark presets --method swap retouch                            chooses, on the first scenes
python dev.py benchmark presets --method swap --first 100 --sites "first third"  confirms, on others

For each part of the blocks that reads the subject: by Collaborative Attention (swap) the share of swaps in which the
right object stands in the edited area, its colour distance, and the background's PSNR; by Multi Source Swap (retouch)
the subject's colour distance to its photo, how well the prompt is followed, and what stays around the subject. windows:
the first in other parts of the schedule. Below each table: paired differences with what the node does by default.
"""

import argparse
import itertools
from functools import partial

from torch import inference_mode

from ...demo import detector
from ...nodes.layout_retouch import AdaptiveMaskBlend
from ...patching.models.dit import PRESETS
from .. import layout_retouch, measurements
from ..transformer import Pair, Personal, likeness

SWAPPED = {"present": "right object", "colour": "colour distance", "psnr": "background"}
RETOUCHED = {
    "colour": "colour distance",
    "subject": "embedding cosine",
    "prompt": "prompt",
    "around": "PSNR around the subject",
    "layout": "layout like the base model's",
}
LAYOUT = "its layout"
SAGI = (0.0, 0.1, 0.2, 0.4)  # where SAGI ends and SALQ begins, of the schedule
SALQ = (0.96, 0.6)  # where SALQ ends
WINDOW = 0.4, 0.96  # of the two, in which the blocks are compared: the paper's


def window(sagi: float, salq: float) -> str:
    return f"SAGI to {sagi:g}, SALQ to {salq:g}"


def swaps(sites: list[str], number: int) -> dict[str, dict]:
    """{sites: figures} of one pair: SALQ in each part of the blocks."""
    pair, (sagi, salq) = Pair(number), WINDOW
    return {part: likeness(pair, pair.edited(sagi=(0.0, sagi), salq=(sagi, salq), sites=part)) for part in sites}


def windows(number: int) -> dict[str, dict]:
    """{window: figures} of one pair: SALQ in the node's own part of the blocks."""
    pair, found = Pair(number), {}
    for sagi, salq in itertools.product(SAGI, SALQ):
        found[window(sagi, salq)] = likeness(pair, pair.edited(sagi=(0.0, sagi), salq=(sagi, salq)))
    return found


def retouches(sites: list[str], number: int) -> dict[str, dict]:
    """{sites: figures} of one prompt: the blocks that read the reference."""
    example, judge = Personal(number), detector.load()
    plain, layout, reference = example.blended(1.0), example.blended(0.1), example.reference()
    mask = AdaptiveMaskBlend.execute(layout_retouch.LEAST, 0.01, "cross", layout).args[0]
    given = {"mask": mask, "reference_mask": example.inside[None].float()}
    shown = {LAYOUT: layout}
    shown |= {part: example.retouched(layout, reference, sites=part, **given) for part in sites}
    return {
        name: layout_retouch.figures(
            example, judge, example.decode(latent), example.decode(plain), example.decode(layout), mask[0]
        )
        for name, latent in shown.items()
    }


def differences(study: measurements.Study, default: str, figures: dict[str, str]) -> str:
    """A table of what each variant has more than the default, by sample, with 95 % intervals."""
    rows = [
        [name, *(str(study.difference(name, default, figure)) for figure in figures)]
        for name in study.variants
        if name != default
    ]
    return measurements.markdown([f"minus {default}", *figures.values()], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--method", choices=["swap", "windows", "retouch"], nargs="+", default=["swap", "retouch"])
    parser.add_argument("--sites", nargs="+", default=PRESETS, help="parts of the blocks to compare with the default")
    parser.add_argument("--folder", default=measurements.ROOT / "output" / "evidence")
    options = parser.parse_args()
    for method in options.method:
        default = {"swap": Pair.SITES, "windows": window(*WINDOW), "retouch": Personal.SITES}[method]
        sites = list(dict.fromkeys([default, *options.sites]))
        figures = RETOUCHED if method == "retouch" else SWAPPED
        measure = windows if method == "windows" else partial(swaps if method == "swap" else retouches, sites)
        named = "-".join(part.replace(" ", "") for part in sites) if method != "windows" else "all"
        study = measurements.Study(f"transformer-presets-{method}-{named}", options.folder, "dit").run(
            range(options.first, options.first + options.samples), measure
        )
        print(f"{method}, scenes {options.first} to {options.first + options.samples - 1}")
        print(study.table(**figures))
        print(differences(study, default, figures))


if __name__ == "__main__":
    with inference_mode():
        main()
