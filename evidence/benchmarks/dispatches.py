"""What a step dispatches, as ratios to plain sampling: on a fast card a step costs what it launches. Counted, so that
no machine changes it (workshop/dispatches.py).

python dev.py benchmark dispatches
    the structures of SD1.5 and SDXL at small widths
"""

from collections.abc import Callable
from typing import Any

import torch

from ...workshop.dispatches import of_a_step
from . import bench, collage, layout_retouch, mca_ctrl, photomontage

CACHE = 1 << 20  # MiB
Make = Callable[[bench.Bench], Callable[[], Any]]
CASES: dict[str, Make] = {
    "plain": lambda on: on.plain,
    "record": lambda on: lambda: photomontage.recorded(on, 0),
    "record and cache": lambda on: lambda: photomontage.recorded(on, CACHE),
    "compose 2, cache": lambda on: photomontage.composing(on, 2, CACHE),
    "compose 4, cache": lambda on: photomontage.composing(on, 4, CACHE),
    "compose 2, replay": lambda on: photomontage.composing(on, 2, 0),
    "compose 4, replay": lambda on: photomontage.composing(on, 4, 0),
    "collage of 2 layers": lambda on: collage.biased(on, 2),
    "collage of 20 layers": lambda on: collage.biased(on, 20),
    "token map": lambda on: lambda: on.sample(*layout_retouch.measured(on, on.model, on.empty)),
    "retouch with a mask": lambda on: layout_retouch.cases(on)["retouch"],
    "SAGI": lambda on: mca_ctrl.cases(on)["SAGI"],
    "SAGI, own prompts": lambda on: mca_ctrl.cases(on)["SAGI, own prompts"],
    "SALQ": lambda on: mca_ctrl.cases(on)["SALQ"],
}


class Steps:
    """A case, made once for each number of steps: what a composite keeps for its next run is there when it is
    counted.
    """

    def __init__(self, name: str, make: Make) -> None:
        self.name, self.make = name, make
        self.made: dict[int, Callable[[], Any]] = {}

    def __call__(self, steps: int) -> Any:
        if steps not in self.made:
            self.made[steps] = self.make(bench.Bench(self.name, 8, steps))
        return self.made[steps]()


def counted(name: str, case: str) -> tuple[float, float]:
    """(operations, calls that wait for a device) of a step of a case, on a structure by its name."""
    operations, waits, _ = of_a_step(Steps(name, CASES[case]))
    return operations, waits


def main() -> None:
    for name in ("sd15-small", "sdxl-small"):
        plain, _ = counted(name, "plain")
        print(f"\n{name}, {plain:.0f} operations a step of plain sampling")
        for case in CASES:
            print(f"  {case:<24} {counted(name, case)[0] / plain:.3f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
