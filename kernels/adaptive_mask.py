"""The adaptive mask of Layout-and-Retouch (arXiv 2407.09779, section 3.3): how much of the target a place takes, the
rest being the layout. Maps and masks are [B, H, W] in [0, 1], each image of the batch by itself."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

MODES = ("or", "and", "sam", "cross")
EIGHT = np.ones((3, 3))  # neighbours of a pixel, and itself


class AdaptiveMask(NamedTuple):
    """The steps of the paper's formula, [B, H, W] each."""

    cross: torch.Tensor  # M^c: where the map reaches the threshold, 0 or 1
    cleaned: torch.Tensor  # C(M^c): without its small components
    region: torch.Tensor  # M^k: of the object
    distance: torch.Tensor  # D(M^k): to the edge of the region, 1 where it is largest
    mask: torch.Tensor  # M


def adaptive(
    found: torch.Tensor,
    segment: torch.Tensor | None,
    size: Sequence[int],
    threshold: float = 0.1,
    min_area: float = 0.01,
    mode: str = "or",
) -> AdaptiveMask:
    """M = clip([M^k] (1/2 + 1/2 D(M^k) / max D) + C(M^c), 0, 1), with M^k = C(M^c) OR M^SAM.

    0 outside of the region, 1/2 at its edge and more inside, 1 where the model looked for the words. The formula as
    printed is 1/2 in the background and up to 2 inside, which is no share of two images; this reading is.
    found: cross-attention map [B, h, w], segment: mask of the object [B or 1, H', W'] (None: all 0). size: (H, W) of
    the result.
    threshold: of the map. min_area: components of less than this part of the picture are noise. mode: what M^k is:
    "or", "and" (where both agree; M is 1 there), "sam" (the segment alone), "cross" (the map alone).
    """
    cross = at_size(found, size) >= threshold
    cleaned = _each(lambda mask: without_small_components(mask, min_area * mask.size), cross)
    sam = torch.zeros_like(cleaned) if segment is None else (at_size(segment, size) >= 0.5).expand_as(cleaned)
    region = {"or": cleaned | sam, "and": cleaned & sam, "sam": sam, "cross": cleaned}[mode]
    distance = _each(distance_inside, region)
    certain = region & cleaned if mode != "sam" else torch.zeros_like(region)
    mask = (region * (0.5 + 0.5 * distance) + certain).clamp(0, 1)
    return AdaptiveMask(cross.float(), cleaned.float(), region.float(), distance, mask)


def at_size(masks: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Masks [B, h, w] at another size (H, W): averages where that is smaller, bilinear where it is larger."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks.float()
    if size[0] <= masks.shape[1] and size[1] <= masks.shape[2]:
        return torch.nn.functional.adaptive_avg_pool2d(masks[:, None].float(), (size[0], size[1]))[:, 0]
    return torch.nn.functional.interpolate(masks[:, None].float(), size=list(size), mode="bilinear")[:, 0]


def without_small_components(mask: np.ndarray, least: float) -> np.ndarray:
    """A boolean array [H, W] without its connected components of fewer than `least` pixels (diagonal neighbours are
    connected).
    """
    components = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, EIGHT, output=components)
    kept = np.bincount(components.ravel()) >= least
    kept[0] = False
    return kept[components]


def distance_inside(mask: np.ndarray) -> np.ndarray:
    """How deep inside a boolean array [H, W] each pixel lies, Euclidean, as a part of the deepest: float32, 0 outside.

    The picture's edge is no edge of the region: what is cut off there continues. A mask without an outside is 1
    everywhere.
    """
    if mask.all():
        return np.ones(mask.shape, dtype=np.float32)
    distance = np.asarray(ndimage.distance_transform_edt(mask))
    return (distance / max(distance.max(), 1)).astype(np.float32)


def _each(function: Callable[[np.ndarray], np.ndarray], masks: torch.Tensor) -> torch.Tensor:
    """Apply a function of one numpy array to each image."""
    return torch.stack([torch.from_numpy(function(mask)) for mask in masks.cpu().numpy()]).to(masks.device)
