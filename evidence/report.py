"""Runs every study and writes docs/evidence.md: `python dev.py evidence [--quick]`."""

import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import conftest  # noqa: E402, F401  puts ComfyUI and the pack in place
import torch  # noqa: E402

from montage.evidence import collage, cost, layout_retouch, mca_ctrl, measurements, photomontage  # noqa: E402

METHODS = (photomontage, collage, mca_ctrl, layout_retouch, cost)

HEAD = """# The evidence

What each paper claims, measured here on the demo model ([demo/README.md](../demo/README.md)): toy scenes, fixed seeds,
real ComfyUI samplers. Made by `python dev.py evidence{quick}` from commit {commit}, {day}, on {machine}.

Means with 95 % intervals; a claim is *reproduced* when the interval of the paired difference lies on the paper's side
of zero, *not reproduced* when it lies on the other side, *not decided* when it holds zero. Pictures are the first
samples, unpicked. What the papers measure with pretrained networks (LPIPS, CLIP, DINO, ImageReward) or with people
cannot be measured here, where there are none: the nearest measure that needs none stands in its place, and is named.

Fewer samples than one would wish: no GPU was at hand. How well the demo model draws what it is told, and how far style
travels through its self-attention, is in demo/README.md. The formulas themselves are tested against the papers' written
out.
"""


def commit():
    found = subprocess.run(
        ["git", "-C", measurements.ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"


def machine():
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} thread(s) of a CPU ({platform.machine()})"
    )
    return f"{device}, torch {torch.__version__}, Python {platform.python_version()}"


def main():
    options = measurements.options()
    parts = [HEAD.format(quick=" --quick" * options.quick, commit=commit(), day=date.today(), machine=machine())]
    with torch.inference_mode():
        for module in METHODS:
            for section in module.sections(options):
                parts.append(f"## {section.title}\n\n{section.text}\n")
    (measurements.ROOT / "docs" / "evidence.md").write_text("\n".join(parts), encoding="utf-8")
    print("docs/evidence.md is written.")


if __name__ == "__main__":
    main()
