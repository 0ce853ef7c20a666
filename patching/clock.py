"""At which sigma a sampler evaluates its model.

A GPU first finishes all that it was asked for, when a sigma is read. ComfyUI's samplers wait for it themselves in every
step, to compare sigmas, so that it has nothing left to finish at the next; only Euler's never looks. It evaluates the
model once at every sigma of its schedule, in order: there they are counted instead.
"""

from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch

from . import internals
from .schedule import levels

Tensor = torch.Tensor


class Clock:
    """Of one run of a sampler."""

    def __init__(self, sampler: Any, sigmas: Tensor, options: dict) -> None:
        """sigmas: the schedule that the sampler is given. options: the run's model options."""
        self.schedule = levels(sigmas[:-1]) if keeps_to_schedule(sampler, options) else None
        self.met: list[Tensor] = []  # sigmas of the evaluations that were counted

    def next(self, sigma: Tensor) -> float:
        """The sigma of the evaluation that begins. sigma: [B], on the model's device."""
        if self.schedule is None:
            return float(sigma[0])
        self.met.append(sigma)
        if len(self.met) > len(self.schedule):
            raise other_sigmas()
        return self.schedule[len(self.met) - 1]

    def check(self) -> None:
        """Raise RuntimeError if an evaluation was at another sigma than was counted. Called when the run has ended."""
        if self.schedule is None or not self.met:
            return
        met = torch.stack([sigma[0] for sigma in self.met]).cpu()
        if not torch.equal(met, torch.tensor(self.schedule[: len(met)]).to(met)):
            raise other_sigmas()


def keeps_to_schedule(sampler: Any, options: dict) -> bool:
    """Whether a sampler evaluates the model at the sigmas of its schedule, once at each and in order, and nobody stands
    between who could leave one out or change it.
    """
    sampler = getattr(sampler, "innermost", sampler)  # of Step Blend
    return (
        type(sampler) is comfy.samplers.KSAMPLER
        and sampler.sampler_function is comfy.k_diffusion.sampling.sample_euler
        and not sampler.extra_options.get("s_churn")
        and not internals.others_wrap_evaluations(options)
    )


def other_sigmas() -> RuntimeError:
    return RuntimeError(
        "Montage: another node changes the sigmas at which euler evaluates the model, unseen by the nodes of this pack."
        " Disconnect it, or use another sampler (dpmpp_2m), whose sigmas are read."
    )
