"""One sampling run of a patched MODEL: what is on it, where it stands, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import internals, refusals
from .attention_maps import LiveAttentionMap
from .bias import Bias, biases_of
from .clock import Clock
from .engine import Engine, ModelCall
from .recipe import Recipe, RunContext, Start
from .recorder import Recorder
from .schedule import Visits, levels, position
from .streams import Run, roles_of
from .weights import Weights

if TYPE_CHECKING:
    from .install import Installed

Tensor = torch.Tensor


class Session:
    """Everything that lives only as long as a sampling run."""

    def __init__(self, guider: Any, installed: Installed, noise: Tensor, sampler: Any, sigmas: Tensor) -> None:
        """Raises ValueError for a run that cannot give what the nodes on its MODEL promise."""
        self.guider, self.recordings, self.noise = guider, installed.recordings, noise
        model = guider.model_patcher
        self.weights = Weights(model)
        self.owners = internals.owners_of(guider.conds)
        height, width = noise.shape[-2:]
        maps = [LiveAttentionMap(wanted, guider.conds) for wanted in installed.maps]
        name = getattr(getattr(sampler, "sampler_function", sampler), "__name__", type(sampler).__name__)
        self.context = RunContext(model, levels(sigmas), (height, width), name, maps)
        groups = ([recipe for recipe in group if not recipe.window.is_empty] for group in installed.groups)
        self.groups = [group for group in groups if group]
        recipes = (recipe for group in self.groups for recipe in group)
        self.recipes: list[Recipe] = sorted(recipes, key=lambda recipe: recipe.several_terms)
        self.heeds_bias = installed.heeds_bias
        self.biases: dict[Any, tuple[Bias, int]] = biases_of(guider.conds) if self.heeds_bias else {}
        self.biased_nodes = refusals.in_order(bias.node for bias, _ in self.biases.values())
        self.names = self.names_of_nodes(installed)
        self.acted: set[Recipe | Bias] = set()  # what has acted at least once in this run
        self.visits = Visits()
        self.clock = Clock()  # the sampler's, once it has begun by ComfyUI's own way
        self.is_evaluating, self.calls = False, 0  # whether the guider is, and how often it has called the model for it
        self.options: dict[int, dict] = {}  # by that number: the model options, as they were last
        self.recorder: Recorder | None = None
        refusals.check_frames(self.names, noise.shape)
        refusals.before_sampling(self)
        self.engine = Engine(self)

    def names_of_nodes(self, installed: Installed) -> str:
        """The nodes that are on the MODEL, for messages."""
        names = [recipe.node for recipe in self.recipes]
        names += ["Token Attention Map"] * bool(installed.maps)
        names += ["Feature Recorder"] * (len(installed.recordings) > len(installed.maps))
        names += [self.biased_nodes] * bool(self.biased_nodes)
        return refusals.in_order(names)

    def acting(self, sigma: float) -> list[Recipe]:
        """The recipes in whose window an evaluation lies."""
        return [recipe for recipe in self.recipes if recipe.acts_at(self.context, sigma)]

    @staticmethod
    def acting_biases(
        biases: dict[Any, tuple[Bias, int]], sigma: float, sigmas: tuple[float, ...]
    ) -> dict[Any, tuple[Bias, int]]:
        """Those of the biases in whose window an evaluation lies, in a schedule."""
        where = position(sigma, sigmas)
        return {uuid: (bias, tokens) for uuid, (bias, tokens) in biases.items() if bias.window.has(where)}

    # ------------------------------------------------------------ from the beginning to the end

    def start(self, start: Start, denoise_mask: Tensor | None) -> Start:
        """Where the run begins, as the recipes say, and from where it is recorded."""
        for recipe in self.recipes:
            start = recipe.start(self.context, start)
        self.noise = start.noise
        first = levels(start.sigmas[:1])[0]
        for recipe in self.recipes:
            for run, _ in recipe.followed:
                self.visits.seen[first] = run.visit_that_continues(first)
        if self.recordings:
            composed = refusals.in_order(recipe.node for recipe in self.recipes)
            noise, latent_image, sigmas = start
            run = Run(
                self.weights,
                self.context.sampler,
                sigmas,
                noise,
                latent_image,
                denoise_mask,
                composed,
                self.heeds_bias,
            )
            last_sigma = self.context.sigmas[-2]
            self.recorder = Recorder(run, self.context.model, self.recordings, last_sigma)
        return start

    def begin_sampling(self, clock: Clock, noise: Tensor) -> None:
        """The sampler begins with `noise`, [B, C, h, w]: another node may have changed it since the start. By now the
        conditionings are processed.
        """
        self.clock = clock
        internals.tell_apart(self.guider.conds, self.owners)
        if torch.equal(noise.cpu(), self.noise.cpu().to(noise.dtype)):
            return
        if self.recipes:
            raise refusals.other_noise(self.names)
        if self.recorder:
            self.recorder.run.noise = noise.cpu()

    def begin_evaluation(self, timestep: Tensor) -> None:
        """The guider evaluates its model at a sigma, in one call or in several. timestep: that sigma, [B]."""
        for live in self.context.maps:
            live.begin_evaluation()
        self.context.sigma_visit = self.visits.next(self.clock.sigma_of(timestep))
        self.calls, self.is_evaluating = 0, True

    def end_evaluation(self) -> None:
        self.is_evaluating = False

    def options_of_call(self, options: dict) -> dict:
        """The model options of the call at hand, recorded: one object for as long as they stay the same, which other
        nodes may change from step to step.
        """
        known = self.options.get(self.calls)
        if known is None or not internals.same_options(options, known):
            known = self.options[self.calls] = internals.recorded_options(options)
        return known

    def evaluate(
        self, execute: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list[Tensor]:
        """A model call of the target. There may be several in an evaluation (PAG, SAG): each has a record of its own,
        with its own latent and options.
        """
        roles = roles_of(self.guider.conds)
        if not any(cond["uuid"] in roles for group in conds for cond in group or ()):
            return execute(model, conds, x, timestep, options)  # another node's own conditionings (Perp-Neg)
        if len(x) != len(self.noise):
            raise refusals.other_batch(self.names, len(self.noise), len(x))
        if not self.is_evaluating:
            raise refusals.other_guider(self.names, type(self.guider).__name__)
        sigma, visit = self.context.visit
        key = sigma, visit, self.calls
        recorded = self.options_of_call(options)
        record = self.recorder and self.recorder.begin_call(key, self.guider.conds, x, recorded)
        # further calls of an evaluation see attention that was disturbed on purpose
        maps = self.context.maps if self.calls == 0 else []
        self.calls += 1
        biases = self.acting_biases(self.biases, sigma, self.context.sigmas)
        call = ModelCall(key, roles, biases, self.acting(sigma), maps, record, recorded)
        return self.engine.compute(execute, model, conds, x, timestep, options, call)

    def close(self) -> None:
        """Let go of everything that was held for the run, however it ended."""
        self.engine.close()

    def abandon(self) -> None:
        """The run was cancelled or failed: what was recorded of it is of no use, and goes at once."""
        if self.recorder:
            self.recorder.run.forget_features()

    def finish(self, output: Tensor) -> Tensor:
        """What the run gives, [B, C, h, w]. Raises RuntimeError if a node on the MODEL never acted, because another ran
        the attention in its own way.
        """
        for recipe in self.recipes:
            output = recipe.output(self.context, output)
        self.check_acted()
        if self.recorder:
            self.recorder.finish(output, self.context.maps)
        return output

    def check_acted(self) -> None:
        for group in self.groups:
            wanting = [recipe for recipe in group if recipe.window.sites]
            if wanting and not self.acted.intersection(wanting):
                raise refusals.never_acted(group[0].node, [recipe.window for recipe in wanting])
        biases = {bias for bias, _ in self.biases.values()}
        if biases and not self.acted.intersection(biases):
            raise refusals.never_acted(self.biased_nodes, [bias.window for bias in biases])


def session_in(options: dict) -> Session | None:
    """The session of a run's model options; None outside of a run."""
    return options.get("transformer_options", {}).get(internals.KEY)
