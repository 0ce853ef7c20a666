"""The recursion at the heart of this pack: to compute an evaluation of the target, gather what its recipes read of
their streams, by replaying those that no cache holds; a replay is itself an evaluation that is computed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch

from . import internals, refusals
from .attention_maps import LiveAttentionMap
from .bias import Bias
from .models import SelfAttention, SelfAttentionRows, Site, SiteHandler, TextAttention, family_of
from .recipe import Recipe
from .recorder import Record
from .streams import CallKey, CondRole, Run, conds_of, rows_to_replay
from .terms import AttentionTerm, TargetRows, pack

if TYPE_CHECKING:
    from .session import Session

Tensor = torch.Tensor


class ModelCall:
    """One evaluation of the model, of the target or of a stream: its name (sigma, visit, call), what its conditionings
    are, the recipes and biases that act in it, and what was selected of its streams.
    """

    def __init__(
        self,
        key: CallKey,
        roles: dict[Any, CondRole],
        biases: dict[Any, tuple[Bias, int]],
        recipes: Sequence[Recipe] = (),
        maps: Sequence[LiveAttentionMap] = (),
        record: Record | None = None,
    ) -> None:
        self.key, self.roles, self.biases, self.recipes, self.maps = key, roles, biases, recipes, maps
        self.record = record  # sees the self-attentions before the recipes
        self.selected: dict[tuple[Recipe, int, CondRole, Site], Tensor] = {}  # (recipe, stream number, role, site)


class Engine:
    """Computes the model calls of one sampling run."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.family = family_of(session.context.model)
        self.conds: dict[tuple[Run, tuple[int, ...]], dict] = {}  # (run, rows) -> its conditioning, on the device
        self.prepared: dict[tuple, Any] = {}  # what biases keep for the run
        self.without_compile = False  # whether torch.compile had to be left out

    # ------------------------------------------------------------ compute, gather, replay

    def compute(
        self, execute: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, call: ModelCall
    ) -> list[Tensor]:
        """One evaluation with its recipes and biases on. execute: as internals.evaluate."""
        self.gather(model, conds, x.device, timestep, call)
        handler = Attentions(self, call)
        if not handler.is_needed:
            return execute(model, conds, x, timestep, options)
        options, compiled = internals.without_compile(options)
        if compiled and not self.without_compile:
            self.without_compile = True
            logging.warning(
                "%s: torch.compile is left out of this run, since it would leave out the attention patches.",
                self.session.names,
            )
        result = execute(model, conds, x, timestep, self.family.hooked(options, handler))
        handler.check_reached()
        return result

    def gather(self, model: Any, conds: list, device: torch.device, timestep: Tensor, call: ModelCall) -> None:
        """Replay the streams of the call's recipes that no cache holds, for the conditionings that will be computed."""
        roles = [call.roles[cond["uuid"]] for group in conds for cond in group or () if cond["uuid"] in call.roles]
        wanted: dict[Run, set[int]] = {}  # run -> {row}
        for recipe in call.recipes:
            for run, row in recipe.streams:
                features = self.session.context.evaluation_of(recipe, run, call.key).features
                own = [refusals.role_of_stream(recipe, run, role) for role in roles]
                if not all((role, site) in features for role in own for site in recipe.window.sites):
                    wanted.setdefault(run, set()).add(row)
        for run, rows in wanted.items():
            comfy.model_management.throw_exception_if_processing_interrupted()
            self.replay(model, roles, device, timestep, call, run, rows_to_replay(run, rows))

    def replay(
        self,
        model: Any,
        roles: list[CondRole],
        device: torch.device,
        timestep: Tensor,
        call: ModelCall,
        run: Run,
        rows: list[int],
    ) -> None:
        """Evaluate the model on a run's own latents, conditioning and options, for some conditionings of the target,
        and hold what the recipes select of it.
        """
        readers = [
            (recipe, number, rows.index(stream.row))
            for recipe in call.recipes
            for number, stream in enumerate(recipe.streams)
            if stream.run is run and stream.row in rows
        ]

        def select(site: Site, role: CondRole, n: Tensor, grid: tuple[int, int]) -> None:
            for recipe, number, row in readers:
                if site in recipe.window.sites:
                    call.selected[recipe, number, role, site] = recipe.select(number, n[row : row + 1], grid)

        own = self.conds_on(run, rows, model, device)
        served = dict.fromkeys(refusals.role_of_stream(readers[0][0], run, role).role for role in roles)
        evaluation, number = run.evaluation(call.key)
        assert evaluation is not None  # gather has asked for it
        biases = self.session.acting_biases(run.biases, call.key[0], run.sigmas)
        replayed = ModelCall(call.key, run.roles, biases, record=select)
        self.compute(
            internals.evaluate,
            model,
            [own[role] for role in served],
            evaluation.x[rows].to(device),
            timestep[:1].expand(len(rows)),
            run.options[number],
            replayed,
        )

    # ------------------------------------------------------------ what a call reads

    def sources(
        self, call: ModelCall, recipe: Recipe, role: CondRole, site: Site, grid: tuple[int, int], like: Tensor
    ) -> list[Tensor]:
        """What a recipe selected of its streams for one conditioning of the target at one site, on its device."""
        found = []
        for number, (run, row) in enumerate(recipe.streams):
            own = refusals.role_of_stream(recipe, run, role)
            selected = call.selected.get((recipe, number, own, site))
            if selected is None:
                evaluation = self.session.context.evaluation_of(recipe, run, call.key)
                features = evaluation.features.get((own, site))
                if features is None:
                    raise refusals.missing_conditioning(recipe, number, role.role, call.key[0])
                selected = recipe.select(number, features[row : row + 1], grid)
            found.append(selected.to(like))
        return found

    def conds_on(self, run: Run, rows: list[int], model: Any, device: torch.device) -> dict[str, list[dict]]:
        key = run, tuple(rows)
        if key not in self.conds:
            conds = conds_of(run, rows, device)
            for group in conds.values():
                internals.prepare_controls(model, group)
            self.move_patches(run, device)
            self.conds[key] = conds
        return self.conds[key]

    def close(self) -> None:
        """Let go of everything that was held for the run, however it ended."""
        for (run, _), conds in self.conds.items():
            internals.release(conds)
            self.move_patches(run, self.session.context.model.offload_device)
        self.conds = {}
        self.prepared = {}

    @staticmethod
    def move_patches(run: Run, device: torch.device) -> None:
        for options in run.options.values():
            internals.move_patches(options, device)


class Attentions(SiteHandler):
    """What happens at the attentions of one model call."""

    def __init__(self, engine: Engine, call: ModelCall) -> None:
        self.engine, self.call = engine, call
        self.names, self.size = engine.session.names, engine.session.context.size
        self.acts_on_self_attention = bool(call.recipes or call.record)
        self.packed_sites = frozenset(s for recipe in call.recipes if recipe.several_terms for s in recipe.window.sites)
        self.measured_sites = frozenset(site for live in call.maps for site in live.wanted.sites)
        self.biased_sites = frozenset(site for bias, _ in call.biases.values() for site in bias.window.sites)
        self.reached: set[Site] = set()  # self-attentions
        self.biased: dict[Any, set[Site]] = {}  # uuid -> attentions to text that were biased

    @property
    def is_needed(self) -> bool:
        return self.acts_on_self_attention or bool(self.measured_sites or self.biased_sites)

    def self_attention(self, attention: SelfAttention) -> SelfAttentionRows | None:
        """Record the rows, and compose them as the recipes say."""
        site, uuids, n, grid, latent_size = attention
        refusals.check_tokens(self.names, self.size, latent_size, n.shape[1], grid)
        self.reached.add(site)
        known = [self.call.roles.get(uuid) for uuid in uuids]
        roles = [role for role in known if role is not None]
        if not roles:  # another node's own conditionings (Perp-Neg): neither recorded nor composed
            return None
        if len(roles) < len(known):
            raise refusals.some_are_foreign(self.names)
        if self.call.record:
            for role, part in zip(roles, n.chunk(len(roles))):
                self.call.record(site, role, part, grid)
        rows: SelfAttentionRows | None = None
        for recipe in self.call.recipes:
            if site in recipe.window.sites:
                self.engine.session.acted.add(recipe)
                rows = self.composed(recipe, site, roles, rows or SelfAttentionRows(n, n, n), grid)
        return rows

    def composed(
        self, recipe: Recipe, site: Site, roles: list[CondRole], rows: SelfAttentionRows, grid: tuple[int, int]
    ) -> SelfAttentionRows:
        context, count = self.engine.session.context, len(roles)
        terms: list[list[AttentionTerm]] = []
        for role, *target in zip(roles, *(part.chunk(count) for part in (rows.q, rows.k, rows.v))):
            sources = self.engine.sources(self.call, recipe, role, site, grid, rows.q)
            terms.append(recipe.attend(context, TargetRows(*target), sources, grid))
        return SelfAttentionRows(*pack(terms, rows.q.shape[0] // count, rows.q.shape[1]))

    def text_attention(self, attention: TextAttention) -> None:
        """Measure where the model looks for words."""
        refusals.check_measured(self.names, self.size, attention.latent_size)
        for live in self.call.maps:
            live.look(attention)

    def bias(self, attention: TextAttention) -> list[Tensor | None]:
        """The biases of the conditionings, and where they were asked for."""
        refusals.check_biased(self.engine.session.biased_nodes or self.names, self.size, attention)
        count, found = len(attention.uuids), []
        parts = zip(attention.uuids, attention.q.chunk(count), attention.k.chunk(count))
        for uuid, q, k in parts:
            bias, tokens = self.call.biases.get(uuid, (None, 0))
            if bias is None or attention.site not in bias.window.sites:
                found.append(None)
                continue
            self.biased.setdefault(uuid, set()).add(attention.site)
            found.append(self.biased_by(bias, tokens, attention._replace(uuids=[uuid], q=q, k=k)))
        return found

    def biased_by(self, bias: Bias, tokens: int, attention: TextAttention) -> Tensor:
        """One conditioning's bias, [B, 1, tokens, text tokens]."""
        length, q = attention.k.shape[1], attention.q
        refusals.check_text(bias.node, tokens, length)
        key = bias, attention.grid, tokens, length, q.device, q.dtype
        prepared = self.engine.prepared
        if key not in prepared:
            prepared[key] = bias.prepare(attention.grid, tokens, length // tokens, q)
        return bias.bias(prepared[key], attention, self.call.key[0])

    def check_reached(self) -> None:
        """Refuse a call in which blocks were left out or run in another node's own way."""
        for recipe in self.call.recipes:
            missing = [site for site in recipe.window.sites if site not in self.reached]
            if missing:
                raise refusals.never_reached(recipe.node, missing, len(recipe.window.sites))
        for uuid, reached in self.biased.items():
            bias, _ = self.call.biases[uuid]
            missing = [site for site in bias.window.sites if site not in reached]
            if missing:
                raise refusals.never_reached(bias.node, missing, len(bias.window.sites), "cross-attention")

    def wrong_result(self, site: Site, got: tuple[int, ...], queries: tuple[int, ...]) -> ValueError:
        return refusals.wrong_result(self.names, site, got, queries)

    def wrong_rows(self, site: Site, got: tuple[int, ...], wanted: tuple[int, ...]) -> ValueError:
        return refusals.wrong_rows(self.names, site, got, wanted)
