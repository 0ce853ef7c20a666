"""The adaptive mask: its formula, its cleaning, its modes."""

import numpy as np
import pytest
import torch

from montage.kernels.adaptive_mask import MODES, adaptive, at_size, distance_inside, without_small_components


def blob(size=20, first=5, last=15):
    mask = torch.zeros(1, size, size)
    mask[:, first:last, first:last] = 1
    return mask


def test_the_formula():
    """In [0, 1]; 0 outside; from 1/2 at the edge to 1 at the deepest place inside; 1 on the cleaned words."""
    words = torch.zeros(1, 20, 20)
    words[:, 6:8, 6:8] = 0.3
    found = adaptive(words, blob(), (20, 20))
    assert found.mask.min() == 0 and found.mask.max() == 1
    assert (found.mask[blob() == 0] == 0).all() and (found.mask[blob() == 1] >= 0.5).all()
    assert (found.mask[:, 6:8, 6:8] == 1).all() and found.mask[0, 9, 9] == 1
    assert found.mask[0, 5, 14] == 0.5 + 0.5 / 5 and found.distance[0, 5, 14] == pytest.approx(
        0.2
    )  # 1 of 5 pixels deep


@pytest.mark.parametrize("mode", MODES)
def test_nothing_found_is_nothing(mode):
    """No division by a largest distance of 0."""
    for segment in (None, torch.zeros(1, 12, 9)):
        assert torch.equal(adaptive(torch.zeros(2, 6, 5), segment, (12, 9), mode=mode).mask, torch.zeros(2, 12, 9))


def test_small_pieces_are_noise():
    """Of 400 pixels, 1 % are 4: a piece of 3 goes, one of 4 (by its corner) stays; OR adds nothing to what was
    cleaned.
    """
    words = torch.zeros(1, 20, 20)
    words[0, 0, :3] = words[0, 10:12, 10] = words[0, 12:14, 11] = 0.1
    found = adaptive(words, None, (20, 20))
    assert (
        found.cross.sum() == 7
        and found.cleaned.sum() == 4 == found.region.sum()
        and (found.mask[found.cleaned == 1] == 1).all()
    )
    assert adaptive(words, None, (20, 20), min_area=0.0).cleaned.sum() == 7
    assert adaptive(words, None, (20, 20), threshold=0.11).mask.sum() == 0


def test_modes():
    words = torch.zeros(1, 20, 20)
    words[:, 10:18, 10:18] = 1
    both = (words * blob()).bool()
    found = {mode: adaptive(words, blob(), (20, 20), mode=mode) for mode in MODES}
    assert torch.equal(found["or"].region.bool(), words.bool() | blob().bool())
    assert torch.equal(found["and"].mask, both.float()) and torch.equal(found["cross"].mask, words)
    assert torch.equal(found["sam"].region, blob()) and found["sam"].mask[0, 5, 5] < 1


def test_each_image_by_itself():
    words = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    segment = torch.stack([blob(16, 2, 6)[0], blob(16, 8, 16)[0], torch.zeros(16, 16)])
    together = adaptive(words, segment, (16, 16), 0.6)
    for number in range(3):
        alone = adaptive(words[number : number + 1], segment[number : number + 1], (16, 16), 0.6)
        assert all(torch.equal(a[number : number + 1], b) for a, b in zip(together, alone))


def test_sizes():
    ramp = torch.linspace(0, 1, 12).expand(1, 6, 12)
    assert torch.equal(at_size(ramp, (6, 12)), ramp) and at_size(ramp, (3, 6)).shape == (1, 3, 6)
    assert torch.allclose(at_size(ramp, (3, 6))[0, 0], ramp[0, 0].view(6, 2).mean(1)) and at_size(
        ramp, (13, 25)
    ).shape == (1, 13, 25)
    assert (at_size(ramp, (3, 25)).diff(dim=2) >= 0).all()


def test_a_mask_without_an_outside_is_as_deep_everywhere():
    assert (distance_inside(np.ones((4, 5), bool)) == 1).all() and not distance_inside(np.zeros((4, 5), bool)).any()
    corner = np.zeros((9, 9), bool)
    corner[:4, :4] = True
    assert distance_inside(corner)[0, 0] == 1  # what the picture cuts off goes on
    assert not without_small_components(np.zeros((3, 3), bool), 0).any()
