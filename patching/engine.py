"""The recursion at the heart of this pack: to compute an evaluation of the target, gather what its recipes read of
their streams, by replaying those that no cache holds; a replay is itself an evaluation that is computed.

Where nothing but rounding changes and the model's family prefers it (transformers, whose rows of one step take
gigabytes), streams are not replayed but go in lockstep with the target: as further images of its own batch, whose rows
are read where the target's are computed, and held no longer.
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
from .models import SelfAttention, SelfAttentionRows, Site, TextAttention, family_of
from .recipe import Recipe
from .recorder import Record
from .streams import CallKey, CondRole, Run, Stream, conds_of, rows_to_replay
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
        self.beside: tuple[Stream, ...] = ()  # streams in lockstep: images of each conditioning after the target's own
        self.selected: dict[tuple[Recipe, int, CondRole, Site], Tensor] = {}  # (recipe, stream number, role, site)
        self.tokens: dict[tuple[Run, Site], int] = {}  # of streams that were replayed for it


class Engine:
    """Computes the model calls of one sampling run.

    exact: whether streams are always replayed, as they were recorded to the bit.
    """

    exact = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self.family = family_of(session.context.model)
        self.conds: dict[tuple[Run, tuple[int, ...]], dict] = {}  # (run, rows) -> its conditioning, on the device
        self.prepared: dict[tuple, Any] = {}  # what biases keep for the run
        self.without_compile = False  # whether torch.compile had to be left out
        self.lockstep: bool | None = None if self.family.lockstep and not self.exact else False  # None: not tried yet
        self.alike: dict[tuple[Run, int], bool] = {}  # (run, call) -> whether its options are those of the run at hand
        self.stacks: dict[tuple, dict | None] = {}  # (uuid, streams) -> the conditioning for the whole batch

    # ------------------------------------------------------------ compute, gather, replay

    def compute(
        self, execute: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, call: ModelCall
    ) -> list[Tensor]:
        """One evaluation with its recipes and biases on. execute: as internals.evaluate."""
        images = len(x)
        lockstep = self.gather(model, conds, x, timestep, options, call)
        if lockstep:
            conds, x, timestep = lockstep
        handler = Attentions(self, call, images)
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
        return [out[:images] for out in result] if lockstep else result

    def gather(
        self, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, call: ModelCall
    ) -> tuple[list, Tensor, Tensor] | None:
        """Prepare what the call's recipes read of their streams, for the conditionings that will be computed: what no
        cache holds is put beside the target or replayed. Returns conditionings, latents and timesteps of the whole
        batch in lockstep, None where the target goes alone.
        """
        roles = [call.roles[cond["uuid"]] for group in conds for cond in group or () if cond["uuid"] in call.roles]
        wanted: dict[Stream, None] = {}
        for recipe in call.recipes:
            for stream in recipe.streams:
                features = self.session.context.evaluation_of(recipe, stream.run, call.key).features
                own = [refusals.role_of_stream(recipe, stream.run, role) for role in roles]
                if not all((role, site) in features for role in own for site in recipe.window.sites):
                    wanted[stream] = None
        if not wanted:
            return None
        comfy.model_management.throw_exception_if_processing_interrupted()
        joined = None if self.lockstep is False else self.joined(model, conds, x, timestep, options, call, [*wanted])
        if self.lockstep is None or (self.lockstep and joined is None):
            self.lockstep = joined is not None
            how = "go in lockstep, as images of one batch" if joined else "are replayed before each evaluation"
            logging.info("%s: the recorded images %s.", refusals.in_order(r.node for r in call.recipes), how)
        if joined is None:
            for run in dict.fromkeys(stream.run for stream in wanted):
                rows = rows_to_replay(run, {row for other, row in wanted if other is run})
                self.replay(model, roles, x.device, timestep, call, run, rows)
        return joined

    # ------------------------------------------------------------ lockstep

    def joined(
        self, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, call: ModelCall, wanted: list[Stream]
    ) -> tuple[list, Tensor, Tensor] | None:
        """Conditionings, latents and timesteps of the target with streams beside it; None where they cannot be one
        batch.
        """
        total = len(x) + len(wanted)
        known = all(cond["uuid"] in call.roles for group in conds for cond in group or ())
        if call.biases or not known or not internals.fits(model, (total, *x.shape[1:]), x.device):
            return None
        if not all(self.computes_alike(stream.run, options, call) for stream in wanted):
            return None
        stacks = [[self.stack(cond, wanted, model, x, call) for cond in group or ()] for group in conds]
        if any(cond is None for group in stacks for cond in group):
            return None
        call.beside = tuple(wanted)
        latents = [self.latent_of(stream, call).to(x) for stream in wanted]
        stacks = [None if group is None else stack for group, stack in zip(conds, stacks)]
        return stacks, torch.cat([x, *latents]), timestep[:1].expand(total)

    @staticmethod
    def latent_of(stream: Stream, call: ModelCall) -> Tensor:
        evaluation, _ = stream.run.evaluation(call.key)
        assert evaluation is not None  # gather has asked for it
        return evaluation.x[stream.row : stream.row + 1]

    def computes_alike(self, run: Run, options: dict, call: ModelCall) -> bool:
        """Whether an evaluation of a stream is computed as the target's: no biases, no other patches."""
        _, number = run.evaluation(call.key)
        if (run, number) not in self.alike:
            self.alike[run, number] = not run.biases and internals.compute_alike(run.options[number], options)
        return self.alike[run, number]

    def stack(self, cond: dict, wanted: list[Stream], model: Any, x: Tensor, call: ModelCall) -> dict | None:
        """One conditioning of the target with those that serve it of the streams."""
        key = cond["uuid"], len(x), tuple(wanted)
        if key not in self.stacks:
            found = [cond]
            for run, row in wanted:
                recipe = next(r for r in call.recipes if Stream(run, row) in r.streams)
                own = refusals.role_of_stream(recipe, run, call.roles[cond["uuid"]])
                found.append(self.conds_on(run, [row], model, x.device)[own.role][own.number])
            self.stacks[key] = internals.stacked(found, len(x))
        return self.stacks[key]

    # ------------------------------------------------------------ replay

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

        sites = frozenset(site for recipe, _, _ in readers for site in recipe.window.sites)

        def select(site: Site, role: CondRole, n: Tensor, grid: tuple[int, int]) -> None:
            call.tokens[run, site] = n.shape[1]
            for recipe, number, row in readers:
                if site in recipe.window.sites:
                    call.selected[recipe, number, role, site] = recipe.select(number, n[row : row + 1], grid)

        own = self.conds_on(run, rows, model, device)
        served = dict.fromkeys(refusals.role_of_stream(readers[0][0], run, role).role for role in roles)
        if run.is_patched_by_others:  # which may count on the batch that they met when it was recorded
            served = dict.fromkeys(run.conds)
        evaluation, number = run.evaluation(call.key)
        assert evaluation is not None  # gather has asked for it
        biases = self.session.acting_biases(run.biases, call.key[0], run.sigmas)
        replayed = ModelCall(call.key, run.roles, biases, record=Record(select, sites))
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
        self,
        call: ModelCall,
        recipe: Recipe,
        role: CondRole,
        site: Site,
        grid: tuple[int, int],
        like: Tensor,
        beside: Tensor,
    ) -> list[Tensor]:
        """What a recipe selects of its streams for one conditioning of the target at one site, on its device. beside:
        rows of the streams that go in lockstep, [streams, tokens, C].
        """
        found, here = [], grid[0] * grid[1]
        for number, (run, row) in enumerate(recipe.streams):
            if Stream(run, row) in call.beside:
                image = call.beside.index(Stream(run, row))
                found.append(recipe.select(number, beside[image : image + 1], grid))
                continue
            own = refusals.role_of_stream(recipe, run, role)
            selected = call.selected.get((recipe, number, own, site))
            if selected is None:
                evaluation = self.session.context.evaluation_of(recipe, run, call.key)
                features = evaluation.features.get((own, site))
                if features is None:
                    raise refusals.missing_conditioning(recipe, number, role.role, call.key[0])
                if features.shape[1] != here:
                    raise refusals.resized(recipe, site, features.shape[1], here)
                selected = recipe.select(number, features[row : row + 1], grid)
            elif call.tokens[run, site] != here:
                raise refusals.resized(recipe, site, call.tokens[run, site], here)
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
        self.conds, self.stacks, self.prepared = {}, {}, {}

    @staticmethod
    def move_patches(run: Run, device: torch.device) -> None:
        for options in run.options.values():
            internals.move_patches(options, device)


class Attentions(refusals.OfAttention):
    """What happens at the attentions of one model call. images: of the target."""

    def __init__(self, engine: Engine, call: ModelCall, images: int) -> None:
        super().__init__(engine.session.names)
        self.engine, self.call, self.images = engine, call, images
        self.size = engine.session.context.size
        composed = [site for recipe in call.recipes for site in recipe.window.sites]
        self.self_attention_sites = frozenset(composed).union(call.record.sites if call.record else ())
        self.packed_sites = frozenset(s for recipe in call.recipes if recipe.several_terms for s in recipe.window.sites)
        self.measured_sites = frozenset(site for live in call.maps for site in live.wanted.sites)
        self.biased_sites = frozenset(site for bias, _ in call.biases.values() for site in bias.window.sites)
        self.reached: set[Site] = set()  # self-attentions
        self.biased: dict[Any, set[Site]] = {}  # uuid -> attentions to text that were biased

    @property
    def is_needed(self) -> bool:
        return bool(self.self_attention_sites or self.measured_sites or self.biased_sites)

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
        if self.call.record and site in self.call.record.sites:
            for role, part in zip(roles, n.chunk(len(roles))):
                self.call.record.take(site, role, part[: self.images], grid)
        rows: SelfAttentionRows | None = None
        for recipe in self.call.recipes:
            if site in recipe.window.sites:
                self.engine.session.acted.add(recipe)
                rows = self.composed(recipe, site, roles, rows, n, grid)
        return rows

    def composed(
        self,
        recipe: Recipe,
        site: Site,
        roles: list[CondRole],
        rows: SelfAttentionRows | None,
        n: Tensor,
        grid: tuple[int, int],
    ) -> SelfAttentionRows:
        """rows: what earlier recipes made of n, None if there were none."""
        context, count, beside = self.engine.session.context, len(roles), len(self.call.beside)
        parts = n.chunk(count)
        if rows is None:
            own = torch.cat([part[: self.images] for part in parts]) if beside else n
            rows = SelfAttentionRows(own, own, own, beside=beside)
        terms: list[list[AttentionTerm]] = []
        for role, part, *target in zip(roles, parts, *(t.chunk(count) for t in (rows.q, rows.k, rows.v))):
            sources = self.engine.sources(self.call, recipe, role, site, grid, rows.q, part[self.images :])
            terms.append(recipe.attend(context, TargetRows(*target), sources, grid))
        q, k, v, packed = pack(terms, rows.q.shape[0] // count, rows.q.shape[1])
        return SelfAttentionRows(q, k, v, packed, TargetRows(rows.q, rows.k, rows.v) if packed else None, beside)

    def text_attention(self, attention: TextAttention) -> None:
        """Measure where the model looks for words."""
        refusals.check_measured(self.names, self.size, attention.latent_size)
        if self.call.beside:
            q, k = (self.of_target(t, len(attention.uuids)) for t in (attention.q, attention.k))
            attention = attention._replace(q=q, k=k, images=len(q))
        count = len(attention.uuids)
        for live in self.call.maps:
            for uuid, q, k in zip(attention.uuids, attention.q.chunk(count), attention.k.chunk(count)):
                if uuid in live.lengths:
                    rows, tokens = self.engine.family.own_text(live.lengths[uuid], k.shape[1])
                    live.look(attention._replace(uuids=[uuid], q=q, k=k[:, rows]), tokens)

    def of_target(self, t: Tensor, count: int) -> Tensor:
        """The target's images of `count` conditionings, without those beside them."""
        return t.unflatten(0, (count, -1))[:, : self.images].flatten(0, 1)

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
            self.engine.session.acted.add(bias)
            found.append(self.biased_by(bias, tokens, attention._replace(uuids=[uuid], q=q, k=k)))
        return found

    def biased_by(self, bias: Bias, tokens: int, attention: TextAttention) -> Tensor:
        """One conditioning's bias, [B, 1, tokens, text tokens]."""
        whole, q = attention.k.shape[1], attention.q
        rows, tokens = self.engine.family.own_text(tokens, whole)
        attention = attention._replace(k=attention.k[:, rows])
        length = attention.k.shape[1]
        refusals.check_text(bias.node, tokens, length)
        key = bias, attention.grid, tokens, length, q.device, q.dtype
        prepared = self.engine.prepared
        if key not in prepared:
            prepared[key] = bias.prepare(attention.grid, tokens, length // tokens, q)
        found = bias.bias(prepared[key], attention, self.call.key[0])
        return found if length == whole else torch.nn.functional.pad(found, (rows.start, whole - rows.stop))

    def check_reached(self) -> None:
        """Refuse a call in which blocks were left out or run in another node's own way."""
        for recipe in self.call.recipes:
            missing = [site for site in recipe.window.sites if site not in self.reached]
            if missing:
                raise refusals.never_reached(recipe.node, missing, len(recipe.window.sites))
        for uuid, reached in self.biased.items():
            bias, _ = self.call.biases[uuid]
            wanted = self.engine.family.text_sites.intersection(bias.window.sites)
            missing = [site for site in bias.window.sites if site in wanted - reached]
            if missing:
                raise refusals.never_reached(bias.node, missing, len(wanted), "cross-attention")
