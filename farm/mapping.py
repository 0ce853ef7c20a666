"""A function over many items, on the machines of a Ray cluster."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def _measured(prepare: Callable[[], None] | None, function: bytes, item: Any) -> tuple[Any, Any]:
    """On a worker: prepare it once, then unpack the function, which may need what was prepared, and call it."""
    import os

    import ray.cloudpickle as cloudpickle

    if prepare and "MONTAGE_FARM_PREPARED" not in os.environ:
        prepare()
        os.environ["MONTAGE_FARM_PREPARED"] = "1"
    return item, cloudpickle.loads(function)(item)


def map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    address: str | None = None,
    *,
    cpus: float = 1,
    gpus: float = 0,
    prepare: Callable[[], None] | None = None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) as they come, in any order.

    cpus, gpus: what one call occupies. A process takes one call after the other, so that what a module caches is made
    once. A call whose process or machine dies is repeated elsewhere; an exception of the function's is raised here, and
    the rest is cancelled. prepare: called once in every process before the function is unpacked there; it may use
    nothing but what it imports itself. The current folder of the workers is a copy of the checkout.
    """
    import ray
    import ray.cloudpickle as cloudpickle

    from .cluster import connect

    if not ray.is_initialized():
        connect(address)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers may know this package by another name
    if prepare:
        cloudpickle.register_pickle_by_value(sys.modules[prepare.__module__])
    packed = ray.put(cloudpickle.dumps(function))
    call = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_measured)
    waiting = [call.remote(prepare, packed, item) for item in items]
    try:
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ready)
    finally:
        for rest in waiting:
            ray.cancel(rest, force=True)
