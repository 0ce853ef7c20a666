"""Which weights a MODEL samples with, and how: what must be the same where one run follows another."""

import hashlib
import weakref
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from . import internals

PARAMETERS = ("sigma_min", "sigma_max", "sigma_data", "shift", "multiplier")  # of a model_sampling, where it has them


class Weights:
    """The weights and sampling settings of a MODEL: comparable, and holding none of them alive.

    Reloading the same file with the same LoRAs gives an equal one, so that a recording outlives an evicted loader.
    """

    def __init__(self, model: ModelPatcher) -> None:
        loader = internals.loader_of(model)
        self.model = weakref.ref(model.model)
        self.source, self.file = loader or (None, "")
        self.loras = internals.patches_id(model) if not model.patches else digest(model.patches)
        self.injected = digest(internals.injected_adapters(model))
        self.scale: int = model.model.latent_format.spacial_downscale_ratio  # pixels to a side of the latent's
        self.family = type(model.model.model_config).__name__
        self.patched = len(model.patches)
        self.sampling = _sampling(model)

    def same_checkpoint(self, other: "Weights") -> bool:
        if None in (self.source, other.source):
            return self.model() is other.model()
        return self.source == other.source

    def same_loras(self, other: "Weights") -> bool:
        same_patches = self.loras == other.loras or not (self.patched or other.patched)
        return same_patches and self.injected == other.injected

    def same_sampling(self, other: "Weights") -> bool:
        return self.sampling == other.sampling

    def same_as(self, other: "Weights") -> bool:
        return self.same_checkpoint(other) and self.same_loras(other) and self.same_sampling(other)

    def lasting(self) -> dict[str, Any]:
        """What identifies them beyond this process, but for the checkpoint itself: plain values."""
        return {
            "family": self.family,
            "LoRAs": self.loras if self.patched else "none",
            "LoRAs in bypass mode": self.injected,
            "sampling": _in_words(self.sampling),
        }

    def told_apart(self, other: "Weights") -> tuple[str, str]:
        """(this, the other) in words that show what differs."""
        if self.same_checkpoint(other) and self.same_loras(other):
            return _in_words(self.sampling), _in_words(other.sampling)
        here, there = str(self), str(other)
        if here == there:
            here, there = (f"{name} loaded separately" for name in (here, there))
        return here, there

    def __str__(self) -> str:
        patched = f"with {self.patched} patched weights" if self.patched else ""
        injected = "with a LoRA in bypass mode" if self.injected != digest({}) else ""
        parts = [self.family, f"({self.file})" if self.file else "", patched, injected]
        return " ".join(part for part in parts if part)


def _sampling(model: ModelPatcher) -> tuple:
    """(prediction type and schedule by the names of their classes, parameters) of what a MODEL is sampled with."""
    sampling = model.get_model_object("model_sampling")
    kinds = tuple(c.__name__ for c in type(sampling).__mro__[1:] if c not in (torch.nn.Module, object))
    values = ((name, getattr(sampling, name, None)) for name in PARAMETERS)
    return kinds, tuple((name, round(float(value), 6)) for name, value in values if value is not None)


def _in_words(sampling: tuple) -> str:
    kinds, parameters = sampling
    return f"{' + '.join(kinds)} ({', '.join(f'{name} {value:g}' for name, value in parameters)})"


def digest(thing: Any) -> str:
    """Tells sets of LoRAs apart without keeping or reading them whole: keys, strengths, and a few values of each
    tensor.
    """
    found = hashlib.sha1(usedforsecurity=False)
    _add(found, thing)
    return found.hexdigest()


def _add(found: Any, thing: Any) -> None:
    if isinstance(thing, torch.Tensor):
        found.update(repr((tuple(thing.shape), thing.flatten()[:4].tolist())).encode())
    elif isinstance(thing, dict):
        for key in sorted(thing, key=str):
            found.update(str(key).encode())
            _add(found, thing[key])
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            _add(found, item)
    elif hasattr(thing, "weights"):  # a comfy.weight_adapter
        _add(found, thing.weights)
    else:
        found.update(repr(thing if isinstance(thing, (str, int, float)) else type(thing)).encode())
