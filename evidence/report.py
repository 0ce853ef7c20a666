"""Runs every study and writes docs/evidence.md.

python dev.py evidence [--quick]
python dev.py evidence collage cost     only prints what these studies find
"""

import argparse
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from . import cost, measurements, transformer
from .methods import METHODS

STUDIES = {**{name: method.studies for name, method in METHODS.items()}, "transformer": transformer, "cost": cost}

HEAD = """# The evidence

Each paper's claims, measured here on the demo model ([demo/README.md](../demo/README.md)): toy scenes, fixed seeds,
real ComfyUI samplers. Made by `python dev.py evidence{quick}` from commit {commit}, {day}, on {machine}.

Means with 95 % intervals; a claim is *reproduced* when the interval of the paired difference lies on the paper's side
of zero, *not reproduced* when it lies on the other side, *not decided* when it holds zero. Pictures are the first
samples, unpicked. What the papers measure with pretrained networks (LPIPS, CLIP, DINO, ImageReward) or with people
cannot be measured here: the closest measure that needs neither is used instead, and is named.

The samples are few: no GPU was available. How well the demo model follows its prompts, and how far style travels
through its self-attention, is in demo/README.md. The formulas themselves are tested against the papers'.
"""


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", measurements.ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def machine() -> str:
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})"
    )
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the studies take from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="study", help=f"of {', '.join(STUDIES)}; all, if none is named")
    parser.add_argument("--quick", action="store_true", help="a sample of a tenth")
    parser.add_argument(
        "--folder",
        type=Path,
        default=measurements.ROOT / "output" / "evidence",
        help="where the measured samples are kept",
    )
    parser.add_argument("--address", help="of a Ray cluster to measure on, the costs excepted (docs/many-machines.md)")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.studies) - set(STUDIES):
        parser.error(f"no study is named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    return chosen


def main() -> None:
    chosen = options()
    parts = []
    with torch.inference_mode():
        for name in chosen.studies or STUDIES:
            for section in STUDIES[name].sections(chosen):
                parts.append(f"## {section.title}\n\n{section.text}\n")
    if chosen.studies:
        print("\n".join(parts))
        return
    head = HEAD.format(quick=" --quick" * chosen.quick, commit=commit(), day=date.today(), machine=machine())
    (measurements.ROOT / "docs" / "evidence.md").write_text("\n".join([head, *parts]), encoding="utf-8")
    print("docs/evidence.md is written.")


if __name__ == "__main__":
    main()
