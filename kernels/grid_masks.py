"""Regions of a picture and the tokens that stand for them (MCA-Ctrl, arXiv 2505.01428, section 3.3 and its released
code).
"""

import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate, max_pool2d


def at_size(mask, size):
    """A mask [h, w] in [0, 1] at another size, as bool: True above one half. Nearest, so that its edges stay where they
    are.
    """
    return interpolate(mask[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0] > 0.5


def dilate(mask, radius):
    """A bool mask [h, w] grown by a square of `radius` pixels to each side (5: the code's five 3x3 dilations)."""
    return max_pool2d(mask[None, None].float(), 2 * radius + 1, stride=1, padding=radius)[0, 0] > 0


def cells(mask, grid):
    """The tokens of a bool mask [H, W] at a level, bool [h, w]: those that it covers by more than half; where that
    leaves none, all that it touches. Only an empty mask is empty at some level."""
    grid, mask = tuple(grid), mask[None, None].float()
    covered = adaptive_avg_pool2d(mask, grid)[0, 0] > 0.5
    return covered if covered.any() else adaptive_max_pool2d(mask, grid)[0, 0] > 0


def strongest(maps, grid, share, soft):
    """The region of a map of words at a level: its strongest `share` of the tokens is exactly 1 in each image; the
    others keep what the map says if `soft`, and are 0 if not.

    maps: [B, H, W] in [0, 1]. share: in (0, 1], at least one token. Returns [B, h, w] in [0, 1].
    """
    resized = interpolate(maps[:, None].float(), size=tuple(grid), mode="bilinear", antialias=True)[:, 0]
    flat = resized.flatten(1)
    top = flat.topk(max(1, round(share * flat.shape[1]))).indices
    kept = flat if soft else torch.zeros_like(flat)
    return kept.scatter(1, top, 1.0).unflatten(1, tuple(grid))
