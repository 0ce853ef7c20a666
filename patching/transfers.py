"""Features on their way between a model's device and main memory, without anyone waiting.

On a GPU they go to and from pinned memory on a stream of their own, which starts when the model's stream is where it
was asked, and is waited for where it is needed. Elsewhere a copy is a copy.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import comfy.model_management
import torch

from . import internals

Tensor = torch.Tensor


class Arriving(NamedTuple):
    """Tensors that are being copied to a device. stream: of the copies, None where they are there."""

    parts: list[Tensor]
    stream: Any

    def wait(self) -> list[Tensor]:
        """The tensors, for what the device is asked from now on. Nobody else holds them."""
        if self.stream is not None:
            device = self.parts[0].device
            current: Any = comfy.model_management.current_stream(device)
            current.wait_stream(self.stream)
            for part in self.parts:
                part.record_stream(current)
        return self.parts


def send(parts: list[Tensor], like: Tensor) -> Arriving:
    """Begin to copy tensors to the device and type of another, always into memory of their own."""
    stream = _stream(like.device) if any(part.device != like.device for part in parts) else None
    with _on(stream):
        copies = [part.to(like.device, like.dtype, non_blocking=True, copy=True) for part in parts]
    return Arriving(copies, stream)


def put_away(rows: Tensor) -> Tensor:
    """A copy of a tensor in main memory, complete after `finish`. Others may write into the tensor meanwhile."""
    own = rows.clone() if rows.device.type != "cpu" else rows
    stream = _stream(rows.device)
    if stream is None:
        return own.to("cpu", copy=own is rows)
    kept = _main_memory(own)
    with _on(stream):
        kept.copy_(own, non_blocking=True)
    own.record_stream(stream)
    return kept


def together(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, [parts, ...]: without a copy where they lie at equal distances in one memory, as the
    conditionings of one evaluation do.
    """
    first = parts[0]
    if len(parts) == 1:
        return first[None]
    memory, step = first.untyped_storage().data_ptr(), parts[1].storage_offset() - first.storage_offset()
    if (
        all(
            part.untyped_storage().data_ptr() == memory
            and part.storage_offset() == first.storage_offset() + number * step
            and part.stride() == first.stride()
            and part.dtype == first.dtype
            for number, part in enumerate(parts)
        )
        and step >= 0
    ):
        return first.as_strided((len(parts), *first.shape), (step, *first.stride()))
    return torch.stack([part.to(first) for part in parts])


def at_hand(part: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device and in the type of another; the same where it is that already."""
    same = part.device == like.device and part.dtype == like.dtype
    return part if same else part.to(like.device, like.dtype, non_blocking=True)


def _main_memory(like: Tensor) -> Tensor:
    """Room for a tensor in main memory, pinned, so that nobody waits for its copies; not pinned where ComfyUI pins
    nothing (--disable-pinned-memory) or the system gives no more.
    """
    if internals.pins_memory():
        with contextlib.suppress(RuntimeError):
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    return torch.empty(like.shape, dtype=like.dtype)


def ready_to_send(part: Tensor, device: torch.device) -> Tensor:
    """A tensor of main memory where a device can fetch it without anyone waiting."""
    if part.device == device or not internals.pins_memory() or _stream(device) is None:
        return part
    return _main_memory(part).copy_(part)


def finish(device: torch.device) -> None:
    """Wait until everything that was put away is there: at the end of a run."""
    if _stream(device) is not None:
        comfy.model_management.synchronize()


def _stream(device: torch.device) -> Any:
    """A stream of ComfyUI's for transfers, which goes on from where the model's stream is; None where there is none: on
    a CPU, and with --disable-async-offload.
    """
    stream = None if device.type == "cpu" else comfy.model_management.get_offload_stream(device)
    if stream is not None:
        stream.wait_stream(comfy.model_management.current_stream(device))
    return stream


def _on(stream: Any) -> Any:
    return contextlib.nullcontext() if stream is None else stream.as_context(stream)
