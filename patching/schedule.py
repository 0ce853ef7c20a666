"""When a recipe acts: windows over the steps of a schedule, and names for the evaluations of a run."""
from collections import Counter
from typing import NamedTuple


class Window(NamedTuple):
    """A part of the schedule and a set of sites (none: only latents are touched). Step i of n lies at i / n; it is inside when start <= i/n < end."""
    start: float
    end: float
    sites: tuple

    @property
    def empty(self):
        return self.start >= self.end

    def has(self, position):
        return self.start <= position < self.end


def position(sigma, sigmas):
    """Where in a schedule an evaluation lies: i / n for step i of n, in [0, 1).

    sigmas: the n + 1 sigmas of the schedule, descending. An evaluation between two of them (the middle of a DPM-2
    step) belongs to the step it is part of.
    """
    steps = len(sigmas) - 1
    begun = sum(1 for s in sigmas[:-1] if s >= sigma)
    return max(begun - 1, 0) / steps


class Visits:
    """Names the evaluations of one run: (sigma, how many times the run was at this sigma before).

    Never a call counter: Heun-type samplers visit a sigma twice with different latents, multistep samplers once,
    and both restart anywhere in the schedule.
    """

    def __init__(self):
        self.seen = Counter()

    def next(self, sigma):
        key = (sigma, self.seen[sigma])
        self.seen[sigma] += 1
        return key
