"""The input "exact": recorded images are replayed as they were recorded, to the last bit."""

import pytest
import torch

from montage.nodes.layout_retouch import MultiSourceSwap
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.workshop.random_models import random_model
from montage.workshop.random_transformers import empty_latent, prompt, random_transformer
from montage.workshop.sampling import (
    SIZE,
    STEPS,
    close,
    halves,
    inject,
    masks_of,
    record,
    recorder,
    same,
    sample,
    words,
)

LEFT = masks_of(halves(tuple(8 * side for side in SIZE)))[:1]


def composing(images, exact):
    return inject(images, masks_of(halves()), exact=exact)


def collaborating(images, exact):
    preset = {
        "preset": "custom",
        **{"sagi_start": 0.0, "sagi_end": 0.5, "sagi_sites": "all"},
        **{"salq_start": 0.5, "salq_end": 1.0, "salq_sites": "all"},
    }
    model, (subject, condition) = random_model("sd15-small"), images
    given = (preset, 0, False, False, "SAGI first", 0.3, "soft", condition, 1 - LEFT)
    return CollaborativeAttention.execute(model, subject, LEFT, *given, exact=exact).args


def swapping(images, exact):
    layout, reference = images
    model = random_model("sd15-small")
    return MultiSourceSwap.execute(model, layout, reference, 0.0, 0.0, 1.0, "all", mask=LEFT, exact=exact).args


NODES = pytest.mark.parametrize("node", [composing, collaborating, swapping])


def recorded(cache_mb):
    return [record(seed, cache_mb=cache_mb, positive=words(seed)) for seed in (1, 2)]


def sampled(patched):
    """(latent samples, how often the network was called in a step)."""
    network, calls = patched[0].model.diffusion_model, []
    hook = network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    try:
        return sample(*patched, positive=words(1))["samples"], len(calls) / STEPS
    finally:
        hook.remove()


@NODES
def test_exact_replays_each_image_by_itself_as_it_was_recorded(node):
    """What a cache holds is of the recording's own evaluations, one for each image."""
    cached, _ = sampled(node(recorded(64), False))
    images = recorded(0)
    exact, calls = sampled(node(images, True))
    together, fewer = sampled(node(images, False))
    assert same(exact, cached) and calls == 3
    close(together, cached, 0.02)
    assert fewer == 2


def test_what_shares_no_batch_is_exact_without_being_asked():
    """One image that is read: its replay is the evaluation that was recorded."""
    nothing_of_the_second = masks_of(torch.zeros(SIZE), 2)
    settings = {"base_q": "stored"}
    cached, _ = sampled(inject(recorded(64), nothing_of_the_second, **settings))
    replayed, calls = sampled(inject(recorded(0), nothing_of_the_second, **settings))
    assert same(replayed, cached) and calls == 2


def test_exact_on_one_node_is_exact_for_the_run():
    """Two nodes share the replays of a run."""
    images = recorded(0)
    first = inject(images, masks_of(halves()), sites="encoder", exact=True)
    second = inject(images, masks_of(halves()), sites="decoder", model=first[0])
    cached = recorded(64)
    encoder = inject(cached, masks_of(halves()), sites="encoder")
    wanted = inject(cached, masks_of(halves()), sites="decoder", model=encoder[0])
    assert same(sampled(second)[0], sampled(wanted)[0])


@pytest.mark.parametrize("exact", [True, False])
def test_a_transformer_goes_in_lockstep_unless_exact_is_asked_for(exact):
    name = "Flux.1"
    model = random_transformer(name)

    def made(cache_mb, exact):
        images = [
            sample(*recorder(model, empty_latent(name), cache_mb), seed, prompt(name, seed), prompt(name, 99), cfg=3.0)
            for seed in (1, 2)
        ]
        size = tuple(images[0]["samples"].shape[-2:])
        patched = inject(images, masks_of(halves(size)), model=model, exact=exact)
        return sample(*patched, 1, prompt(name, 1), prompt(name, 99), cfg=3.0)["samples"]

    found, cached = made(0, exact), made(64, False)
    assert same(found, cached) if exact else torch.allclose(found, cached, atol=0.02)
