"""Counts what a sampling step dispatches: operations, copies between devices, and calls that wait for a device.

On a fast card a step costs what it launches, and a copy or a read of a value that waits costs more than that. The
counts do not depend on the machine. Views are not counted: they launch nothing.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "split",
    "chunk",
    "unsqueeze",
    "squeeze",
    "t",
    "detach",
    "alias",
    "as_strided",
    "split_with_sizes",
    "unbind",
    "unfold",
    "_reshape_alias",
    "narrow",
    "lift_fresh",
    "diagonal",
    "movedim",
    "unsafe_split",
}
WAITS = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select"}


class Dispatches(TorchDispatchMode):
    """Counts while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.waits[name] += 1
        elif name not in VIEWS:
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def of_a_step(run: Callable[[int], Any], few: int = 4, many: int = 8) -> tuple[float, float, Counter[str]]:
    """(operations, waits, operations by name) of a step: what a run of many steps has more than one of few, by step.

    run: (steps) -> anything; called before, so that what is made once is not counted.
    """
    for steps in (few, many):
        run(steps)
    counted = []
    for steps in (few, many):
        with Dispatches() as dispatches:
            run(steps)
        counted.append(dispatches)
    less, more = counted
    by_name = more.operations - less.operations
    waits = (more.waits.total() - less.waits.total()) / (many - few)
    return by_name.total() / (many - few), waits, by_name
