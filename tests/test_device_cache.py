"""Cached features on the model's device, in ComfyUI's accounting (on workshop/second_device.py)."""

import gc
import logging

import comfy.model_management as management
import pytest

from montage.patching.device_cache import DeviceCache
from montage.workshop.random_models import random_model
from montage.workshop.sampling import halves, inject, masks_of, record, run_of, same, sample, words
from montage.workshop.second_device import DEVICE, MAIN, SecondDevice

GIB = 1 << 30


@pytest.fixture
def model():
    gc.collect()  # what other tests have left
    patched = random_model("sd15-small").clone()
    patched.load_device = DEVICE
    return patched


def recorded(model, cache_mb=64):
    return [record(seed, model=model, cache_mb=cache_mb, positive=words(seed)) for seed in (1, 2)]


def composed(model, images):
    return sample(*inject(images, masks_of(halves()), model=model), positive=words(1))["samples"]


def lying(latent, where):
    """Bytes of features by evaluation that lie somewhere."""
    return [
        sum(part.nbytes for part in evaluation.features.values() if part.device == where)
        for evaluation in run_of(latent).evaluations.values()
    ]


def caches():
    return [loaded.model for loaded in management.current_loaded_models if isinstance(loaded.model, DeviceCache)]


def test_features_lie_on_the_device_where_it_has_room(model, caplog):
    """But for the first evaluation's, which tells how large they are."""
    with SecondDevice(), caplog.at_level(logging.INFO):
        first, second = recorded(model)
        there, here = lying(first, DEVICE), lying(first, MAIN)
        assert there[0] == 0 and here[0] > 0 and not any(here[1:]) and all(there[1:])
        assert sorted(cache.loaded_size() for cache in caches()) == sorted([sum(there), sum(lying(second, DEVICE))])
        kept, moved = (sum(part) / 2**20 for part in (there + here, there))
        assert f"({kept:.1f} MB, {moved:.1f} MB of them on the GPU)" in caplog.text


@pytest.mark.parametrize("free, cache_mb", [(1 * GIB, 64), (1 << 40, 0)])
def test_they_lie_elsewhere_where_it_has_none_or_nothing_is_cached(model, free, cache_mb):
    with SecondDevice(free):
        latent, _ = recorded(model, cache_mb)
        assert not any(lying(latent, DEVICE)) and not caches()
        assert all(lying(latent, MAIN)) if cache_mb else not any(lying(latent, MAIN))


def test_wherever_they_lie_the_picture_is_the_same(model):
    wanted = composed(random_model("sd15-small"), recorded(random_model("sd15-small")))
    with SecondDevice() as device:
        images = recorded(model)
        assert same(composed(model, images), wanted)
        device.free = 0
        management.free_memory(1, DEVICE)
        device.free = 1 << 40
        assert same(composed(model, images), wanted)  # parts in both places
        assert not device.mixed


def test_comfyui_gets_the_memory_back_that_it_asks_for(model):
    with SecondDevice() as device:
        latent = record(1, model=model, cache_mb=64)
        (cache,) = caches()
        every, whole = sum(lying(latent, DEVICE)), sum(lying(latent, MAIN))
        others = [loaded for loaded in management.current_loaded_models if loaded.model is not cache]
        device.free = 0
        management.free_memory(1, DEVICE, keep_loaded=others)
        left = sum(lying(latent, DEVICE))
        assert 0 < left < every and left == cache.loaded_size() and caches() == [cache]
        management.free_memory(1 << 50, DEVICE, keep_loaded=others)
        assert not any(lying(latent, DEVICE)) and sum(lying(latent, MAIN)) == every + whole and not caches()
        assert cache.take(next(iter(run_of(latent).evaluations.values())).x) is None


def test_a_recording_that_is_given_up_is_no_longer_counted(model):
    with SecondDevice():
        latent = record(1, model=model, cache_mb=64)
        assert len(caches()) == 1
        del latent
        gc.collect()
        assert not caches()
