"""Recordings in files: the trajectories of a LATENT, so that images made yesterday or on another machine can be
composed today.

A file holds tensors and plain numbers (safetensors, no pickle): noise, latents of every evaluation, the graph cut's
features, attention maps and results. What cannot be stored, the prompts with their ControlNets and the patches of the
MODEL, is given again when the file is loaded, and what must be the same is compared.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from . import internals
from .streams import CondRole, Evaluation, Recording, Run, Stream, recorded_conds
from .weights import Weights, digest

FORMAT = "montage_recording"  # key of our own entry in the file's metadata
VERSION = 1
OPTIONAL = ("denoise_mask",)
ROLES = {"positive", "negative"}


def save(node: str, path: Path, streams: Sequence[Stream], model: ModelPatcher) -> None:
    """Write the runs of a LATENT's streams to a file: completely, or not at all.

    node: the display name for messages. model: what they were sampled with. Raises ValueError for another MODEL, and
    for a run that cannot be taken up again from a file.
    """
    runs = list(dict.fromkeys(run for run, _ in streams))
    weights = Weights(model)
    tensors: dict[str, torch.Tensor] = {}
    entries = []
    for number, run in enumerate(runs):
        _check(node, run, weights)
        # clones: a file may not hold two tensors of one memory
        tensors |= {f"{number}.{name}": tensor.contiguous().clone() for name, tensor in _tensors(run).items()}
        entries.append(_numbers(run, model))
    rows = [[runs.index(run), row] for run, row in streams]
    kept = {"version": VERSION, "runs": entries, "streams": rows}
    part = path.with_suffix(".part")  # never half a file
    comfy.utils.save_torch_file(tensors, str(part), metadata={FORMAT: json.dumps(kept)})
    part.replace(path)


def load(node: str, path: Path, model: ModelPatcher, prompts: dict[str, Any]) -> tuple[torch.Tensor, Recording]:
    """(latents [B, C, h, w], a Recording of them). prompts: {role: CONDITIONING} that they were sampled with. Raises
    ValueError for a file of another kind, and for a MODEL or prompts that cannot be those of the recording.
    """
    tensors, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    kept = json.loads((metadata or {}).get(FORMAT, "null"))
    if not kept or kept["version"] > VERSION:
        raise ValueError(
            f"{node}: {path.name} is not a recording that this version can read. Choose a file that Save"
            " Recording made."
        )
    recording = Recording()
    for number, entry in enumerate(kept["runs"]):
        own = {key.removeprefix(f"{number}."): value for key, value in tensors.items() if key.startswith(f"{number}.")}
        # not recording.add, which drops the oldest runs of many: the file's latents are those of all its runs
        recording.runs.append(_run(node, path.name, own, entry, model, prompts))
    return torch.stack([recording.runs[run].final[row] for run, row in kept["streams"]]), recording


def _check(node: str, run: Run, weights: Weights) -> None:
    """Refuse a run that cannot be stored. weights: of the MODEL that it is said to be sampled with."""
    if not run.weights.same_as(weights):  # the file would name a checkpoint that the run is not of
        recorded, here = run.weights.told_apart(weights)
        raise ValueError(
            f"{node}: the recording was sampled with {recorded}, but the MODEL here is {here}. Connect the MODEL that"
            " went into its sampler, LoRAs and sampling settings included."
        )
    foreign = set(run.conds) - ROLES
    if foreign:
        raise ValueError(
            f"{node}: the recording was sampled with conditionings besides positive and negative"
            f" ({', '.join(foreign)}), which Load Recording has no input for. Sample it with a KSampler or CFG Guider."
        )
    if any(call for _, _, call in run.evaluations):
        raise ValueError(
            f"{node}: the MODEL of the recording evaluates several times a step (Perturbed- or Self-Attention"
            " Guidance), and what it changes there cannot be stored. Record without that guidance."
        )
    if len(run.options) > 1:
        raise ValueError(
            f"{node}: another node on the MODEL of the recording changes what it computes from step to step, which"
            " cannot be stored. Record without that node."
        )


def _tensors(run: Run) -> dict[str, torch.Tensor]:
    found = {"noise": run.noise, "latent_image": run.latent_image, "final": run.final}
    found |= {name: getattr(run, name) for name in OPTIONAL if getattr(run, name) is not None}
    found |= {f"x.{number}": evaluation.x for number, evaluation in enumerate(run.evaluations.values())}
    found |= {f"keys.{role.role}.{role.number}": keys for role, keys in run.keys.items()}
    found |= {f"map.{words}": tensor for words, tensor in run.maps.items()}
    return found


def _numbers(run: Run, model: ModelPatcher) -> dict[str, Any]:
    return {
        "sampler": run.sampler,
        "composed": run.composed,
        "heeds_bias": run.heeds_bias,
        "sigmas": run.sigmas,
        "evaluations": list(run.evaluations),
        "grid": run.keys_grid,
        "roles": list(run.conds),
        "weights": {**run.weights.lasting(), "checkpoint": digest(internals.some_weights(model))},
    }


def _run(
    node: str, name: str, tensors: dict[str, torch.Tensor], entry: dict, model: ModelPatcher, prompts: dict[str, Any]
) -> Run:
    weights = Weights(model)
    here = {**weights.lasting(), "checkpoint": digest(internals.some_weights(model))}
    here, there = json.loads(json.dumps(here)), entry["weights"]
    different = [key for key in here if here[key] != there[key]]
    if different:
        told = "; ".join(f"{key}: {there[key]} recorded, {here[key]} here" for key in different)
        raise ValueError(
            f"{node}: {name} was recorded with another MODEL ({told}). Connect the checkpoint, LoRAs and sampling"
            " settings that it was recorded with."
        )
    missing = [role for role in entry["roles"] if prompts.get(role) is None]
    if missing:
        raise ValueError(
            f"{node}: {name} was recorded with a {' and a '.join(missing)} prompt, and none is connected. Connect the"
            " CONDITIONING that it was sampled with, ControlNet included."
        )
    run = Run(
        weights,
        entry["sampler"],
        torch.tensor(entry["sigmas"], dtype=torch.float64),
        tensors["noise"],
        tensors["latent_image"],
        tensors.get("denoise_mask"),
        entry["composed"],
        entry["heeds_bias"],
    )
    run.final = tensors["final"]
    options = internals.recorded_options(internals.options_of(model))
    for number, key in enumerate(entry["evaluations"]):
        run.evaluations[tuple(key)] = Evaluation(tensors[f"x.{number}"], options)
    for key, tensor in tensors.items():
        if key.startswith("keys."):
            _, role, which = key.split(".")
            run.keys[CondRole(role, int(which))] = tensor
        elif key.startswith("map."):
            run.maps[key.removeprefix("map.")] = tensor
    run.keys_grid = entry["grid"] and tuple(entry["grid"])
    used = {role: prompts[role] for role in entry["roles"]}
    run.conds = recorded_conds(internals.processed(model, used, run.noise, run.latent_image, run.denoise_mask))
    return run
