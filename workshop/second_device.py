"""A device that is not there: what a sampling run would make a GPU wait for, found on a CPU.

`SecondDevice` is entered as a mode. Tensors that are moved to its DEVICE stay where they are and are marked; whatever
is computed of a marked tensor is marked too. Three things are then known of every call that Python makes: whether it
waits for the device (a value that is read, a shape that depends on one), whether it waits for a copy (blocking, or an
index that lies in main memory), and whether it would fail (tensors of both places in one operation). The place in the
code is noted with it. What runs inside C++ is not seen; parameters of networks count as lying where they are needed.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_management
import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("meta")  # a name that ComfyUI gives no meaning; nothing is ever put there
MAIN = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
READS = {  # of values on the device
    *("item", "tolist", "numpy", "nonzero", "equal", "allclose", "masked_select", "unique", "argwhere", "is_nonzero"),
    *("__bool__", "__float__", "__int__", "__index__", "__contains__", "__array__", "bincount"),
}
FROM_PYTHON = {"tensor", "as_tensor", "new_tensor", "scalar_tensor", "from_numpy", "asarray"}
INDEXING = {"__getitem__", "__setitem__", "index_select", "index_add_", "index_copy_", "gather", "scatter", "scatter_"}


class Stream:
    """Of copies, or of the device: nothing runs out of turn."""

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def as_context(self, stream: "Stream") -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class SecondDevice(TorchFunctionMode):
    """waits: how often the device or a copy was waited for, by place and what it was. mixed: operations that would have
    failed.
    """

    def __init__(self, free: int = 1 << 40) -> None:
        """free: bytes of its memory, as ComfyUI is told."""
        super().__init__()
        self.free = free
        self.waits: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> "SecondDevice":
        stream, management = Stream(), comfy.model_management
        for name, function in {
            "get_free_memory": lambda dev=None, torch_free_too=False: (self.free, 0) if torch_free_too else self.free,
            "get_total_memory": lambda dev=None, torch_total_too=False: self.free,
            "get_offload_stream": lambda device: stream if device == DEVICE else None,
            "current_stream": lambda device: stream,
            "synchronize": lambda: None,
            "MAX_PINNED_MEMORY": 1 << 40,
        }.items():
            self.patches.enter_context(mock.patch.object(management, name, function))
        self.patches.enter_context(mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: None))
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.patches.close()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        of_property = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__":
            return DEVICE if of_property == "device" and is_there(args[0]) else marked(func(*args), is_there(args[0]))
        if name == "pin_memory":
            return args[0]
        if name == "_parse_to":  # by which modules find out where they are moved to
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        named = device_named(args, kwargs)
        args, kwargs = (replaced(part) for part in (args, kwargs))
        tensors = list(tensors_in((args, kwargs)))
        there = [t for t in tensors if is_marked(t)]
        if name in ("to", "cpu", "copy_"):
            return self.moved(func, name, args, kwargs, named)
        if there and name in READS:
            self.wait(name)
        if name in FROM_PYTHON and named == DEVICE:
            self.wait(f"{name} of Python's values")
        if name in INDEXING and there:
            self.indexed(name, args)
        elif there and any(not is_marked(t) and not is_weight(t) and t.ndim for t in tensors):
            self.mixed[place(name)] += 1
        result = func(*args, **kwargs)
        return marked(result, named == DEVICE if named is not None else bool(there))

    def moved(self, func: Callable, name: str, args: tuple, kwargs: dict, named: torch.device | None) -> Any:
        """A call that may copy from one place to the other."""
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
        others = [t for t in (*args[1:], *kwargs.values()) if isinstance(t, torch.Tensor)] if name == "to" else []
        if name == "copy_":
            goes_there = is_marked(target)
        elif name == "cpu":
            goes_there = False
        elif others:
            goes_there = is_there(others[0])
        else:
            goes_there = is_there(source) if named is None else named == DEVICE
        result = func(*args, **kwargs)
        if is_there(source) == goes_there:
            return marked(result, goes_there and not is_weight(result))
        if not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2):
            self.wait("copy to the device" if goes_there else "copy from the device")
        if name != "copy_" and not is_weight(source):
            result = result.clone() if result.data_ptr() == source.data_ptr() else result
        return marked(result, goes_there)

    def indexed(self, name: str, args: tuple) -> None:
        """An index that is not on the device is copied there; one of bools is counted there."""
        index = args[1] if name in ("__getitem__", "__setitem__") else args[2]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, torch.Tensor) and part.ndim:
                if part.dtype == torch.bool:
                    self.wait("index of bools")
                elif not is_marked(part):
                    self.wait("index in main memory")
            elif isinstance(part, list):
                self.wait("index of Python's values")

    def wait(self, what: str) -> None:
        self.waits[place(what)] += 1


def place(what: str) -> str:
    """Where Python called torch: "file:line what"."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename.replace("\\", "/"):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"{name}:{frame.f_lineno} {what}"


def is_weight(t: Any) -> bool:
    return isinstance(t, torch.nn.Parameter)


def is_marked(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and getattr(t, "__dict__", {}).get("on_second_device", False)


def is_there(t: Any) -> bool:
    return is_marked(t) or is_weight(t)


def marked(result: Any, there: bool) -> Any:
    """The same, its tensors marked as lying there or not."""
    if isinstance(result, torch.Tensor):
        if not is_weight(result):
            result.__dict__["on_second_device"] = there
    elif isinstance(result, (tuple, list)):
        for part in result:
            marked(part, there)
    return result


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def device_named(args: tuple, kwargs: dict) -> torch.device | None:
    """The device that a call names; None: none."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.device):
            return value
        if isinstance(value, str) and value in ("cpu", "meta"):
            return torch.device(value)
    return None


def replaced(value: Any) -> Any:
    """Arguments with the real device in the place of the other."""
    if isinstance(value, torch.device) or value == "meta" and isinstance(value, str):
        return MAIN
    if isinstance(value, dict):
        return {key: replaced(part) for key, part in value.items()}
    return tuple(replaced(part) for part in value) if type(value) is tuple else value


def waits_of_a_step(run: Callable[[int], Any], few: int = 3, many: int = 5) -> tuple[dict[str, float], Counter[str]]:
    """({place and what: times a step} that was waited for, operations that would have failed) of a run of so many
    steps. run: (steps) -> anything; called twice, so that what is made once is not counted.
    """
    devices = []
    for steps in (few, many):
        with SecondDevice():
            run(steps)
        with SecondDevice() as device:
            run(steps)
        devices.append(device)
    less, more = devices
    more.waits.subtract(less.waits)
    return {where: count / (many - few) for where, count in more.waits.items() if count}, more.mixed
