"""Regions of a picture and the tokens that stand for them (MCA-Ctrl, arXiv 2505.01428, section 3.3 and its released
code).
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_max_pool2d, interpolate


def at_size(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A mask [h, w] in [0, 1] at another size, as bool: True above one half. Nearest, so that its edges stay where they
    are.
    """
    return interpolate(mask[None, None].float(), size=list(size), mode="nearest-exact")[0, 0] > 0.5


def dilate(mask: torch.Tensor, radius: int) -> torch.Tensor:
    """A mask [..., H, W], of any type and not negative, grown by a square of `radius` pixels to each side: the largest
    value within it (MCA-Ctrl's code dilates five times by 3x3: radius 5). On the mask's own device.
    """
    for side in (-1, -2):
        mask = _largest_within(mask, radius, side)
    return mask


def _largest_within(mask: torch.Tensor, radius: int, side: int) -> torch.Tensor:
    """The largest value up to `radius` places before and behind, along one side. The windows double in each round."""
    length = mask.shape[side]
    border = list(mask.shape)
    border[side] = min(radius, length)
    window, whole = 1, 2 * border[side] + 1
    largest = torch.cat([mask.new_zeros(border), mask, mask.new_zeros(border)], side)
    while window < whole:
        step = min(window, whole - window)
        kept = largest.shape[side] - step
        largest = torch.maximum(largest.narrow(side, 0, kept), largest.narrow(side, step, kept))
        window += step
    return largest


def cells(mask: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The tokens of a bool mask [H, W] at a level, bool [h, w]: those that it covers by more than half; where that
    leaves none, all that it touches. Only an empty mask is empty at some level."""
    h, w = grid
    mask = mask[None, None].float()
    covered = adaptive_avg_pool2d(mask, (h, w))[0, 0] > 0.5
    return covered if covered.any() else adaptive_max_pool2d(mask, (h, w))[0, 0] > 0


def strongest(maps: torch.Tensor, grid: Sequence[int], share: float, soft: bool) -> torch.Tensor:
    """The region of a map of words at a level: its strongest `share` of the tokens is exactly 1 in each image; the
    others keep what the map says if `soft`, and are 0 if not.

    maps: [B, H, W] in [0, 1]. share: in (0, 1], at least one token. Returns [B, h, w] in [0, 1].
    """
    resized = interpolate(maps[:, None].float(), size=list(grid), mode="bilinear", antialias=True)[:, 0]
    flat = resized.flatten(1)
    top = flat.topk(max(1, round(share * flat.shape[1]))).indices
    kept = flat if soft else torch.zeros_like(flat)
    return kept.scatter(1, top, 1.0).unflatten(1, list(grid))
