"""Batches of runs of a workflow on many GPUs and machines, by Ray: `python -m farm --help`, docs/many-machines.md.

Nothing here is imported by the pack. Runs from a checkout: the whole checkout travels to the workers as Ray's
working directory, so that every machine runs the same version of the pack.
"""

from .mapping import map

__all__ = ["map"]
