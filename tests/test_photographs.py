"""Real photographs pass through inversion, composite and collage, and what must stay stays."""

import pytest
import torch

from montage.evidence import photographs
from montage.workshop.photographs import NAMES, photograph


def test_photographs_lie_in_scikit_image():
    for name in NAMES:
        picture = photograph(name, 64)
        assert picture.shape == (64, 64, 3) and 0 <= picture.min() < 0.2 and 0.8 < picture.max() <= 1


def test_a_photograph_in_a_locked_layer_stays():
    assert photographs.locked(1) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", ["unet", "dit"])
def test_a_composite_of_inverted_photographs(model):
    photos, halves = photographs.Photographs(model), torch.zeros(2, 128, 128)
    halves[0, :, :64] = halves[1, :, 64:] = 1
    own, composed = (
        photos.composed(1, torch.stack([torch.ones(128, 128), torch.zeros(128, 128)])),
        photos.composed(1, halves),
    )
    difference = (composed - own).abs().mean((0, 1, 2))
    assert composed.isfinite().all() and difference[:6].mean() < 0.6 * difference[10:].mean()
