"""The recursion at the heart of this pack: to compute an evaluation of the target, gather what its recipes read of
their streams, by replaying those that no cache holds; a replay is itself an evaluation that is computed.

Where nothing but rounding changes and the model's family prefers it (transformers, whose rows of one step take
gigabytes), streams are not replayed but go in lockstep with the target: as further images of its own batch, whose rows
are read where the target's are computed, and held no longer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch

from . import internals, refusals, transfers
from .attention_maps import LiveAttentionMap
from .bias import Bias
from .models import SelfAttention, SelfAttentionRows, Site, TextAttention, TextBias, family_of
from .recipe import Recipe
from .recorder import Record
from .streams import CallKey, CondRole, Evaluation, Run, Stream, conds_of, rows_to_replay
from .terms import TargetRows, pack

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
        options: dict | None = None,
    ) -> None:
        self.key, self.roles, self.biases, self.recipes, self.maps = key, roles, biases, recipes, maps
        self.options = options  # of the target, as they would be recorded
        self.record = record  # sees the self-attentions before the recipes
        self.beside: tuple[Stream, ...] = ()  # streams in lockstep: images of each conditioning after the target's own
        self.selected: dict[tuple[Recipe, int, CondRole, Site], Tensor] = {}  # (recipe, stream number, role, site)
        self.selected_of_all: dict[tuple[Recipe, CondRole, Site], list[Tensor]] = {}  # role: of the first stream
        self.tokens: dict[tuple[Run, Site], int] = {}  # of streams that were replayed for it


class ReplayComplete(Exception):
    """Ends a replay of which everything has been taken down that is read."""


class Engine:
    """Computes the model calls of one sampling run.

    exact: whether streams are always replayed run by run, as they were recorded to the bit; also where a recipe asks
    for it. It costs nothing, and is what happens anyway, where features are cached or all streams are of one run on a
    UNet: nothing shares a batch then that did not when it was recorded.
    """

    exact = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self.exact = self.exact or any(recipe.exact for recipe in session.recipes)
        self.family = family_of(session.context.model)
        self.conds: dict[tuple[Run, tuple[int, ...]], dict] = {}  # (run, rows) -> its conditioning, on the device
        self.prepared: dict[tuple, Any] = {}  # what biases keep for the run
        self.at_sigma: dict[tuple, tuple[float, Any]] = {}  # what they keep of it for an evaluation
        self.masks: dict[tuple, Tensor] = {}  # where they are written, of one attention after the other
        self.without_compile = False  # whether torch.compile had to be left out
        self.lockstep: bool | None = None if self.family.lockstep and not self.exact else False  # None: not tried yet
        self.alike: dict[tuple, bool] = {}  # (run, its options, others) -> whether they compute alike
        self.stacks: dict[tuple, dict | None] = {}  # what is batched -> the conditioning for the whole batch
        self.ahead: dict[tuple, transfers.Arriving] = {}  # what was fetched ahead, by what it is for
        self.next_sites: dict[Recipe, dict[Site, Site]] = {}
        self.order = {site: number for number, site in enumerate(self.family.sites())}

    def place(self, site: Site) -> int:
        """Where a site stands in the order of execution; -1 for one that the model does not have."""
        return self.order.get(site, -1)

    # ------------------------------------------------------------ compute, gather, replay

    def compute(
        self, execute: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict, call: ModelCall
    ) -> list[Tensor]:
        """One evaluation with its recipes and biases on. execute: as internals.evaluate."""
        images = len(x)
        lockstep = self.gather(model, conds, x, timestep, call)
        if lockstep:
            conds, x, timestep = lockstep
        handler = Attentions(self, call, images)
        if not handler.is_needed:
            return execute(model, conds, x, timestep, options)
        options, compiled = internals.without_compile(options)
        if compiled and not self.without_compile:
            self.without_compile = True
            logging.warning(
                "%s: torch.compile is skipped in this run: compiled graphs ignore attention patches.",
                self.session.names,
            )
        result = execute(model, conds, x, timestep, self.family.hooked(options, handler))
        handler.check_reached()
        return [out[:images] for out in result] if lockstep else result

    def gather(
        self, model: Any, conds: list, x: Tensor, timestep: Tensor, call: ModelCall
    ) -> tuple[list, Tensor, Tensor] | None:
        """Prepare what the call's recipes read of their streams, for the conditionings that will be computed: what no
        cache holds is put beside the target or replayed. Returns conditionings, latents and timesteps of the whole
        batch in lockstep, None where the target goes alone.
        """
        roles = [call.roles[cond["uuid"]] for group in conds for cond in group or () if cond["uuid"] in call.roles]
        wanted: dict[Stream, None] = {}
        for recipe in call.recipes:
            if all((call.key, role, site) in recipe.kept for role in roles for site in recipe.window.sites):
                continue
            for stream in recipe.streams:
                features = self.session.context.evaluation_of(recipe, stream.run, call.key).features
                own = [refusals.role_of_stream(recipe, stream.run, role) for role in roles]
                if not all((role, site) in features for role in own for site in recipe.window.sites):
                    wanted[stream] = None
        if not wanted:
            return None
        comfy.model_management.throw_exception_if_processing_interrupted()
        joined = None if self.lockstep is False else self.joined(model, conds, x, timestep, call, [*wanted])
        if self.lockstep is None or (self.lockstep and joined is None):
            self.lockstep = joined is not None
            how = "go in lockstep, as images of one batch" if joined else "are replayed before each evaluation"
            logging.info("%s: the recorded images %s.", refusals.in_order(r.node for r in call.recipes), how)
        if joined is None and not self.replayed_together(model, roles, x, timestep, call, [*wanted]):
            for run in dict.fromkeys(stream.run for stream in wanted):
                rows = rows_to_replay(run, {row for other, row in wanted if other is run})
                self.replay(model, roles, x.device, timestep, call, run, rows)
        return joined

    # ------------------------------------------------------------ lockstep

    def joined(
        self, model: Any, conds: list, x: Tensor, timestep: Tensor, call: ModelCall, wanted: list[Stream]
    ) -> tuple[list, Tensor, Tensor] | None:
        """Conditionings, latents and timesteps of the target with streams beside it; None where they cannot be one
        batch.
        """
        total = len(x) + len(wanted)
        known = all(cond["uuid"] in call.roles for group in conds for cond in group or ())
        if call.biases or not known or not internals.fits(model, (total, *x.shape[1:]), x.device):
            return None
        if not all(self.computes_alike(stream.run, call, call.options) for stream in wanted):
            return None
        stacks = [[self.stack(cond, wanted, model, x, call) for cond in group or ()] for group in conds]
        if any(cond is None for group in stacks for cond in group):
            return None
        call.beside = tuple(wanted)
        latents = [transfers.at_hand(self.latent_of(stream, call), x) for stream in wanted]
        stacks = [None if group is None else stack for group, stack in zip(conds, stacks)]
        return stacks, torch.cat([x, *latents]), timestep[:1].expand(total)

    @staticmethod
    def evaluation_of(run: Run, call: ModelCall) -> Evaluation:
        evaluation = run.evaluation(call.key)
        assert evaluation is not None  # gather has asked for it
        return evaluation

    def latent_of(self, stream: Stream, call: ModelCall) -> Tensor:
        return self.evaluation_of(stream.run, call).x[stream.row : stream.row + 1]

    def computes_alike(self, run: Run, call: ModelCall, options: dict | None) -> bool:
        """Whether an evaluation of a stream is computed as with other options: no biases, no other patches. options:
        the target's, or those of another run at this evaluation.
        """
        own = self.evaluation_of(run, call).options
        key = run, id(own), id(options)  # both live as long as the run
        if key not in self.alike:
            self.alike[key] = not run.biases and options is not None and internals.compute_alike(own, options)
        return self.alike[key]

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
        own = self.conds_on(run, rows, model, device)
        served = dict.fromkeys(refusals.role_of_stream(readers[0][0], run, role).role for role in roles)
        if run.is_patched_by_others:  # which may count on the batch that they met when it was recorded
            served = dict.fromkeys(run.conds)
        every = {CondRole(role, number) for role in served for number in range(len(own[role]))}

        at_once = [recipe for recipe in call.recipes if [*recipe.streams] == [Stream(run, row) for row in rows]]
        one_by_one = [reader for reader in readers if reader[0] not in at_once]

        def select(site: Site, roles: list[CondRole], n: Tensor, grid: tuple[int, int]) -> None:
            for recipe in at_once:
                self.hold_all(call, recipe, roles, site, n, grid)
            for recipe, number, row in one_by_one:
                self.hold(call, recipe, number, roles, site, n[:, row : row + 1], grid)

        record = self.record_until(call, {recipe for recipe, _, _ in readers}, every, select)
        evaluation = self.evaluation_of(run, call)
        biases = self.session.acting_biases(run.biases, call.key[0], run.sigmas)
        with contextlib.suppress(ReplayComplete):
            self.compute(
                internals.evaluate,
                model,
                [own[role] for role in served],
                evaluation.x[rows].to(device, non_blocking=True),
                timestep[:1].expand(len(rows)),
                evaluation.options,
                ModelCall(call.key, run.roles, biases, record=record),
            )

    def replayed_together(
        self, model: Any, roles: list[CondRole], x: Tensor, timestep: Tensor, call: ModelCall, wanted: list[Stream]
    ) -> bool:
        """The same for streams of several runs in one evaluation, of which every conditioning of every stream is a row.
        That changes no more than rounding. Returns whether they could share a batch.
        """
        runs = list(dict.fromkeys(stream.run for stream in wanted))
        if self.exact or len(runs) < 2:
            return False
        readers = [(r, number) for r in call.recipes for number, stream in enumerate(r.streams) if stream in wanted]
        rows: dict[tuple[Stream, CondRole], int] = {}  # place in the batch
        for reader, number in readers:
            stream = reader.streams[number]
            for role in reversed(roles):  # as ComfyUI stacks them for the target
                rows.setdefault((stream, refusals.role_of_stream(reader, stream.run, role)), len(rows))
        options = self.evaluation_of(runs[0], call).options
        if not internals.fits(model, (len(rows), *x.shape[1:]), x.device):
            return False
        if runs[0].is_patched_by_others or not all(self.computes_alike(run, call, options) for run in runs):
            return False
        key = "together", tuple(rows)
        if key not in self.stacks:
            conds = [self.conds_on(run, [row], model, x.device)[own.role][own.number] for (run, row), own in rows]
            self.stacks[key] = internals.stacked(conds, 1)
        cond = self.stacks[key]
        if cond is None:
            return False
        places = []
        for reader, number in readers:
            own = [(role, row) for (stream, role), row in rows.items() if stream == reader.streams[number]]
            places.append((reader, number, *map(list, zip(*own))))
        recipe, asked = readers[0][0], [role for stream, role in rows if stream == wanted[0]]
        # every stream has a row of its own for every conditioning of the target, all in one order
        at_once = [*recipe.streams] == wanted and len(readers) == len(wanted) and len(rows) == len(wanted) * len(roles)

        def select(site: Site, _: list[CondRole], n: Tensor, grid: tuple[int, int]) -> None:
            if at_once:
                self.hold_all(
                    call, recipe, asked, site, n[0].reshape(-1, len(asked), *n.shape[2:]).transpose(0, 1), grid
                )
                return
            for reader, number, own, rows in places:
                taken = transfers.together([n[0, row] for row in rows])[:, None]
                self.hold(call, reader, number, own, site, taken, grid)

        batch = CondRole("streams", 0)
        record = self.record_until(call, {recipe for recipe, _ in readers}, {batch}, select)
        latents = transfers.at_hand(torch.cat([self.latent_of(stream, call) for stream, _ in rows]), x)
        with contextlib.suppress(ReplayComplete):
            self.compute(
                internals.evaluate,
                model,
                [[cond]],
                latents,
                timestep[:1].expand(len(rows)),
                options,
                ModelCall(call.key, {cond["uuid"]: batch}, {}, record=record),
            )
        return True

    def hold(
        self,
        call: ModelCall,
        recipe: Recipe,
        number: int,
        roles: Sequence[CondRole],
        site: Site,
        n: Tensor,
        grid: tuple[int, int],
    ) -> None:
        """Hold what a recipe selects of a stream for an evaluation of the target. n: [conditionings, 1, tokens, C]."""
        if site in recipe.window.sites:
            call.tokens[recipe.streams[number].run, site] = n.shape[2]
            selected = recipe.select(number, n, grid)
            call.selected.update(((recipe, number, role, site), part) for role, part in zip(roles, selected))

    def hold_all(
        self,
        call: ModelCall,
        recipe: Recipe,
        roles: Sequence[CondRole],
        site: Site,
        n: Tensor,
        grid: tuple[int, int],
    ) -> None:
        """Hold what a recipe selects of all its streams at once. n: [conditionings, streams, tokens, C]. roles: of the
        first stream.
        """
        if site in recipe.window.sites:
            call.tokens[recipe.streams[0].run, site] = n.shape[2]
            selected = recipe.select_all(n, grid)
            call.selected_of_all.update(
                ((recipe, role, site), [part[number] for part in selected]) for number, role in enumerate(roles)
            )

    def record_until(self, call: ModelCall, recipes: Iterable[Recipe], every: set[CondRole], take: Callable) -> Record:
        """What takes down a replay at the sites of some recipes, and ends it as soon as it has seen the last of them in
        every conditioning: nobody reads what the model would compute after it.
        """
        sites = frozenset(site for recipe in recipes for site in recipe.window.sites)
        last = max(sites, key=self.place)
        left = set(every)

        def take_until(site: Site, roles: list[CondRole], n: Tensor, grid: tuple[int, int]) -> None:
            take(site, roles, n, grid)
            if site == last:
                left.difference_update(roles)
                if not left:
                    raise ReplayComplete

        return Record(take_until, sites)

    # ------------------------------------------------------------ what a call reads

    def sources(
        self,
        call: ModelCall,
        recipe: Recipe,
        roles: list[CondRole],
        site: Site,
        grid: tuple[int, int],
        like: Tensor,
        beside: Tensor,
    ) -> list[Tensor]:
        """What a recipe reads of its streams for the conditionings of the target at one site, on its device. beside:
        rows of the streams that go in lockstep, [conditionings, streams, tokens, C].
        """
        arriving = self.ahead.pop((call.key, tuple(roles), recipe, site), None)
        arriving = arriving or self.kept(call, recipe, roles, site, like)
        if arriving is not None:
            self.fetch_ahead(call, recipe, roles, site, like)
            sources = arriving.wait()
            for part in sources:
                if part.shape[2] != grid[0] * grid[1]:
                    raise refusals.resized(recipe, site, part.shape[2], grid[0] * grid[1])
            return sources
        if recipe.streams and call.beside == (*recipe.streams,):
            return recipe.select_all(beside, grid)
        at_once = self.selected_at_once(call, recipe, roles, site, grid)
        if at_once is not None:
            return at_once
        found, are_cached = [], True
        for number, stream in enumerate(recipe.streams):
            if stream in call.beside:
                image = call.beside.index(stream)
                selected, is_cached = recipe.select(number, beside[:, image : image + 1], grid), False
            else:
                selected, is_cached = self.selected(call, recipe, number, roles, site, grid, like)
            are_cached &= is_cached
            found.append(selected)
        # what lies on a device is merged each time: a copy there would be memory that ComfyUI does not know of
        if not recipe.merges or not are_cached or any(part.device.type != "cpu" for part in found):
            return recipe.merge([transfers.at_hand(part, like) for part in found], grid)
        merged = [transfers.ready_to_send(part, like.device) for part in recipe.merge(found, grid)]
        recipe.kept.update(
            ((call.key, role, site), [part[number] for part in merged]) for number, role in enumerate(roles)
        )
        return transfers.send(merged, like).wait()

    @staticmethod
    def selected_at_once(
        call: ModelCall, recipe: Recipe, roles: list[CondRole], site: Site, grid: tuple[int, int]
    ) -> list[Tensor] | None:
        """What a recipe selected of all its streams, which were replayed together; None where they were not."""
        if not recipe.streams:
            return None
        first = recipe.streams[0].run
        keys = [(recipe, refusals.role_of_stream(recipe, first, role), site) for role in roles]
        if not all(key in call.selected_of_all for key in keys):
            return None
        if call.tokens[first, site] != grid[0] * grid[1]:
            raise refusals.resized(recipe, site, call.tokens[first, site], grid[0] * grid[1])
        found = [transfers.together(parts) for parts in zip(*(call.selected_of_all[key] for key in keys))]
        # others may write into it, and of one role for two conditionings it is the same memory twice
        return found if len({*keys}) == len(keys) else [part.clone() for part in found]

    @staticmethod
    def kept(
        call: ModelCall, recipe: Recipe, roles: list[CondRole], site: Site, like: Tensor
    ) -> transfers.Arriving | None:
        """What was merged of cached features in an earlier run of the recipe, on its way to a tensor's device: in
        memory of its own, since others may write into it.
        """
        keys = [(call.key, role, site) for role in roles]
        if not all(key in recipe.kept for key in keys):
            return None
        return transfers.send([transfers.together(parts) for parts in zip(*(recipe.kept[key] for key in keys))], like)

    def fetch_ahead(self, call: ModelCall, recipe: Recipe, roles: list[CondRole], site: Site, like: Tensor) -> None:
        """Begin to fetch what the recipe's next site needs, where that takes time."""
        following = self.following(recipe).get(site)
        if following is None:
            return
        parts = recipe.kept.get((call.key, roles[0], following))
        if parts and parts[0].device != like.device:
            found = self.kept(call, recipe, roles, following, like)
            if found:
                self.ahead[call.key, tuple(roles), recipe, following] = found

    def following(self, recipe: Recipe) -> dict[Site, Site]:
        """Of each site of a recipe the one that is computed next."""
        if recipe not in self.next_sites:
            sites = sorted(recipe.window.sites, key=self.place)
            self.next_sites[recipe] = dict(zip(sites, sites[1:]))
        return self.next_sites[recipe]

    def selected(
        self,
        call: ModelCall,
        recipe: Recipe,
        number: int,
        roles: list[CondRole],
        site: Site,
        grid: tuple[int, int],
        like: Tensor,
    ) -> tuple[Tensor, bool]:
        """(what a recipe selects of one stream, whether it was cached)."""
        (run, row), here = recipe.streams[number], grid[0] * grid[1]
        own = [refusals.role_of_stream(recipe, run, role) for role in roles]
        if (recipe, number, own[0], site) in call.selected:
            if call.tokens[run, site] != here:
                raise refusals.resized(recipe, site, call.tokens[run, site], here)
            return transfers.together([call.selected[recipe, number, role, site] for role in own]), False
        features = self.session.context.evaluation_of(recipe, run, call.key).features
        parts = []
        for role, wanted in zip(roles, own):
            if (wanted, site) not in features:
                raise refusals.missing_conditioning(recipe, number, role.role, call.key[0])
            parts.append(features[wanted, site][row : row + 1])
            if parts[-1].shape[1] != here:
                raise refusals.resized(recipe, site, parts[-1].shape[1], here)
        if recipe.merges:
            return recipe.select(number, transfers.together(parts), grid), True
        # not worth gathering where the features lie: all rows go to the device, the next site's meanwhile
        arriving = self.ahead.pop((call.key, tuple(roles), recipe, site, number), None)
        arriving = arriving or transfers.send([transfers.together(parts)], like)
        following = self.following(recipe).get(site)
        if following is not None and parts[0].device != like.device and all((r, following) in features for r in own):
            parts = transfers.together([features[role, following][row : row + 1] for role in own])
            self.ahead[call.key, tuple(roles), recipe, following, number] = transfers.send([parts], like)
        return recipe.select(number, arriving.wait()[0], grid), True

    def conds_on(self, run: Run, rows: list[int], model: Any, device: torch.device) -> dict[str, list[dict]]:
        key = run, tuple(rows)
        if key not in self.conds:
            conds = conds_of(run, rows, device)
            for group in conds.values():
                internals.prepare_controls(model, group)
            self.move_patches(run, device)
            self.conds[key] = conds
        return self.conds[key]

    def ready(self, bias: Bias, attention: TextAttention, tokens: int, sigma: float) -> Any:
        """What a bias writes at an attention, made once for an evaluation."""
        q, k = attention.q, attention.k
        level = bias, attention.grid, tokens, k.shape[1], q.device, q.dtype
        if level not in self.prepared:
            self.prepared[level] = bias.prepare(attention.grid, tokens, k.shape[1] // tokens, q)
        key = *level, q.shape, attention.heads
        if key not in self.at_sigma or self.at_sigma[key][0] != sigma:
            self.at_sigma[key] = sigma, bias.at(self.prepared[level], sigma, attention)
        return self.at_sigma[key][1]

    def mask(self, biases: Sequence[tuple[Bias, int] | None], attention: TextAttention) -> Tensor:
        """[conditionings x B, 1, tokens, text tokens], 0 but for what the same biases wrote at the site before. biases:
        of each conditioning, with its text tokens.
        """
        q, (batch, tokens, _), text = attention.q, attention.q.shape, attention.k.shape[1]
        key = *biases, batch, tokens, text, q.device, q.dtype
        if key not in self.masks:  # attention kernels copy masks whose rows are not aligned
            self.masks[key] = q.new_zeros(batch, 1, tokens, text + -text % 16)
        return self.masks[key][..., :text]

    def close(self) -> None:
        """Let go of everything that was held for the run, however it ended."""
        for (run, _), conds in self.conds.items():
            internals.release(conds)
            self.move_patches(run, self.session.context.model.offload_device)
        for held in (self.conds, self.stacks, self.prepared, self.at_sigma, self.masks, self.ahead):
            held.clear()

    @staticmethod
    def move_patches(run: Run, device: torch.device) -> None:
        for options in run.options:
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
            every = n.reshape(len(roles), -1, *n.shape[1:])
            self.call.record.take(site, roles, every[:, : self.images], grid)
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
        context, images, beside = self.engine.session.context, self.images, len(self.call.beside)
        every = n.reshape(len(roles), -1, *n.shape[1:])
        if rows is None:
            target = TargetRows(*[every[:, :images]] * 3)
        else:
            target = TargetRows(*(t.reshape(len(roles), images, *t.shape[1:]) for t in (rows.q, rows.k, rows.v)))
        sources = self.engine.sources(self.call, recipe, roles, site, grid, n, every[:, images:])
        q, k, v, packed = pack(recipe.attend(context, target, sources, grid), images, n.shape[1])
        own = TargetRows(*(t.reshape(-1, *t.shape[2:]) for t in target)) if packed else None
        return SelfAttentionRows(q, k, v, packed, own, beside)

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

    def bias(self, attention: TextAttention) -> TextBias | None:
        """The biases of the conditionings; it is noted where they were asked for."""
        refusals.check_biased(self.engine.session.biased_nodes or self.names, self.size, attention)
        found = (self.call.biases.get(uuid) for uuid in attention.uuids)
        acting = [pair if pair and attention.site in pair[0].window.sites else None for pair in found]
        if not any(acting):
            return None
        whole = self.engine.mask(acting, attention)
        parts = (t.chunk(len(acting)) for t in (whole, attention.q, attention.k))
        for uuid, pair, out, q, k in zip(attention.uuids, acting, *parts):
            if pair:
                self.biased.setdefault(uuid, set()).add(attention.site)
                self.engine.session.acted.add(pair[0])
                self.write_bias(out, pair[0], pair[1], attention._replace(uuids=[uuid], q=q, k=k))
        return TextBias(whole, [pair is not None for pair in acting])

    def write_bias(self, out: Tensor, bias: Bias, tokens: int, attention: TextAttention) -> None:
        """One conditioning's bias, into [B, 1, tokens, text tokens]."""
        rows, tokens = self.engine.family.own_text(tokens, attention.k.shape[1])
        attention = attention._replace(k=attention.k[:, rows])
        refusals.check_text(bias.node, tokens, attention.k.shape[1])
        bias.write(out[..., rows], self.engine.ready(bias, attention, tokens, self.call.key[0]), attention)

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
