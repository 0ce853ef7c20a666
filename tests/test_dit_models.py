"""Transformers: every family, by ComfyUI's own class with small random weights, through the real sampler."""

import pytest
import torch

from montage.patching.engine import Engine
from montage.workshop.random_transformers import TRANSFORMERS, empty_latent, prompt, random_transformer
from montage.workshop.sampling import close, inject, masks_of, recorder, same, sample

FAMILIES = list(TRANSFORMERS)
STEPS = 3
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def exact(monkeypatch):
    """Streams are replayed, bit for bit as they were recorded."""
    monkeypatch.setattr(Engine, "exact", True)


def draw(name, model, latent, seed=1, positive=None, negative=None, cfg=3.0, steps=STEPS, **settings):
    positive, negative = positive or prompt(name, seed), negative or prompt(name, 99)
    return sample(model, latent, seed, positive, negative, cfg=cfg, steps=steps, **settings)


def recorded(name, seed=1, model=None, cache_mb=0, latent=None, **settings):
    model, latent = recorder(model or random_transformer(name), latent or empty_latent(name), cache_mb)
    return draw(name, model, latent, seed, **settings)


def labels(name, size=None, right=1):
    """Left half 0, right half `right`, on latent pixels."""
    found = torch.zeros(size or TRANSFORMERS[name].latent[-2:], dtype=torch.long)
    found[:, found.shape[1] // 2 :] = right
    return found


def composed(name, stack, owner, base=0, model=None, seed=None, positive=None, node={}, **settings):  # noqa: B006
    model, latent = inject(stack, masks_of(owner, len(stack)), base, model or random_transformer(name), **node)
    return draw(name, model, latent, base + 1 if seed is None else seed, positive, **settings)["samples"]


@each_family
def test_recording_changes_nothing(name):
    plain = draw(name, random_transformer(name), empty_latent(name))["samples"]
    assert plain.isfinite().all() and plain.std() > 0.1
    assert same(recorded(name)["samples"], plain)
    assert same(recorded(name, cache_mb=64)["samples"], plain)


@each_family
@pytest.mark.parametrize("sampler, cfg", [("euler", 3.0), ("heun", 3.0), ("dpmpp_2m", 1.0)])
def test_identities(exact, name, sampler, cfg):
    """All labels the base's: the base. All labels k's, on k's noise and prompt: k. Half of them: that half moves."""
    settings = {"sampler": sampler, "cfg": cfg}
    a, b = recorded(name, 1, **settings), recorded(name, 2, **settings)
    zeros = torch.zeros_like(labels(name))
    assert same(composed(name, [a, b], zeros, **settings), a["samples"])
    assert same(composed(name, [a, b], zeros + 1, base=1, **settings), b["samples"])
    half = composed(name, [a, b], labels(name), **settings)
    assert (half - a["samples"]).abs().max() > 1e-3


@each_family
def test_lockstep_is_replay(name, monkeypatch):
    a, b, c = (recorded(name, seed) for seed in (1, 2, 3))
    owner = labels(name)
    owner[: owner.shape[0] // 2] += 1
    together = composed(name, [a, b, c], owner)
    monkeypatch.setattr(Engine, "exact", True)
    apart = composed(name, [a, b, c], owner)
    close(together, apart, 1e-4)
    assert (apart - a["samples"]).abs().max() > 1e-2
