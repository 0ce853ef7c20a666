"""Runs studies and writes docs/evidence.md.

python dev.py evidence [--quick]
python dev.py evidence collage cost                       only prints what these studies find
python dev.py evidence --write --model dit photomontage   puts what it finds in the place of the page's older sections
python dev.py evidence --head                             measures nothing: writes the page's head and first table anew
"""

import argparse
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from . import causes_tested, cost, measurements, other_packs, page, photographs, regional, transformer
from .methods import METHODS

STUDIES = {
    **{name: method.studies for name, method in METHODS.items()},
    "transformer": transformer,
    "regional": regional,
    "causes": causes_tested,
    "photographs": photographs,
    "cost": cost,
    "other_packs": other_packs,
}
PAGE = measurements.ROOT / "docs" / "evidence.md"


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
        "--model", choices=measurements.MODELS, help="the demo model to measure on; both, if none is named"
    )
    parser.add_argument("--write", action="store_true", help="write the sections of the named studies into the page")
    parser.add_argument("--head", action="store_true", help="write the page's head and first table anew, and no more")
    parser.add_argument(
        "--folder",
        type=Path,
        default=measurements.ROOT / "output" / "evidence",
        help="where the measured samples are kept",
    )
    parser.add_argument("--packs", type=Path, help="where other packs are cloned (default: ComfyUI's custom_nodes)")
    parser.add_argument("--address", help="of a Ray cluster to measure on, the costs excepted (docs/many-machines.md)")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.studies) - set(STUDIES):
        parser.error(f"no study is named {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    return chosen


def measured(chosen: argparse.Namespace) -> list[measurements.Section]:
    """The sections of the chosen studies, each with when it was measured."""
    line = page.measured_line(commit() + " --quick" * chosen.quick, str(date.today()), machine())
    found = []
    with torch.inference_mode():
        for name in chosen.studies or STUDIES:
            for title, text in STUDIES[name].sections(chosen):
                found.append(measurements.Section(title, f"{line}\n\n{text}"))
    return found


def main() -> None:
    chosen = options()
    new = [] if chosen.head else measured(chosen)
    if chosen.studies and not chosen.write:
        print("\n\n".join(f"## {title}\n\n{text}" for title, text in new))
        return
    partly = chosen.studies or chosen.model or chosen.head
    kept = page.sections(PAGE.read_text(encoding="utf-8")) if partly else []
    PAGE.write_text(page.written(page.replaced(kept, new)), encoding="utf-8")
    print("docs/evidence.md is written.")


if __name__ == "__main__":
    main()
