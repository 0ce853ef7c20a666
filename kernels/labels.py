"""Label maps: the image that each pixel is taken from, at the image's size and at every level of the UNet. -1: none."""

from collections.abc import Sequence

import torch

# Image 0, 1, 2, ...: distinct hues of one lightness (golden angle), so that no label looks like "unmarked" black.
PALETTE = (
    torch.tensor(
        [
            [230, 80, 80],
            [80, 140, 235],
            [90, 190, 90],
            [240, 190, 60],
            [170, 110, 220],
            [70, 195, 200],
            [235, 130, 180],
            [160, 125, 85],
            [150, 205, 60],
            [245, 135, 50],
        ]
    )
    / 255
)

COLOUR_TOLERANCE = 0.12  # distance in RGB, of 1 a channel: room for JPEG and for soft edges, not for another colour


def palette(count: int) -> torch.Tensor:
    """`count` distinct colours [count, 3] in [0, 1]; the first ten are PALETTE, the others darker turns of it."""
    turns = torch.arange(count) // len(PALETTE)
    return PALETTE[torch.arange(count) % len(PALETTE)] * (0.7**turns)[:, None]


def at_grid(labels: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """A label map at another level: the label of each cell's top-left pixel.

    labels: [H, W] int64 tensor, grid: (h, w). Nearest, never an average of masks: the labels stay a partition.
    """
    resized = torch.nn.functional.interpolate(labels[None, None].double(), size=list(grid), mode="nearest")
    return resized[0, 0].long()


def from_masks(masks: torch.Tensor, base: int) -> torch.Tensor:
    """The label map of masks, one for each image: the largest mask wins, and `base` where all are zero.

    masks: [N, H, W] in [0, 1] -> [H, W] int64.
    """
    return torch.where(masks.amax(0) > 0, masks.argmax(0), base)


def to_masks(labels: torch.Tensor, count: int) -> torch.Tensor:
    """One mask for each label, [count, H, W] float32: a partition."""
    return (labels[None] == torch.arange(count)[:, None, None]).float()


def picture(labels: torch.Tensor, count: int) -> torch.Tensor:
    """The label map in colours, [H, W, 3] in [0, 1]; black where the label is -1."""
    colours = torch.cat([palette(count), torch.zeros(1, 3)])
    return colours[labels]


def pool(marks: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Strokes on a grid of cells, so that no stroke is lost however thin.

    marks: [N, H, W] in [0, 1], what was painted on each image; a pixel counts above 0.5, and a cell belongs to the
    image that covers most of it, if any does. Returns [h, w] int64, -1 where nothing was painted.
    """
    covered = (marks > 0.5).float()[None]
    counts = torch.nn.functional.adaptive_avg_pool2d(covered, (grid[0], grid[1]))[0]
    return torch.where(counts.amax(0) > 0, counts.argmax(0), -1)


def paste(pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Each pixel from the picture that its label names. pictures: [N, H, W, C], labels: [H, W] int64 -> [H, W, C]."""
    return pictures.gather(0, labels[None, ..., None].expand(1, *pictures.shape[1:]))[0]


def from_picture(image: torch.Tensor, count: int) -> torch.Tensor:
    """Strokes from a label picture: a pixel marks the image whose colour it has. Black, the white of paper and
    whatever is farther from every colour than COLOUR_TOLERANCE mark nothing.

    image: [H, W, 3] in [0, 1] -> [count, H, W] float32.
    """
    blank = torch.tensor([[0.0] * 3, [1.0] * 3])
    candidates = torch.cat([palette(count), blank])
    distance, nearest = torch.cdist(image[..., :3].reshape(-1, 3).float(), candidates).min(-1)
    unmarked = (distance > COLOUR_TOLERANCE) | (nearest >= count)
    return to_masks(nearest.masked_fill(unmarked, -1).reshape(image.shape[:2]), count)
