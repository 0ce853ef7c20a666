"""What a method does in a sampling run: the interface that every recipe implements, and the context it is handed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from .attention_maps import LiveAttentionMap
from .models import ModelFamily, family_of
from .schedule import Window, position, step_of
from .streams import INVERSION, CallKey, Evaluation, Run, Stream
from .terms import AttentionTerm, TargetRows

Tensor = torch.Tensor


class RunContext:
    """What a recipe may know of the sampling run at hand. Reading it changes nothing.

    sigmas: of the schedule that the sampler was given. size: (h, w) of the latents. sampler: its name, for messages.
    sigma_visit: the evaluation that is being made, (sigma, how many times the run was there before).
    """

    def __init__(
        self,
        model: ModelPatcher,
        sigmas: tuple[float, ...],
        size: tuple[int, int],
        sampler: str,
        maps: Sequence[LiveAttentionMap],
    ) -> None:
        self.model, self.sigmas, self.size, self.sampler, self.maps = model, sigmas, size, sampler, maps
        self.sigma_visit: tuple[float, int] | None = None

    @property
    def visit(self) -> tuple[float, int]:
        """The evaluation that is being made. Raises RuntimeError before the first."""
        if self.sigma_visit is None:
            raise RuntimeError("no evaluation of this run has begun")
        return self.sigma_visit

    @functools.cached_property
    def family(self) -> ModelFamily:
        """What kind of model is sampled."""
        return family_of(self.model)

    @property
    def measures_words(self) -> bool:
        """Whether a Token Attention Map is on the MODEL."""
        return bool(self.maps)

    @property
    def attention_map(self) -> Tensor | None:
        """Where the model looked for the words of the last Token Attention Map, in the evaluations before this one,
        [B, h, w] in [0, 1] in main memory; None in the first.
        """
        return self.maps[-1].before()

    def evaluation_of(self, recipe: Recipe, run: Run, key: CallKey) -> Evaluation:
        """What a recorded run did at an evaluation of this one. Raises ValueError if it was never there."""
        evaluation = run.evaluation(key)
        if evaluation is None:
            single = "one of a single evaluation a step (euler, ddim, dpmpp_2m)"
            fitting = single if run.sampler == INVERSION else "that of the recording, and no adaptive one"
            raise ValueError(
                f"{recipe.node}: this run ({self.sampler}) evaluates the model at sigma {key[0]:.6g} for time"
                f" {key[1] + 1}, which the recorded run ({run.sampler}) did not. As sampler, use {fitting}."
            )
        return evaluation

    def latent_of(self, recipe: Recipe, stream: Stream, key: CallKey) -> Tensor:
        """The latent of a stream at an evaluation, [1, C, h, w] in the model's own scale."""
        run, row = stream
        return self.evaluation_of(recipe, run, key).x[row : row + 1]

    def latent_here(self, recipe: Recipe, stream: Stream) -> Tensor:
        """The latent of a stream at the evaluation that is being made, [1, C, h, w] in the model's own scale."""
        sigma, visit = self.visit
        return self.latent_of(recipe, stream, (sigma, visit, 0))

    def latent_that_continues(self, recipe: Recipe, stream: Stream, sigma: float) -> Tensor:
        """The latent with which a run that starts at a sigma goes on as the stream did, [1, C, h, w]."""
        return self.latent_of(recipe, stream, (sigma, stream.run.visit_that_continues(sigma), 0))

    def to_model_scale(self, latent: Tensor) -> Tensor:
        return self.model.model.process_latent_in(latent)

    def to_latent_scale(self, x: Tensor) -> Tensor:
        return self.model.model.process_latent_out(x)


class Start(NamedTuple):
    """What a run begins with. noise, latent_image: [B, C, h, w]. sigmas: its schedule; where no step of that is left,
    the latent image is what the run gives.
    """

    noise: Tensor
    latent_image: Tensor
    sigmas: Tensor


class Recipe:
    """What the target does with its streams, at the sites and steps of a window. Subclasses say how.

    node: the display name for messages. streams: whose attention it reads. several_terms: whether it may feed a
    site from several attentions, or from one over a part of the rows. One recipe can at a site and step, and acts
    after those that do not. longer_keys: whether a token may attend to more keys than an image has. same_weights:
    whether the MODEL must be the one that its streams were recorded with, LoRAs included. merges: whether the rows
    of all streams together become those of one image. exact: whether streams that are replayed must be evaluated as
    they were recorded, bit for bit: run by run, instead of as rows of one batch, which rounds in another way. It
    then holds for the whole sampling run, whatever other recipes say.
    """

    node = "Montage"
    streams: Sequence[Stream] = ()
    several_terms = False
    longer_keys = False
    same_weights = True
    merges = False

    def __init__(self, window: Window, exact: bool = False) -> None:
        self.window, self.exact = window, exact
        self.kept: dict[tuple, list[Tensor]] = {}  # what was merged of cached features, by evaluation and site

    @property
    def followed(self) -> Sequence[Stream]:
        """The streams whose schedule the run must keep to."""
        return self.streams

    def position(self, context: RunContext, sigma: float) -> float:
        """Where in the schedule an evaluation lies, 0 to 1: the streams' schedule, if there is one."""
        return position(sigma, self.streams[0].run.sigmas if self.streams else context.sigmas)

    def acts_at(self, context: RunContext, sigma: float) -> bool:
        return self.window.has(self.position(context, sigma))

    def check(self, context: RunContext) -> None:
        """Raise ValueError where the run at hand does not fit; called before sampling."""

    def start(self, context: RunContext, start: Start) -> Start:
        """What the run begins with."""
        return start

    def latent(self, context: RunContext, x: Tensor) -> Tensor:
        """What the model is evaluated on instead of x, [B, C, h, w] in the model's own scale."""
        return x

    def denoised(self, context: RunContext, denoised: Tensor) -> Tensor:
        """What an evaluation gives instead of the denoised latent, [B, C, h, w] in the model's own scale."""
        return denoised

    def output(self, context: RunContext, output: Tensor) -> Tensor:
        """What the run gives instead of its output, [B, C, h, w]."""
        return output

    def select(self, number: int, n: Tensor, grid: tuple[int, int]) -> Tensor:
        """What to hold of stream `number` at a site until the target is there. n: [conditionings, 1, tokens, C], which
        others may write into; grid: (h, w). Returns [conditionings, 1, any, C].
        """
        return n.clone()

    def merge(self, selected: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """What `attend` is given of all that was selected, by stream. It is done once for features that are cached, and
        kept for all runs of the recipe, where it is less than they are (`merges`).
        """
        return selected

    def select_all(self, n: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """`select` and `merge` at once, of streams that were evaluated together. n: of all of them, [conditionings,
        streams, tokens, C], which others may write into.
        """
        return self.merge([self.select(number, part, grid) for number, part in enumerate(n.split(1, 1))], grid)

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        """The self-attention at a site, of all conditionings. sources: what was merged, [conditionings, 1, any, C]
        each. grid: (h, w) of the tokens.
        """
        raise NotImplementedError


def begin_on(
    stream: Stream, recipe: Recipe, context: RunContext, start: Start, sigma: float | None = None
) -> tuple[Tensor, Tensor]:
    """The noise and latent image that put a run on a stream's trajectory at its first sigma (sigma: that of a shortened
    schedule), whatever the sampler's seed.

    At the schedule's start they are the stream's own; inside it, the noise that leads to its latent: the inverse of the
    model's own x = noise_scaling(sigma, noise, latent). Where the sampler adds no noise to another latent, it goes on
    with what an earlier sampler began, and nothing is changed. Raises ValueError for any other latent than the one that
    the stream began with.
    """
    run, row = stream
    noise, latent_image = start.noise, start.latent_image
    latent = run.latent_image[row : row + 1]
    first = context.sigmas[0]
    shortened, sigma = sigma not in (None, first), first if sigma is None else sigma
    if not torch.equal(latent_image.cpu(), latent.expand_as(latent_image)):
        if noise.any() or shortened:
            raise ValueError(
                f"{recipe.node}: the sampler got another latent than the one its images start from. Connect the LATENT"
                " that the node gives; for a detailer or a second pass over a picture, use the MODEL before this node."
            )
        return noise, latent_image
    if sigma == run.sigmas[0]:
        own = run.noise[row : row + 1]
    else:
        x = context.latent_that_continues(recipe, stream, sigma)
        sampling: Any = context.model.get_model_object("model_sampling")
        image = context.to_model_scale(latent) * bool(latent.count_nonzero())
        level, one = torch.tensor([sigma]), torch.ones(1)
        offset = sampling.noise_scaling(level, torch.zeros_like(x), image)
        own = (x - offset) / sampling.noise_scaling(level, one, torch.zeros(1))
    return own.expand_as(noise).to(noise), latent.expand_as(latent_image).to(latent_image)


def never_acts(recipes: Sequence[Recipe], context: RunContext) -> bool:
    """Whether none of a node's recipes has a step of the schedule in its window, and at least one wants to."""
    wanting = [recipe for recipe in recipes if recipe.window.sites and not recipe.window.is_empty]
    acting = any(recipe.acts_at(context, sigma) for recipe in wanting for sigma in context.sigmas[:-1])
    return bool(wanting) and not acting


def first_step(run: Run) -> int:
    """The first step of a run's schedule that was recorded."""
    return step_of(next(iter(run.evaluations))[0], run.sigmas)
