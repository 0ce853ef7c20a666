"""Streams: the denoising trajectories of finished runs, and the LATENT that carries them.

A run remembers, for every evaluation of its model, the latent that went in. With it and the run's conditioning and
options the evaluation can be done again, exactly (replay). Within a budget it also keeps what the self-attention of
every site saw (the cache).
"""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from . import internals, transfers
from .bias import Bias, biases_of
from .device_cache import DeviceCache
from .models import Site, family_of
from .schedule import in_words, levels, why_apart
from .weights import Weights

Tensor = torch.Tensor
CallKey = tuple[float, int, int]  # of an evaluation: sigma, visit of that sigma, call of the model within the visit

LATENT_KEY = "montage"  # where a LATENT dict carries its Recording
INVERSION = "ddim inversion"  # what stands for the sampler of a run that an inversion found
TRAJECTORIES = 1 << 29  # bytes of trajectories that a recording may hold at least, whatever its budget


class CondRole(NamedTuple):
    """One conditioning of a run: its role ("positive", "negative", ...) and its number within the role."""

    role: str
    number: int


class Evaluation:
    """One evaluation of the model: the latents that went in, x [B, C, h, w], the model options, and what was kept of
    its attention: features[role, site] = rows [B, tokens, channels], empty when it is to be replayed. All in main
    memory, where they are complete after transfers.finish; features also on the model's device (DeviceCache).
    """

    def __init__(self, x: Tensor, options: dict) -> None:
        """options: of internals.recorded_options, one object for all evaluations that have the same."""
        self.x, self.options = transfers.put_away(x.detach()), options
        self.features: dict[tuple[CondRole, Site], Tensor] = {}

    @property
    def bytes(self) -> int:
        """Of its features."""
        return sum(n.nbytes for n in self.features.values())


class Run:
    """One sampling run of a batch of B images, each of them a stream. Filled while it samples, constant afterwards."""

    def __init__(
        self,
        weights: Weights,
        sampler: str,
        sigmas: Tensor,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None,
        composed: str = "",
        heeds_bias: bool = False,
    ) -> None:
        self.weights, self.sampler = weights, sampler
        self.composed = composed  # the names of the recipes that it was sampled with: such a run cannot be replayed
        self.heeds_bias = heeds_bias  # whether biases that its conditioning carries act
        self.sigmas = levels(sigmas)
        self.noise, self.latent_image = noise.cpu(), latent_image.cpu()
        self.denoise_mask = None if denoise_mask is None else denoise_mask.cpu()
        self.evaluations: dict[CallKey, Evaluation] = {}  # in their order
        self.conds: dict[str, list[dict]] = {}  # role -> processed conditionings
        self.keys: dict[CondRole, Tensor] = {}  # the graph cut's features at the lowest sigma, [B, tokens, channels]
        self.keys_grid: tuple[int, int] | None = None  # (h, w) of those tokens
        self.maps: dict[str, Tensor] = {}  # words -> their attention map, [B, h, w] in [0, 1] (Token Attention Map)
        self.on_device: DeviceCache | None = None  # the features that lie on the model's device; None: none ever did
        self.final: Tensor  # [B, C, h, w], what the sampler returned; of a finished run

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        height, width = self.noise.shape[-2:]
        return height, width

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) of the pictures, in pixels."""
        height, width = self.size
        return self.weights.scale * height, self.weights.scale * width

    @property
    def images(self) -> int:
        return self.noise.shape[0]

    @property
    def roles(self) -> dict[Any, CondRole]:
        """Which conditioning a uuid is, that ComfyUI gave it for this run."""
        return roles_of(self.conds)

    @property
    def biases(self) -> dict[Any, tuple[Bias, int]]:
        """{uuid: (bias, text tokens)} of the conditionings that are biased."""
        return biases_of(self.conds) if self.heeds_bias else {}

    @property
    def options(self) -> list[dict]:
        """The model options of its evaluations, each once."""
        return list({id(evaluation.options): evaluation.options for evaluation in self.evaluations.values()}.values())

    @property
    def is_patched_by_others(self) -> bool:
        """Whether another pack changes what its evaluations compute."""
        return any(map(internals.is_patched_by_others, self.options))

    @functools.cached_property
    def served(self) -> dict[str, str]:
        """Map each role to the first role with identical conditioning, so that one evaluation serves both. Valid once
        the run is finished.

        Patches that tell the CFG halves apart (IPAdapter reads cond_or_uncond) make them different evaluations even
        where the text is the same.
        """
        if self.is_patched_by_others:
            return {role: role for role in self.conds}
        same = internals.same_conditioning
        return {
            role: next(first for first, earlier in self.conds.items() if first == role or same(earlier, group))
            for role, group in self.conds.items()
        }

    @property
    def evaluation_bytes(self) -> int:
        """What the features of one evaluation take, as far as it is known."""
        return next((e.bytes for e in self.evaluations.values()), 0)

    @property
    def feature_bytes(self) -> int:
        return sum(e.bytes for e in self.evaluations.values())

    @property
    def trajectory_bytes(self) -> int:
        return sum(e.x.nbytes for e in self.evaluations.values())

    def forget_features(self) -> None:
        for evaluation in self.evaluations.values():
            evaluation.features = {}

    def visits(self, sigma: float) -> int:
        return sum(key[0] == sigma and key[2] == 0 for key in self.evaluations)

    def visit_that_continues(self, sigma: float) -> int:
        """The visit of a sigma with which a run that starts there continues: not the one that ends the step before
        (Heun's corrector).
        """
        return max(0, self.visits(sigma) - (self.visits(self.sigmas[0]) or 1))

    def evaluation(self, key: CallKey) -> Evaluation | None:
        """The evaluation for one of a target; None where the run was not at this sigma. A call that the run did not
        make (the target has PAG, the recording had not) is answered with the first of the visit.
        """
        sigma, visit, _ = key
        return self.evaluations.get(key) or self.evaluations.get((sigma, visit, 0))

    def keep_cut_features(self, model: ModelPatcher, role: CondRole, rows: Tensor, grid: tuple[int, int]) -> None:
        """Keep the graph cut's features of rows at the family's cut site."""
        self.keys[role], self.keys_grid = family_of(model).cut_features(rows).to("cpu", copy=True), grid


def roles_of(conds: dict[str, list[dict]]) -> dict[Any, CondRole]:
    return {cond["uuid"]: CondRole(role, number) for role, group in conds.items() for number, cond in enumerate(group)}


class Recording:
    """What a recorder hands to a LATENT: the runs that its MODEL made, oldest first.

    Samplers copy the LATENT dict, so the reference arrives in what they return; `find` pairs a latent with the run that
    ended in it. Runs keep their trajectories (small) until there are more than a budget of them, and their features
    (large) within the budget: the oldest go first.
    """

    living: weakref.WeakSet[Recording] = weakref.WeakSet()

    def __init__(self, budget: int = 0) -> None:
        self.budget = budget  # bytes of features of all runs together, at every moment
        self.runs: list[Run] = []
        Recording.living.add(self)

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        self.runs = [*self.runs, run]
        total = sum(kept.trajectory_bytes for kept in self.runs)
        while total > max(self.budget, TRAJECTORIES) and len(self.runs) > 1:
            oldest, *self.runs = self.runs
            total -= oldest.trajectory_bytes
        kept = sum(bool(e.features) for e in run.evaluations.values())
        logging.info(
            "Feature Recorder: %d images, %d evaluations at %dx%d; features of %d kept (%.1f MB%s), the others are"
            " replayed.",
            run.images,
            len(run.evaluations),
            *run.size,
            kept,
            run.feature_bytes / 2**20,
            f", {run.on_device.loaded_size() / 2**20:.1f} MB of them on the GPU" if run.on_device else "",
        )

    def make_room(self, wanted: int, give_up: bool = True) -> bool:
        """Whether `wanted` bytes of features of a run that is being recorded fit into the budget. Features of earlier
        runs may be given up for that, the oldest first.
        """
        left = self.budget - wanted
        held = [run for run in self.runs if run.feature_bytes]
        while left >= 0 and give_up and sum(run.feature_bytes for run in held) > left:
            held.pop(0).forget_features()
        return sum(run.feature_bytes for run in held) <= left

    def find(self, sample: Tensor) -> tuple[float, Stream] | None:
        """(distance, stream) of the stream that ended in `sample` [C, h, w], the nearest; None if there is none."""
        found = [
            (distance(final, sample), Stream(run, row))
            for run in reversed(self.runs)
            for row, final in enumerate(run.final)
        ]
        return min(((far, stream) for far, stream in found if far is not None), key=lambda pair: pair[0], default=None)


def distance(final: Tensor, sample: Tensor) -> float | None:
    """How far a latent [C, h, w] is from a run's result, at most; None where it is another one.

    Rounding is admitted: fp16 intermediates keep 11 bits of a value, and a sampler's second output differs in the last
    step. Two images differ by a hundred times that.
    """
    if final.shape != sample.shape:
        return None
    sample = sample.to(final)
    if not torch.allclose(final, sample, rtol=2e-3, atol=1e-2):
        return None
    return float((final - sample).abs().max())


class Stream(NamedTuple):
    """One image's trajectory: a row of a run."""

    run: Run
    row: int


def streams_of(node: str, latents: Iterable[dict]) -> list[Stream]:
    """The streams of recorded LATENTs, one for each image, in order.

    node: the display name for messages. Raises ValueError for a latent that no recorder saw, or that was changed
    or joined from several recordings afterwards.
    """
    return [
        _stream_of(node, number, row, sample, latent.get(LATENT_KEY))
        for number, latent in enumerate(latents)
        for row, sample in enumerate(latent["samples"])
    ]


def _stream_of(node: str, number: int, row: int, sample: Tensor, recording: Recording | None) -> Stream:
    """The stream that ended in one row of a latent. Nodes that return a LATENT of their own lose its Recording, and
    those that rebatch latents mix them: the run is then looked for in all that are still alive.
    """
    if not torch.isfinite(sample).all():
        raise ValueError(
            f"{node}: latent {number} holds NaN or infinite values: sampling it failed. Decode it to check; a VAE or"
            " model in half precision, or a very high CFG, often does that."
        )
    others = [other for other in list(Recording.living) if other is not recording]
    found = (recording and recording.find(sample)) or min(
        (pair for pair in (other.find(sample) for other in others) if pair), key=lambda pair: pair[0], default=None
    )
    if found:
        return found[1]
    if recording is None:
        raise ValueError(
            f"{node}: latent {number} was not recorded. Connect MODEL and LATENT of a Feature Recorder to the sampler"
            " that makes it, and use the LATENT that it returns; or invert an existing picture with Invert Image."
        )
    raise ValueError(
        f"{node}: row {row} of latent {number} ({'x'.join(map(str, sample.shape))}) is not the result of a recorded"
        f" run: its recorder holds {len(recording.runs)} runs and none ends in it. Connect the sampler's output"
        " itself, not a latent that was joined, resized, loaded or edited afterwards."
    )


def check_together(
    node: str, streams: Sequence[Stream], model: ModelPatcher | None = None, names: Sequence[str] | None = None
) -> None:
    """All streams must have one size and one schedule, and the weights of `model` where one is given. names: of the
    streams, for messages.
    """
    first = streams[0].run
    names = names or [f"image {number}" for number in range(len(streams))]
    weights = model and Weights(model)
    for name, (run, _) in zip(names, streams):
        if run.size != first.size:
            raise ValueError(
                f"{node}: {names[0]} was recorded at {first.size[0]}x{first.size[1]} latent pixels and {name} at "
                f"{run.size[0]}x{run.size[1]}. Sample all of them at one size."
            )
        if run.sigmas != first.sigmas:
            raise ValueError(
                f"{node}: {names[0]} was recorded over {in_words(first.sigmas)} and {name} over {in_words(run.sigmas)}."
                f" Sample all of them with the same scheduler, steps and denoise.{why_apart(first.sigmas, run.sigmas)}"
            )
        if weights and not run.weights.same_as(weights):
            recorded, here = run.weights.told_apart(weights)
            raise ValueError(
                f"{node}: {name} was recorded with {recorded}, but the MODEL here is {here}. "
                "Use the same checkpoint, LoRAs and sampling settings."
            )


def with_prompt(stream: Stream, model: ModelPatcher, **conds: Any) -> Stream:
    """The same trajectory, with prompts of its own instead of those it was recorded with. conds: role=CONDITIONING."""
    run = copy.copy(stream.run)
    run.__dict__.pop("served", None)
    processed = internals.processed(model, conds, run.noise, run.latent_image, run.denoise_mask)
    run.conds = {**run.conds, **recorded_conds(processed)}
    # their features are of the other prompts
    run.evaluations = {key: Evaluation(evaluation.x, evaluation.options) for key, evaluation in run.evaluations.items()}
    return Stream(run, stream.row)


def recorded_conds(conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """A run's conditioning as it was processed, on the CPU. Everything else (ControlNet, areas) stays by reference."""
    return {
        role: [internals.with_tensors(cond, lambda t: t.to("cpu")) for cond in group] for role, group in conds.items()
    }


def conds_of(run: Run, rows: Sequence[int], device: torch.device) -> dict[str, list[dict]]:
    """The conditioning of some rows of a run, on the device: {role: [cond]}, with ControlNets of its own."""

    def of_rows(value: Tensor) -> Tensor:
        # ComfyUI repeats fewer prompts than images cyclically
        return (value[[row % len(value) for row in rows]] if len(value) > 1 else value).to(device)

    # one copy for all conditionings that share a ControlNet: ComfyUI batches those
    controls = {
        id(cond["control"]): cond["control"] for group in run.conds.values() for cond in group if "control" in cond
    }
    copies = {key: internals.copied_control(control) for key, control in controls.items()}

    def of_cond(cond: dict) -> dict:
        found = internals.with_tensors(cond, of_rows)
        return {**found, "control": copies[id(cond["control"])]} if "control" in cond else found

    return {role: [of_cond(cond) for cond in group] for role, group in run.conds.items()}


def rows_to_replay(run: Run, rows: Iterable[int]) -> list[int]:
    """The rows to compute when `rows` are wanted: just these, or all where something may act row by row (another pack's
    patches, a ControlNet with one hint for each image of the batch).
    """
    every = list(range(run.images))
    if run.is_patched_by_others:
        return every
    for group in run.conds.values():
        for cond in group:
            if "gligen" in cond or _has_batched_hint(cond.get("control")):
                return every
    return sorted(rows)


def _has_batched_hint(control: Any) -> bool:
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        if hint is None or hint.shape[0] > 1:
            return True
        control = control.previous_controlnet
    return False
