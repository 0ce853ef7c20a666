"""Growing masks, and their way to grids: one function for every node that dilates."""

import pytest
import torch

from montage.kernels import grid_masks
from montage.localize import boxes


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 9, 300])
def test_dilating_takes_the_largest_value_in_a_square(radius, dtype):
    mask = (torch.rand(3, 33, 20, generator=torch.Generator().manual_seed(radius)) > 0.99).to(dtype)
    grown = grid_masks.dilate(mask, radius)
    padded = torch.nn.functional.pad(mask.float(), [radius] * 4)
    pooled = torch.nn.functional.max_pool2d(padded, 2 * radius + 1, stride=1)
    assert grown.dtype == dtype and torch.equal(grown.float(), pooled)
    assert torch.equal(grid_masks.dilate(mask[0], radius), grown[0])


def test_there_is_one_dilation():
    assert boxes.dilate is grid_masks.dilate


@pytest.mark.parametrize("radius", [1, 64, 256])
def test_the_work_grows_with_the_logarithm_of_the_radius(radius, monkeypatch):
    rounds = []
    maximum = torch.maximum
    monkeypatch.setattr(torch, "maximum", lambda a, b: rounds.append(a.shape) or maximum(a, b))
    grid_masks.dilate(torch.zeros(600, 600), radius)
    assert len(rounds) == 2 * (2 * radius).bit_length()
