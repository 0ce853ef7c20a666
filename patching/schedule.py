"""When a recipe acts: windows over the steps of a schedule, and names for the evaluations of a run."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Window(NamedTuple):
    """A part of the schedule and a set of sites (none: only latents are touched). Step i of n lies at i / n; it is
    inside when start <= i/n < end.
    """

    start: float
    end: float
    sites: tuple[Any, ...]

    @property
    def is_empty(self) -> bool:
        return self.start >= self.end

    def has(self, position: float) -> bool:
        return self.start <= position < self.end


def step_of(sigma: float, sigmas: Sequence[float]) -> int:
    """The step of a schedule that an evaluation is part of, counted from 0.

    sigmas: of the schedule, descending, one more than steps. An evaluation between two of them (the middle of a DPM-2
    step) belongs to the step it is part of.
    """
    return max(sum(s >= sigma for s in sigmas[:-1]) - 1, 0)


def position(sigma: float, sigmas: Sequence[float]) -> float:
    """Where in a schedule an evaluation lies: i / n for step i of n, in [0, 1)."""
    return step_of(sigma, sigmas) / (len(sigmas) - 1)


def levels(sigmas: torch.Tensor) -> tuple[float, ...]:
    """A schedule as the model meets it: samplers hand their sigmas on in float32, whatever they were given."""
    return tuple(sigmas.float().tolist())


def in_words(sigmas: Sequence[float]) -> str:
    """A schedule, for messages."""
    return (
        f"{len(sigmas) - 1} steps from sigma {sigmas[0]:.4g} through {sigmas[len(sigmas) // 2]:.4g} to {sigmas[-1]:.4g}"
    )


def why_apart(first: Sequence[float], second: Sequence[float]) -> str:
    """What is easily missed where two schedules of as many steps differ: a sentence for a message, or nothing."""
    if len(first) != len(second):
        return ""
    return (
        " With uni_pc and dpm_2 (and their variants), KSampler takes other steps than with other samplers: use euler,"
        " ddim or dpmpp_2m for all."
    )


class Visits:
    """Names the evaluations of one run: (sigma, how many times the run was at this sigma before).

    Never a call counter: Heun-type samplers visit a sigma twice with different latents, multistep samplers once,
    and both restart anywhere in the schedule.
    """

    def __init__(self) -> None:
        self.seen: Counter[float] = Counter()

    def next(self, sigma: float) -> tuple[float, int]:
        key = (sigma, self.seen[sigma])
        self.seen[sigma] += 1
        return key
