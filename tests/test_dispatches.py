"""What a step dispatches beyond plain sampling: counted, so that no machine changes it."""

import pytest

from montage.workshop.dispatches import of_a_step
from montage.workshop.random_models import random_model
from montage.workshop.sampling import empty, halves, inject, masks_of, recorder, sample

MEBIBYTES = 4096


def run_plainly(steps):
    return sample(random_model("sd15-small"), empty(), steps=steps)


def recording(cache_mb):
    return lambda steps: sample(*recorder(cache_mb=cache_mb), steps=steps)


def composing(cache_mb):
    stacks = {
        steps: [sample(*recorder(cache_mb=cache_mb), seed=seed, steps=steps) for seed in (1, 2)] for steps in (4, 8)
    }
    return lambda steps: sample(*inject(stacks[steps], masks_of(halves())), steps=steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make, cache_mb, most",
    [(recording, 0, 1.005), (recording, MEBIBYTES, 1.035), (composing, MEBIBYTES, 1.28), (composing, 0, 3.26)],
)
def test_a_step_dispatches_no_more_than_it_did(make, cache_mb, most):
    plain, waits, _ = of_a_step(run_plainly)
    found, own_waits, _ = of_a_step(make(cache_mb))
    assert found / plain <= most
    assert own_waits - waits <= 1  # the sigma of the step
