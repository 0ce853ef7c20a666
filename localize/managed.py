"""A plain torch module under ComfyUI's memory management, with the features of recent pictures beside it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher

FEATURE_BYTES = 256 * 2**20  # 64 pictures for Segment Anything, 14 for Grounding DINO at 800x1066


def full_load_device() -> torch.device:
    """Where a module runs that cannot be loaded in part. --novram keeps weights off the GPU, so there it is the CPU."""
    return torch.device("cpu") if mm.vram_state == mm.VRAMState.NO_VRAM else mm.get_torch_device()


class ManagedModel:
    """A module that ComfyUI moves to the GPU when it is used, and away when others need the memory.

    working_memory: bytes beyond the weights that a run needs at its peak.
    """

    def __init__(self, module: Any, working_memory: int):
        """module: an nn.Module with `stages`; Any, since its class exists only once its package was imported."""
        # Not CoreModelPatcher: its weights may live in pieces, which modules without comfy.ops cannot use.
        self.patcher = ModelPatcher(module, full_load_device(), mm.unet_offload_device())
        self.working_memory = working_memory
        self.features = FeatureCache(FEATURE_BYTES)
        for stage in module.stages:  # one picture takes many seconds on a CPU: Cancel must not wait for its end
            stage.register_forward_pre_hook(lambda *_: mm.throw_exception_if_processing_interrupted())

    def load(self) -> Any:
        """The module, on its device, with room to work."""
        mm.load_models_gpu([self.patcher], memory_required=self.working_memory, force_full_load=True)
        return self.patcher.model


class FeatureCache:
    """The most recently used values, up to a number of bytes; the newest is kept whatever its size."""

    def __init__(self, limit: int):
        self.limit = limit
        self.values: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()

    def get(self, key: tuple) -> Any:
        if key not in self.values:
            return None
        self.values.move_to_end(key)
        return self.values[key][0]

    def put(self, key: tuple, value: Any, tensors: list[torch.Tensor]) -> Any:
        """Keeps the value, which counts as many bytes as these tensors, and returns it."""
        self.values[key] = value, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        while len(self.values) > 1 and sum(size for _, size in self.values.values()) > self.limit:
            self.values.popitem(last=False)
        return value
