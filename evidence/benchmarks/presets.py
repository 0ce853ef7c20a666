"""Which blocks and steps of the demo transformer the subject is best read in: the choice of the nodes' presets.

python dev.py benchmark presets --method swap retouch                            chooses, on the first scenes
python dev.py benchmark presets --method swap --first 100 --sites "last half"    confirms, on others

For each part of the blocks that reads the subject: by Collaborative Attention (swap, generate) the share of pictures in
which the right object is in the edited area, or anywhere; by Multi Source Swap (retouch) the subject's colour distance
to its photo, how well the prompt is followed, and what stays around the subject. windows: a swap in other parts of the
schedule. Below each table: paired differences with what the node does by default.
"""

import argparse
import itertools

from torch import inference_mode

from ...patching.models.dit import PRESETS
from .. import mca_ctrl, measurements
from ..transformer import BLOCKS, Pair, likeness

SAGI = (0.0, 0.1, 0.2, 0.4)  # where SAGI ends and SALQ begins, of the schedule
SALQ = (0.96, 0.6)  # where SALQ ends


def window(sagi: float, salq: float) -> str:
    return f"SAGI to {sagi:g}, SALQ to {salq:g}"


def windows(number: int) -> dict[str, dict]:
    """{window: figures} of one pair: SALQ in the node's own part of the blocks."""
    pair, found = Pair(number), {}
    for sagi, salq in itertools.product(SAGI, SALQ):
        found[window(sagi, salq)] = likeness(pair, pair.edited(sagi=(0.0, sagi), salq=(sagi, salq)))
    return found


def report(study: measurements.Study, default: str, figures: dict[str, str]) -> str:
    """The table of all variants, and one of what each has more than the default, by sample, with 95 % intervals."""
    rows = [
        [name, *(str(study.difference(name, default, figure)) for figure in figures)]
        for name in study.variants
        if name != default
    ]
    differences = measurements.markdown([f"minus {default}", *figures.values()], rows)
    return f"{study.table(**figures)}\n\n{differences}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--method", choices=[*BLOCKS, "windows"], nargs="+", default=list(BLOCKS))
    parser.add_argument("--sites", nargs="+", default=PRESETS, help="parts of the blocks to compare with the default")
    parser.add_argument("--folder", default=measurements.ROOT / "output" / "evidence")
    options = parser.parse_args()
    samples = range(options.first, options.first + options.samples)
    for method in options.method:
        if method == "windows":
            study = measurements.Study("transformer-presets-windows", options.folder, "dit").run(samples, windows)
            default, figures = window(mca_ctrl.UNIFORM.sagi[1], mca_ctrl.UNIFORM.salq[1]), BLOCKS["swap"].figures
        else:
            study = BLOCKS[method].study(options.sites, samples, options.folder)
            default, figures = BLOCKS[method].default, BLOCKS[method].figures
        print(f"{method}, scenes {samples[0]} to {samples[-1]}\n\n{report(study, default, figures)}")


if __name__ == "__main__":
    with inference_mode():
        main()
