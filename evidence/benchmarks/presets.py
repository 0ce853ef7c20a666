"""Which blocks and steps of the demo transformer the subject is best read in: the choice of the nodes' presets.

python dev.py benchmark presets [--samples 12] [--method swap]

For each setting of Collaborative Attention the share of swaps in which the right object stands in the edited area, its
colour distance, and the background's PSNR; for each of Multi Source Swap the subject's colour distance to its photo,
and how well the prompt is followed.
"""

import argparse
import itertools

from torch import inference_mode

from ...demo import detector
from ...nodes.layout_retouch import AdaptiveMaskBlend
from .. import layout_retouch, measurements
from ..transformer import Pair, Personal, likeness

SITES = ("all", "first third", "first half", "last half", "middle half", "single")
SAGI = (0.0, 0.1, 0.2, 0.4)  # where SAGI ends and SALQ begins, of the schedule
SALQ = (0.96, 0.6)  # where SALQ ends
BEST = "first third"  # in which the windows are tried
MEASURED = {"present": "right object", "colour": "colour distance", "psnr": "background"}


def swaps(number: int) -> dict[str, dict]:
    """{setting: figures} of one pair: SALQ in each part of the blocks, and in one part in each window."""
    pair, found = Pair(number), {}
    settings = [(sites, 0.1, 0.96) for sites in SITES]
    settings += [(BEST, sagi, salq) for sagi, salq in itertools.product(SAGI, SALQ)]
    for sites, sagi, salq in dict.fromkeys(settings):
        picture = pair.edited(sagi=(0.0, sagi), salq=(sagi, salq), sites=sites)
        found[f"SALQ in {sites}, SAGI to {sagi:g}, SALQ to {salq:g}"] = likeness(pair, picture)
    return found


def retouches(number: int) -> dict[str, dict]:
    """{setting: figures} of one prompt: the blocks that read the reference, after 0.1 and 0.2 of the schedule."""
    example, judge, found = Personal(number), detector.load(), {}
    plain, layout, reference = example.blended(1.0), example.blended(0.1), example.reference()
    mask = AdaptiveMaskBlend.execute(layout_retouch.LEAST, 0.01, "cross", layout).args[0]
    given = {"mask": mask, "reference_mask": example.inside[None].float()}
    shown = {"its layout": layout}
    for sites, end in itertools.product(SITES, (0.1, 0.2)):
        shown[f"reference in {sites}, layout to {end:g}"] = example.retouched(
            layout, reference, layout_end=end, sites=sites, **given
        )
    for name, latent in shown.items():
        found[name] = layout_retouch.figures(
            example, judge, example.decode(latent), example.decode(plain), example.decode(layout), mask[0]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--method", choices=["swap", "retouch"], nargs="+", default=["swap", "retouch"])
    parser.add_argument("--folder", default=measurements.ROOT / "output" / "evidence")
    options = parser.parse_args()
    if "swap" in options.method:
        study = measurements.Study("transformer-presets-swap", options.folder, "dit").run(range(options.samples), swaps)
        print(study.table(**MEASURED))
    if "retouch" in options.method:
        study = measurements.Study("transformer-presets-retouch", options.folder, "dit").run(
            range(options.samples), retouches
        )
        print(study.table(colour="colour distance", prompt="prompt", around="PSNR around the subject"))


if __name__ == "__main__":
    with inference_mode():
        main()
