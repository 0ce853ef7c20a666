"""Masks as they come in: one rule for their shape."""

import pytest
import torch

from montage.nodes.inputs import mask_for

ALIKE = [((512, 768), (512, 768)), ((64, 96), (512, 768)), ((519, 512), (512, 512)), ((9, 8), (520, 512))]
OTHER = [((512, 512), (512, 576)), ((768, 512), (512, 768)), ((64, 64), (512, 768)), ((530, 512), (512, 512))]


@pytest.mark.parametrize("mask, picture", ALIKE)
def test_a_mask_in_the_pictures_proportions_is_taken(mask, picture):
    assert mask_for("Node", "mask", torch.ones(mask), picture).shape == (1, *mask)
    assert mask_for("Node", "mask", torch.ones(2, 1, *mask), picture).shape == (2, *mask)


def test_a_mask_may_differ_by_what_the_latent_cuts():
    assert mask_for("Node", "mask", torch.ones(1, 540, 512), (512, 512), cut=32).shape == (1, 540, 512)
    with pytest.raises(ValueError, match="another aspect ratio"):
        mask_for("Node", "mask", torch.ones(1, 550, 512), (512, 512), cut=32)


@pytest.mark.parametrize("mask, picture", OTHER)
def test_a_mask_of_another_shape_is_refused(mask, picture):
    (height, width), (h, w) = mask, picture
    with pytest.raises(
        ValueError, match=f"Node: mask is {width}x{height} and the picture {w}x{h}, another aspect ratio"
    ):
        mask_for("Node", "mask", torch.ones(mask), picture)


def test_the_empty_mask_of_a_picture_without_alpha_is_named():
    for size in ((512, 512), (512, 768)):
        with pytest.raises(ValueError, match="Load Image gives such a mask for a picture without transparency"):
            mask_for("Node", "mask", torch.zeros(1, 64, 64), size)
    assert mask_for("Node", "mask", torch.zeros(1, 64, 64), (64, 64)).sum() == 0
    assert mask_for("Node", "mask", torch.zeros(2, 64, 64), (512, 512)).sum() == 0
