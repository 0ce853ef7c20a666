"""Cached features on the model's own device, for as long as its memory is not wanted for anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from comfy.model_patcher import ModelPatcher

from . import internals, transfers

if TYPE_CHECKING:
    from .streams import CallKey, Evaluation


class DeviceCache(ModelPatcher):
    """The features of a run that lie on a device. ComfyUI counts them as it counts a model that is loaded there, and
    asks for their memory as it unloads a model: they then go to main memory, and no others come.

    room: bytes that may still come.
    """

    def __init__(self, evaluations: dict[CallKey, Evaluation], device: torch.device, room: int) -> None:
        """evaluations: of the run, in which the features are."""
        super().__init__(torch.nn.Module(), device, torch.device("cpu"), size=1)
        self.evaluations, self.room = evaluations, room
        internals.account_for(self)

    def take(self, rows: torch.Tensor) -> torch.Tensor | None:
        """A copy of a tensor, on the device; None where there is no room for it any more."""
        if rows.nbytes > self.room:
            return None
        self.room -= rows.nbytes
        return rows.clone()

    def loaded_size(self) -> int:
        return sum(part.nbytes for evaluation in self.evaluations.values() for _, part in self.held(evaluation))

    def held(self, evaluation: Evaluation) -> list[tuple[Any, torch.Tensor]]:
        """The features of an evaluation that lie on the device, by their names."""
        return [(key, part) for key, part in evaluation.features.items() if part.device == self.load_device]

    # ------------------------------------------------------------ what ComfyUI asks of a loaded model

    def model_size(self) -> int:
        return self.loaded_size()

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Nothing: what has gone to main memory stays there."""
        return 0

    def partially_unload(
        self, device_to: torch.device, memory_to_free: float = 0, force_patch_weights: bool = False
    ) -> int:
        """Bring features to main memory, evaluation by evaluation. Returns how many bytes that frees."""
        self.room, freed = 0, 0
        for evaluation in self.evaluations.values():
            if freed >= memory_to_free:
                break
            sites: dict[Any, list] = {}
            for (role, site), part in self.held(evaluation):
                sites.setdefault(site, []).append((role, part))
                freed += part.nbytes
            for site, parts in sites.items():
                kept = transfers.put_away(transfers.together([part for _, part in parts]))
                evaluation.features.update(((role, site), part) for (role, _), part in zip(parts, kept))
        transfers.finish(self.load_device)
        return freed

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        """Bring all features to main memory; nothing where the run itself is given up."""
        if unpatch_all:
            self.partially_unload(self.offload_device, float("inf"))
        return self.model
