"""At which sigma a sampler evaluates its model.

A GPU first finishes all that it was asked for, when a sigma is read. ComfyUI's samplers wait for it themselves in every
step, to compare sigmas, so that it has nothing left to finish at the next; but Euler's (and dpm_fast) never looks. Its
evaluations are at the sigma of the step, and it says when a step is done: there the sigma is known without being read.
"""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.samplers
import torch

from . import internals
from .schedule import levels

Tensor = torch.Tensor


class Clock:
    """Of one run of a sampler. schedule: whose sigmas it keeps to; None where they are read."""

    def __init__(self, schedule: Sequence[float] | None = None) -> None:
        self.schedule, self.step = schedule, 0
        self.met: list[tuple[Tensor, float]] = []  # sigmas of evaluations, and what they were taken for

    def watching(self, callback: Callable | None) -> Callable | None:
        """The callback that the sampler is to be given instead of one."""
        if self.schedule is None:
            return callback

        def done(step: int, *args: Any) -> None:
            self.step = step + 1
            if callback is not None:
                callback(step, *args)

        return done

    def sigma_of(self, sigma: Tensor) -> float:
        """The sigma of an evaluation. sigma: [B], on the model's device."""
        if self.schedule is None:
            return float(sigma[0])
        level = self.schedule[min(self.step, len(self.schedule) - 1)]
        self.met.append((sigma, level))
        return level

    def check(self) -> None:
        """Raise RuntimeError if an evaluation was at another sigma than it was taken for. Called when the run has ended
        and the device is waited for anyway.
        """
        if not self.met:
            return
        met, taken_for = zip(*self.met)
        found = torch.stack([sigma[0] for sigma in met]).cpu()
        if not torch.equal(found, torch.tensor(taken_for).to(found)):
            raise RuntimeError(
                "Montage: another node changes the sigmas at which euler evaluates the model, unseen by the nodes of"
                " this pack. Disconnect it, or use another sampler (dpmpp_2m), whose sigmas are read."
            )


def clock_of(sampler: Any, sigmas: Tensor, options: dict) -> Clock:
    """Of a run that begins. sigmas: the schedule that the sampler is given. options: the run's model options."""
    sampler = getattr(sampler, "innermost", sampler)  # of Step Blend
    function: Any = getattr(sampler, "sampler_function", None)
    keeps_to_schedule = (
        type(sampler) is comfy.samplers.KSAMPLER
        and (function.__module__, function.__name__) == ("comfy.k_diffusion.sampling", "sample_euler")
        and not sampler.extra_options.get("s_churn")
        and not internals.others_wrap_evaluations(options)
    )
    return Clock(levels(sigmas) if keeps_to_schedule else None)
