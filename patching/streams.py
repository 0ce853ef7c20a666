"""Streams: the denoising trajectories of finished runs, and the LATENT that carries them.

A run remembers, for every evaluation of its model, the latent that went in. With it and the run's conditioning and
options the evaluation can be done again, exactly (replay). Within a budget it also keeps what the self-attention of
every site saw, n = norm1(x), which is a third of Q, K and V and projects to the same (the cache).
"""

import copy
import functools
import hashlib
import logging
import weakref
from typing import Any, NamedTuple

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch

from .schedule import in_words

LATENT_KEY = "montage"  # where a LATENT dict carries its Recording
INVERSION = "ddim inversion"  # what stands for the sampler of a run that found a picture's history
RUNS_KEPT = 8  # a recorder's newest runs, so that going back to an earlier seed still finds its history


class Half(NamedTuple):
    """One conditioning of a run: its role ("positive", "negative", ...) and its number within the role."""

    role: str
    number: int


class Weights:
    """Which weights a MODEL samples with: comparable, and holding none of them alive.

    Reloading the same file with the same LoRAs gives an equal one, so that a recording outlives an evicted loader.
    """

    def __init__(self, model):
        loader = model.cached_patcher_init
        self.model = weakref.ref(model.model)
        self.source = repr((loader[0].__qualname__, loader[1])) if loader else None
        self.file = str(loader[1][0]).replace("\\", "/").rpartition("/")[2] if loader else ""
        self.loras = model.patches_uuid if not model.patches else _digest(model.patches)
        self.name = type(model.model.model_config).__name__
        self.patched = len(model.patches)
        sampling = model.get_model_object("model_sampling")
        self.sampling = (tuple(c.__name__ for c in type(sampling).__mro__[1:3]), float(sampling.sigma_max))

    def same_as(self, other):
        same_model = (
            self.model() is other.model() if None in (self.source, other.source) else self.source == other.source
        )
        same_loras = self.loras == other.loras or not (self.patched or other.patched)
        return same_model and same_loras and self.sampling == other.sampling

    def __str__(self):
        parts = [
            self.name,
            f"({self.file})" if self.file else "",
            f"with {self.patched} patched weights" if self.patched else "",
        ]
        return " ".join(part for part in parts if part)


def _digest(patches):
    """Tells LoRA sets apart without keeping or reading them whole: keys, strengths, and a few values of each tensor."""
    digest = hashlib.sha1()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(repr((tuple(value.shape), value.flatten()[:4].tolist())).encode())
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif hasattr(value, "weights"):  # a comfy.weight_adapter
            add(value.weights)
        else:
            digest.update(repr(value if isinstance(value, (str, int, float)) else type(value)).encode())

    for key in sorted(patches, key=str):
        add(str(key))
        add(patches[key])
    return digest.hexdigest()


class Evaluation:
    """One evaluation of the model: the latents that went in, x [B, C, h, w], and what was kept of its attention:
    features[half, site] = n [B, tokens, channels], empty when it is to be replayed. All on the CPU."""

    def __init__(self, x):
        self.x = x.detach().to("cpu", copy=True)
        self.features = {}

    @property
    def bytes(self):
        return sum(n.nbytes for n in self.features.values())


class Run:
    """One sampling run of a batch of B images, each of them a stream. Filled while it samples, constant afterwards."""

    def __init__(self, weights, sampler, sigmas, noise, latent_image, denoise_mask, composed=""):
        self.weights, self.sampler = weights, sampler
        self.composed = composed  # the names of the recipes that it was sampled with: such a run cannot be replayed
        self.sigmas = tuple(sigmas.tolist())
        self.noise, self.latent_image = noise.cpu(), latent_image.cpu()
        self.denoise_mask = None if denoise_mask is None else denoise_mask.cpu()
        self.evaluations = {}  # (sigma, visit of that sigma, call within the visit) -> Evaluation, in order
        self.conds = {}  # role -> [processed conditioning dict]
        self.options = {}  # call -> the model options of its evaluations
        self.keys = {}  # half -> K of the first self-attention at the lowest sigma, [B, tokens, channels]
        self.keys_grid = None  # (h, w) of those tokens
        self.maps = {}  # words -> where the model looked for them, [B, h, w] in [0, 1] (Token Attention Map)
        self.final = None  # [B, C, h, w], what the sampler returned

    @property
    def size(self):
        """(height, width) of the latents."""
        return tuple(self.noise.shape[-2:])

    @property
    def images(self):
        return self.noise.shape[0]

    @property
    def halves(self):
        """Which half a conditioning is, by the uuid that ComfyUI gave it for this run."""
        return halves_of(self.conds)

    @functools.cached_property
    def served(self):
        """{role: the first role that has the same conditioning}: one evaluation of it serves both, as in an inversion
        with one prompt. Of a finished run."""
        return {
            role: next(
                first for first, earlier in self.conds.items() if first == role or same_conditioning(earlier, group)
            )
            for role, group in self.conds.items()
        }

    @property
    def evaluation_bytes(self):
        """What the features of one evaluation take, as far as it is known."""
        return next((e.bytes for e in self.evaluations.values()), 0)

    def visits(self, sigma):
        return sum(key[0] == sigma and key[2] == 0 for key in self.evaluations)

    def visit_that_continues(self, sigma):
        """The visit of a sigma with which a run that starts there continues: not the one that ends the step before
        (Heun's corrector)."""
        return max(0, self.visits(sigma) - (self.visits(self.sigmas[0]) or 1))

    def evaluation(self, key):
        """(evaluation, its call number) for a target's; (None, 0) where the run was not at this sigma. A call that the
        run did not make (the target has PAG, the recording had not) is answered with the first of the visit."""
        sigma, visit, call = key
        if key not in self.evaluations:
            call = 0
        return self.evaluations.get((sigma, visit, call)), call


def halves_of(conds):
    return {cond["uuid"]: Half(role, number) for role, group in conds.items() for number, cond in enumerate(group)}


class Recording:
    """What a recorder hands to a LATENT: the runs that its MODEL made. Samplers copy the LATENT dict, so the
    reference arrives in what they return; `find` pairs a latent with the run that ended in it, never with another."""

    def __init__(self, budget=0):
        self.budget = budget  # bytes of features that a run may keep
        self.runs = []

    def add(self, run):
        """Keep a finished run. Earlier ones keep their trajectories (small) and lose their features (large)."""
        for earlier in self.runs:
            for evaluation in earlier.evaluations.values():
                evaluation.features = {}
        self.runs = [*self.runs, run][-RUNS_KEPT:]
        kept, total = sum(bool(e.features) for e in run.evaluations.values()), len(run.evaluations)
        logging.info(
            "Feature Recorder: %d images, %d evaluations at %dx%d; features of %d kept (%.1f MB), the others are"
            " replayed.",
            run.images,
            total,
            *run.size,
            kept,
            kept * run.evaluation_bytes / 2**20,
        )

    def find(self, sample):
        """The stream that ended in `sample` [C, h, w], or None.

        A tolerance of 1e-2 (latents have unit scale) admits the rounding of fp16 intermediates and of the sampler's
        second output; two different images differ by a hundred times that.
        """
        for run in reversed(self.runs):
            for row, final in enumerate(run.final):
                if final.shape == sample.shape and torch.allclose(final, sample.to(final), rtol=0, atol=1e-2):
                    return Stream(run, row)
        return None


class Stream(NamedTuple):
    """One image's trajectory: a row of a run."""

    run: Run
    row: int


def streams_of(node, latents):
    """The streams of recorded LATENTs, one for each image, in order.

    node: the display name for messages. Raises ValueError for a latent that no recorder saw, or that was changed
    or joined from several recordings afterwards.
    """
    streams = []
    for number, latent in enumerate(latents):
        recording = latent.get(LATENT_KEY)
        if recording is None:
            raise ValueError(
                f"{node}: latent {number} was not recorded. Wire MODEL and LATENT of a FeatureRecorder into the sampler"
                " that makes it, and connect what that sampler returns; or invert an existing picture with"
                " InvertImage."
            )
        for row, sample in enumerate(latent["samples"]):
            stream = recording.find(sample)
            if stream is None:
                raise ValueError(
                    f"{node}: row {row} of latent {number} ({'x'.join(map(str, sample.shape))}) is not the result of a"
                    f" recorded run: its recorder holds {len(recording.runs)} runs and none ends in it. Connect the"
                    " sampler's output itself, not a latent that was joined, resized, loaded or edited afterwards."
                )
            streams.append(stream)
    return streams


def check_together(node, streams, model=None, names=None):
    """All streams must have one size and one schedule, and the weights of `model` where one is given. names: of the
    streams, for messages."""
    first = streams[0].run
    names = names or [f"image {number}" for number in range(len(streams))]
    for name, (run, _) in zip(names, streams):
        if run.size != first.size:
            raise ValueError(
                f"{node}: {names[0]} was recorded at {first.size[0]}x{first.size[1]} latent pixels and {name} at "
                f"{run.size[0]}x{run.size[1]}. Make all of them at one size."
            )
        if run.sigmas != first.sigmas:
            raise ValueError(
                f"{node}: {names[0]} was recorded over {in_words(first.sigmas)} and {name} over {in_words(run.sigmas)}."
                " Make all of them with one scheduler, step count and denoise."
            )
        weights = model and Weights(model)
        if weights and not run.weights.same_as(weights):
            raise ValueError(
                f"{node}: {name} was recorded with {run.weights}, but the MODEL here is {weights}. "
                "Use the same checkpoint, LoRAs and sampling settings."
            )


def with_prompt(stream, model, **conds):
    """The same trajectory, with prompts of its own instead of those it was recorded with. conds: role=CONDITIONING."""
    run = copy.copy(stream.run)
    run.__dict__.pop("served", None)
    prompts = {role: comfy.sampler_helpers.convert_cond(conditioning) for role, conditioning in conds.items()}
    run.conds = {
        **run.conds,
        **recorded_conds(
            comfy.samplers.process_conds(model.model, run.noise, prompts, run.noise.device, run.latent_image)
        ),
    }
    run.evaluations = {
        key: Evaluation(evaluation.x) for key, evaluation in run.evaluations.items()
    }  # its features are of the other prompts
    return Stream(run, stream.row)


def same_conditioning(a, b):
    """Whether two values of processed conditionings are the same, but for the uuids that tell them apart."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_conditioning(a[key], b[key]) for key in a.keys() - {"uuid"})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_conditioning, a, b))
    if isinstance(a, comfy.conds.CONDRegular):
        return type(a) is type(b) and same_conditioning(a.cond, b.cond)
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


def recorded_conds(conds):
    """A run's conditioning as it was processed, on the CPU. Everything else (ControlNet, areas) stays by reference."""
    return {role: [_moved(cond, "cpu") for cond in group] for role, group in conds.items()}


def conds_of(run, rows, device):
    """The conditioning of some rows of a run: {role: [cond]} on the device."""
    return {role: [_moved(cond, device, rows, run.images) for cond in group] for role, group in run.conds.items()}


def rows_to_replay(run, rows):
    """The rows to compute when `rows` are wanted: just these, or all where the conditioning cannot be split
    (a ControlNet with one hint for each image of the batch)."""
    for group in run.conds.values():
        for cond in group:
            if "gligen" in cond or _has_batched_hint(cond.get("control")):
                return list(range(run.images))
    return sorted(rows)


def _has_batched_hint(control):
    while control is not None:
        hint = getattr(control, "cond_hint_original", None)
        if hint is None or hint.shape[0] > 1:
            return True
        control = control.previous_controlnet
    return False


def _moved(cond, device, rows=None, images=1):
    def tensor(value):
        if rows is not None and images > 1 and value.shape[0] == images:
            value = value[rows]
        return value.to(device)

    def model_cond(value: Any):
        return value._copy_with(tensor(value.cond)) if isinstance(value.cond, torch.Tensor) else value

    moved = {**cond, "model_conds": {name: model_cond(value) for name, value in cond["model_conds"].items()}}
    if isinstance(cond.get("mask"), torch.Tensor):
        moved["mask"] = tensor(cond["mask"])
    return moved
