"""Step-blended sampling: one run of one sampler whose model changes on the way (Layout-and-Retouch, section 3.1).

A guider is ComfyUI's pair of MODEL and CONDITIONING. The guiders' sampling environments are entered one inside the
other, each by its own `sample`, so that wrappers, hooks, ControlNets and patches of each are in place as in a run of
its own; in the innermost the sampler runs once, on a model that passes every evaluation to the guider whose turn it is.
The state of a multistep sampler goes on, since for the sampler nothing changed. A model is loaded when its first turn
comes.
"""

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from . import internals
from .clock import Clock, clock_of
from .internals import KEY
from .schedule import levels, step_of

Tensor = torch.Tensor


class Stage(NamedTuple):
    """A guider and its part of the schedule. start: where it takes over, 0 (first step) to 1 (after the last). ramp:
    the part of the schedule over which its share of the prediction grows.
    """

    guider: Any
    start: float
    ramp: float

    def share(self, step: int, steps: int) -> float:
        """Of this stage at a step, in [0, 1]; what is left goes to the stages before."""
        inside = [i for i in range(steps) if i / steps >= self.start]
        if step not in inside:
            return 0.0
        ramped = sum(i / steps < round(self.start + self.ramp, 6) for i in inside)  # 0.1 + 0.2 is 0.3
        return min(1.0, (step - inside[0] + 1) / (ramped + 1))


def shares(stages: Sequence[Stage], step: int, steps: int) -> dict[int, float]:
    """{number: share} of the stages that an evaluation needs; they sum to 1."""
    left = 1.0
    found: dict[int, float] = {}
    for number, stage in reversed(list(enumerate(stages))):
        share = left * (stage.share(step, steps) if number else 1.0)
        left -= share
        if share:
            found[number] = share
    return found


class StepBlend:
    """A GUIDER of several: what a sampler needs of one. stages: tuple of Stage, the first from the start."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)

    @property
    def model_patcher(self) -> ModelPatcher:
        return self.stages[0].guider.model_patcher

    def sample(
        self,
        noise: Tensor,
        latent_image: Tensor,
        sampler: comfy.samplers.Sampler,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable | None = None,
        disable_pbar: bool = False,
        seed: int | None = None,
    ) -> Tensor:
        """As CFGGuider.sample; noise and latent_image: [B, C, h, w]."""
        if len(sigmas) == 0:
            return latent_image
        steps = max(len(sigmas) - 1, 1)
        needed = set().union(*(shares(self.stages, step, steps) for step in range(steps)))
        ends = [*(stage.start for stage in self.stages[1:]), 1.0]
        for number, (stage, end) in enumerate(zip(self.stages, ends, strict=True)):
            if number not in needed and stage.start < end:  # else nobody asked for a step of it
                logging.warning("Step Blend Sampler: none of the %d steps is left for guider %d.", steps, number + 1)
        stages = [stage for number, stage in enumerate(self.stages) if number in needed]
        run = BlendRun(stages, sampler, latent_image, sigmas, denoise_mask, seed)
        return run.enter(0, noise, sigmas, callback, disable_pbar)


class BlendRun:
    """One such run, and the model that the sampler sees: it has what samplers read of a guider."""

    def __init__(
        self,
        stages: Sequence[Stage],
        sampler: comfy.samplers.Sampler,
        latent_image: Tensor,
        sigmas: Tensor,
        denoise_mask: Tensor | None,
        seed: int | None,
    ) -> None:
        self.stages, self.sampler, self.seed = stages, sampler, seed
        self.latent_image, self.denoise_mask = latent_image, denoise_mask
        self.schedule = levels(sigmas)  # the whole, of which a node on the first MODEL may leave steps out
        self.guiders = [self.deferred_guider(number, stage.guider) for number, stage in enumerate(stages)]
        self.loads: dict[
            int, Callable[[], None]
        ] = {}  # number -> what loads its model, as ComfyUI would have before sampling
        self.options: dict[int, dict] = {}  # number -> the model options of its run
        self.turn: int | None = None  # whose model is loaded last
        self.samples: Tensor  # of the sampler, once it has run
        self.clock = Clock()  # of the sampler, once it has begun
        self.callbacks: list[Callable | None] = []  # of the sampler, from each guider's environment

    def deferred_guider(self, number: int, guider: Any) -> Any:
        """A copy of a guider, whose model is loaded when its turn comes."""
        guider = copy.copy(guider)
        guider.model_options = internals.cloned_options(guider.model_options)
        add_wrapper_with_key(
            WrappersMP.PREPARE_SAMPLING,
            KEY,
            functools.partial(self.prepare, number),
            guider.model_options,
            is_model_options=True,
        )
        return guider

    def prepare(
        self,
        number: int,
        executor: Callable,
        model: ModelPatcher,
        noise_shape: Sequence[int],
        conds: dict,
        model_options: dict,
        **kwargs: Any,
    ) -> tuple[Any, dict, list]:
        """The PREPARE_SAMPLING wrapper: loads the first model, and notes how to load the others."""
        loaded: list = []  # ControlNets and the like, for ComfyUI to clean up

        def load() -> None:
            loaded[:] = executor(model, noise_shape, conds, model_options=model_options, **kwargs)[2]

        self.loads[number] = load
        if number == 0:
            self.take_turn(0, model)
        return model.model, conds, loaded

    def take_turn(self, number: int, patcher: ModelPatcher) -> None:
        if number != self.turn:
            self.loads[number]()
            self.turn = number
        internals.make_current(patcher)

    def enter(
        self, number: int, noise: Tensor, sigmas: Tensor, callback: Callable | None = None, disable_pbar: bool = True
    ) -> Tensor:
        """Sample with a guider, whose sampler goes on inside its environment."""
        nested = NestedSampler(self, number)
        return self.guiders[number].sample(
            noise, self.latent_image, nested, sigmas, self.denoise_mask, callback, disable_pbar, self.seed
        )

    def sample_or_enter_next(
        self,
        number: int,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None,
        denoise_mask: Tensor | None,
        disable_pbar: bool,
    ) -> Tensor:
        """The environment of a guider stands: enter the next one's, or sample in the innermost."""
        self.options[number] = extra_args["model_options"]
        self.callbacks.append(callback)
        if number == 0:
            self.arguments = sigmas, extra_args, self.callback, noise, latent_image, denoise_mask, disable_pbar
        elif not (torch.equal(sigmas, self.arguments[0]) and torch.equal(noise, self.arguments[3])):
            raise ValueError(
                "Step Blend Sampler: a node on a later MODEL sets how the run starts (Composite Attention"
                " Inject and Multi Source Swap do). Put it on the first MODEL, or sample in two runs."
            )
        if number + 1 < len(self.guiders):
            self.enter(number + 1, noise, sigmas)
        else:
            sampler: Any = self.sampler  # ComfyUI declares its method without arguments
            self.clock = clock_of(sampler, self.arguments[0], self.options[0])
            self.callbacks.append(self.clock.watching(None))
            self.samples = sampler.sample(self, *self.arguments)
            self.clock.check()
        return self.samples

    def callback(self, *args: Any) -> None:
        """A step of the sampler is done."""
        for callback in self.callbacks:
            if callback is not None:
                callback(*args)

    # ------------------------------------------------------------ what the sampler sees

    @property
    def inner_model(self) -> Any:
        return self.guiders[0].inner_model

    @property
    def model_patcher(self) -> ModelPatcher:
        return self.guiders[0].model_patcher

    @property
    def conds(self) -> dict:
        return self.guiders[0].conds

    @property
    def cfg(self) -> float:
        return self.guiders[0].cfg

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict = {}, seed: Any = None) -> Tensor:  # noqa: B006  ComfyUI's
        """The denoised latent [B, C, h, w] at sigma [B]: one guider's prediction, or on a ramp the mean of several by
        their shares.
        """
        step = step_of(self.clock.sigma_of(sigma), self.schedule)
        found = shares(self.stages, step, len(self.schedule) - 1)
        predictions = []
        for number in sorted(found, key=lambda number: number != self.turn):  # the one that is loaded first
            prediction = self.predict(number, x, sigma, model_options, seed)
            if found[number] < 1:
                prediction = found[number] * prediction
            predictions.append(prediction)
        return functools.reduce(torch.add, predictions)

    def predict(self, number: int, x: Tensor, sigma: Tensor, model_options: dict, seed: Any) -> Tensor:
        """One guider's denoised latent."""
        guider = self.guiders[number]
        self.take_turn(number, guider.model_patcher)
        options = options_for(self.options[number], model_options, self.options[0])
        return guider(x, sigma, model_options=options, seed=seed)


class NestedSampler(comfy.samplers.Sampler):
    """Passed to each guider as its sampler: enters the next guider, or runs the real sampler in the innermost."""

    def __init__(self, run: BlendRun, number: int) -> None:
        self.run, self.number = run, number
        self.innermost = run.sampler
        # by whose name a recording calls it
        self.sampler_function = getattr(run.sampler, "sampler_function", run.sampler)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Callable | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        given = sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
        return self.run.sample_or_enter_next(self.number, *given)


def options_for(own: dict, given: dict, first: dict) -> dict:
    """A guider's own model options, with what the sampler added to those of the first (CFG++ adds functions)."""
    if own is first:
        return given
    added = {}
    for key, value in given.items():
        if value is not first.get(key):
            if isinstance(value, list):
                value = [*own.get(key, []), *(item for item in value if item not in first.get(key, []))]
            added[key] = value
    return {**own, **added}
