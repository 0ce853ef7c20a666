"""What a recorded run takes down: its latents, conditioning and options, and attention features within a budget."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from . import internals, refusals, transfers
from .attention_maps import LiveAttentionMap
from .device_cache import DeviceCache
from .models import SelfAttention, Site, family_of
from .streams import CallKey, CondRole, Evaluation, Recording, Run, recorded_conds, roles_of


class Record(NamedTuple):
    """What takes down self-attentions. take: (site, conditionings, rows [conditionings, B, tokens, C], grid (h, w)).
    sites: where.
    """

    take: Callable[[Site, list[CondRole], torch.Tensor, tuple[int, int]], None]
    sites: frozenset[Site]


class Recorder:
    """Fills a Run, and hands it to its Recordings when it is finished."""

    def __init__(self, run: Run, model: ModelPatcher, recordings: Sequence[Recording], last_sigma: float) -> None:
        """last_sigma: of the last step, where the graph cut's features are taken."""
        self.run, self.model, self.recordings, self.last_sigma = run, model, recordings, last_sigma
        self.recording = max(recordings, key=lambda recording: recording.budget)  # whose budget counts
        self.keeps_features = self.recording.budget > 0
        self.kept, self.room = 0, 0  # bytes of features: of the run so far, and that the recording has made room for
        family = family_of(model)
        self.cut_site, self.sites = family.cut_site(), frozenset(family.sites())
        self.has_levels = family.is_unet  # so that its sites hold features of different sizes
        self.has_place = False  # whether it has been chosen where the features go

    def begin_call(self, key: CallKey, conds: dict[str, list[dict]], x: torch.Tensor, options: dict) -> Record | None:
        """Take down what goes into an evaluation of the model; return what records the target's attention inputs, or
        None where nothing is to be recorded of them. options: of internals.recorded_options.
        """
        if not self.run.conds:
            self.run.conds = recorded_conds(conds)
        evaluation = self.run.evaluations[key] = Evaluation(x, options)
        self.keeps_features &= self.has_room(self.run.evaluation_bytes)
        if self.keeps_features and self.run.evaluation_bytes and not self.has_place:
            self.choose_place((len(roles_of(conds)) * len(x), *x.shape[1:]))
        is_last = key[0] <= self.last_sigma and key[2] == 0
        if not self.keeps_features and not is_last:
            return None

        def record(site: Site, roles: list[CondRole], rows: torch.Tensor, grid: tuple[int, int]) -> None:
            if self.keeps_features:
                self.keep(evaluation, site, roles, rows)
            if is_last and site == self.cut_site:
                for role, part in zip(roles, rows):
                    self.run.keep_cut_features(self.model, role, part, grid)

        return Record(record, self.sites if self.keeps_features else frozenset([self.cut_site]))

    def has_room(self, wanted: int) -> bool:
        """Whether `wanted` more bytes fit into the budget. The recording is asked where no room has been made yet: from
        the second evaluation on once for all its sites, since its size is known then.
        """
        total = self.kept + wanted
        # the images that a run is composed from may be recorded by the same node, and are read while it is
        if total > self.room and self.recording.make_room(total, give_up=not self.run.composed):
            self.room = total
        return total <= self.room

    def choose_place(self, shape: tuple[int, ...]) -> None:
        """Choose the model's device for the features, if it has room for all that are still to come; else they go to
        main memory, as those of the first evaluation, which tells how large they are. shape: of the batch that the
        model computes.
        """
        self.has_place = True
        wanted = min(self.run.evaluation_bytes * len(self.run.sigmas), self.recording.budget - self.kept)
        if internals.room_for(self.model, shape, wanted):
            self.run.on_device = DeviceCache(self.run.evaluations, self.model.load_device, wanted)

    def keep(self, evaluation: Evaluation, site: Site, roles: list[CondRole], rows: torch.Tensor) -> None:
        """Keep the features of one site while the budget lasts: at no moment is it exceeded. A transformer's first site
        tells how large all are together: if one evaluation does not fit, nothing is copied.
        """
        wanted = rows.nbytes
        if not self.kept and not self.has_levels:
            wanted = wanted // len(roles) * len(self.sites) * len(roles_of(self.run.conds))
        if not self.has_room(wanted):
            self.keeps_features, evaluation.features = False, {}  # part of an evaluation is of no use
            return
        self.kept += rows.nbytes
        kept = self.run.on_device and self.run.on_device.take(rows)
        kept = transfers.put_away(rows) if kept is None else kept
        evaluation.features.update(((role, site), part) for role, part in zip(roles, kept))

    def finish(self, output: torch.Tensor, maps: Sequence[LiveAttentionMap]) -> None:
        """The run has ended in `output`, [B, C, h, w]."""
        transfers.finish(self.model.load_device)
        self.run.final = output.detach().cpu()
        measured = ((live.wanted.words, live.read()) for live in maps)
        self.run.maps = {words: found.cpu() for words, found in measured if found is not None}
        for recording in self.recordings:
            recording.add(self.run)


def recording_cut_features(run: Run, guider: Any, options: dict) -> dict:
    """A copy of the model options, with which an evaluation stores the graph cut's features in `run`: for runs without
    a session (inversions).
    """
    options, _ = internals.without_compile(options)
    return family_of(guider.model_patcher).hooked(options, CutFeatures(run, guider))


class CutFeatures(refusals.OfAttention):
    """What happens at the attentions of such an evaluation: nothing else is done."""

    def __init__(self, run: Run, guider: Any) -> None:
        super().__init__("Invert Image")
        self.run, self.model, self.roles = run, guider.model_patcher, roles_of(guider.conds)
        self.site = family_of(self.model).cut_site()
        self.self_attention_sites = frozenset([self.site])

    def self_attention(self, attention: SelfAttention) -> None:
        if attention.site == self.site:
            for uuid, rows in zip(attention.uuids, attention.rows.chunk(len(attention.uuids))):
                self.run.keep_cut_features(self.model, self.roles[uuid], rows, attention.grid)
