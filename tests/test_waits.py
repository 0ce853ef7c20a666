"""What a sampling step waits for beyond a plain one, on a second device that is not there (workshop/second_device.py):
nothing with euler and ddim, whose plain step waits for nothing; with other samplers, which wait in every step, the
sigma; and where an area follows the words, their map.
"""

from collections import Counter

import pytest
import torch

from montage.evidence.benchmarks import bench, dispatches, layout_retouch, mca_ctrl, photomontage, transformers
from montage.nodes.collage import CollageNoise
from montage.nodes.mca_ctrl import CollaborativeAttention
from montage.nodes.record import FeatureRecorder
from montage.patching import internals, transfers
from montage.workshop.collages import BLUE, RED, canvas, layer, plain
from montage.workshop.sampling import sample
from montage.workshop.second_device import DEVICE, SecondDevice, waits_of_a_step

MAP = "patching/attention_maps.py copy from the device"
CACHE = 1 << 20  # MiB
WINDOWS = {
    **{"sagi_start": 0.0, "sagi_end": 0.5, "sagi_sites": "all"},
    **{"salq_start": 0.5, "salq_end": 1.0, "salq_sites": "all"},
}


def collaborating(on):
    """SAGI, then SALQ, of images whose features are cached."""
    pair = [photomontage.recorded(on, CACHE, seed) for seed in (1, 2)]
    patched = mca_ctrl.collaborating(on, pair, ((0.0, 0.5), (0.5, 1.0)))
    return lambda: on.sample(*patched)


def generating(on, form):
    """A batch of two, whose subject goes where words draw."""
    subject, (mask, _) = photomontage.recorded(on, 0), mca_ctrl.left_and_right(on.size)
    model, latent, positive = layout_retouch.measured(on, on.model, {"samples": torch.zeros(2, 4, on.size, on.size)})
    preset = {"preset": "custom", **WINDOWS}
    model, _ = CollaborativeAttention.execute(
        model, subject, mask, preset, 0, True, False, "SAGI first", 0.3, form
    ).args
    return lambda: on.sample(model, latent, positive)


def collage_noise(on):
    side = 8 * on.size
    layers = layer(plain(BLUE), noise=0.4, x=0.7, behind=layer(plain(RED), noise=0.7, x=0.3))
    collage = canvas(layers, width=side, height=side)[0]
    model, _ = CollageNoise.execute(on.model, collage, 4.0).args
    picture = {"samples": torch.ones(1, 4, on.size, on.size)}
    return lambda: on.sample(model, picture)


UNET = {
    **dispatches.CASES,
    "SAGI and SALQ, cache": collaborating,
    "subject where soft words draw": lambda on: generating(on, "soft"),
    "subject where hard words draw": lambda on: generating(on, "hard"),
    "collage's noise": collage_noise,
    **{
        name: lambda on, name=name: layout_retouch.cases(on)[name]
        for name in ("retouch, running mask", "retouch, reference prompt", "step blend, ramp of half", "inversion")
    },
}
FLUX = (
    *("record", "compose 2, lockstep", "compose 2, replay", "collage, 2 layers"),
    *("swap, SAGI", "swap, SALQ", "retouch, no mask", "retouch"),
)
FOLLOWING = {  # an area that follows the words, in the steps in which it acts
    "subject where soft words draw": {MAP: 1},
    "subject where hard words draw": {MAP: 1},
    "retouch, running mask": {MAP: 0.5},
}


def on_it(make):
    """A case on the second device, by how many steps it makes. make: (bench) -> () -> anything; (steps) -> bench."""
    made = {}

    def run(steps):
        if steps not in made:
            on = make[0](steps)
            on.model.load_device = DEVICE
            made[steps] = make[1](on)
        return made[steps]()

    return run


def waited(make):
    """{file and what: times a step}, ComfyUI's own included; not what its schedules wait for before the first step."""
    with torch.inference_mode():
        waits, mixed = waits_of_a_step(on_it(make))
    assert not mixed
    found = Counter()
    for place, count in waits.items():
        where, what = place.split(" ", 1)
        found[f"{where.split(':')[0]} {what}"] += count
    return {place: count for place, count in found.items() if place != "samplers.py __float__"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["record and cache", "compose 2, cache", "SAGI and SALQ, cache"])
def test_nor_where_the_cache_is_in_main_memory(case, monkeypatch):
    monkeypatch.setattr(internals, "room_for", lambda *_: False)
    test_a_step_waits_for_nothing(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", UNET)
def test_a_step_waits_for_nothing(case):
    assert waited((lambda steps: bench.Bench("sd15-small", 8, steps), UNET[case])) == FOLLOWING.get(case, {})


@pytest.mark.parametrize("sampler, evaluations", [("dpmpp_2m", 1), ("heun", 2)])
def test_samplers_that_wait_by_themselves_are_asked_for_the_sigma(sampler, evaluations):
    """Once for each evaluation of a step."""

    def recording(on):
        model, _ = FeatureRecorder.execute(on.model, on.empty, 0).args
        return lambda: sample(model, on.empty, 1, on.positive, on.negative, sampler, "normal", on.steps, 3.0)

    found = waited((lambda steps: bench.Bench("sd15-small", 8, steps), recording))
    assert found == {"sampling.py __bool__": 1, "patching/clock.py __float__": evaluations}


@pytest.mark.slow
@pytest.mark.parametrize("case", FLUX)
def test_a_step_of_a_transformer_waits_for_nothing(case):
    def flux(steps):
        return transformers.FluxBench(8, steps, 256, (1, 2), torch.float32)

    assert waited((flux, lambda on: transformers.cases(on, [2], [2])[case])) == {}


def test_features_of_the_next_site_are_sent_while_one_is_computed(monkeypatch):
    """Those that each image reads of its own: only the first of a step is waited for at once."""
    sent, waits, original = [], [], transfers.send

    def send(parts, like):
        sent.append(original(parts, like))
        return sent[-1]

    def wait(self):
        waits.append(next(number for number, one in enumerate(reversed(sent)) if one is self))
        return self.parts

    monkeypatch.setattr(internals, "room_for", lambda *_: False)  # the features are in main memory
    monkeypatch.setattr(transfers, "send", send)
    monkeypatch.setattr(transfers.Arriving, "wait", wait)
    with torch.inference_mode(), SecondDevice():
        on = bench.Bench("sd15-small", 8, 2)
        on.model.load_device = DEVICE
        act = collaborating(on)
        sent.clear()
        act()
    streams, steps = 2, 2
    assert len(waits) == len(sent) > 20
    assert sum(later == 0 for later in waits) <= streams * steps  # nothing was sent since


# ---------------------------------------------------------------- the device itself


def seen(act):
    """What is waited for, and what would have failed."""
    with SecondDevice() as device:
        act()
    return sorted(place.split(" ", 1)[1] for place in device.waits.elements()), sum(device.mixed.values())


def there(*size):
    return torch.zeros(*size, device=DEVICE)


@pytest.mark.parametrize(
    "act, waits",
    [
        (lambda: float(there(1)), ["__float__"]),
        (lambda: bool((there(2) > 1).any()), ["__bool__"]),
        (lambda: there(2).nonzero(), ["nonzero"]),
        (lambda: torch.equal(there(2), there(2)), ["equal"]),
        (lambda: there(2).cpu(), ["copy from the device"]),
        (lambda: there(2).to("cpu", non_blocking=True), []),
        (lambda: torch.ones(2).to(DEVICE), ["copy to the device"]),
        (lambda: torch.ones(2).to(there(2)), ["copy to the device"]),
        (lambda: torch.ones(2).to(DEVICE, non_blocking=True), []),
        (lambda: torch.empty(2, pin_memory=True).copy_(there(2), non_blocking=True), []),
        (lambda: torch.empty(2).copy_(there(2)), ["copy from the device"]),
        (lambda: torch.tensor([1.0], device=DEVICE), ["tensor of Python's values"]),
        (lambda: there(4)[[1, 2]], ["index of Python's values"]),
        (lambda: there(4)[torch.tensor([1, 2])], ["index in main memory"]),
        (lambda: there(4)[there(4) > 1], ["index of bools"]),
        (lambda: there(4)[1:], []),
        (lambda: torch.ones(2).tolist() and float(torch.ones(1)), []),
    ],
)
def test_what_the_second_device_waits_for(act, waits):
    assert seen(act) == (waits, 0)


def test_tensors_of_both_places_do_not_go_together():
    assert seen(lambda: there(2) + torch.ones(2)) == ([], 1)
    assert seen(lambda: there(2) + torch.ones(())) == ([], 0)
    assert seen(lambda: torch.cat([there(2), torch.ones(2).to(there(2), non_blocking=True)])) == ([], 0)
