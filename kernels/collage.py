"""Collage Diffusion (arXiv 2303.00262): layers on a canvas, and where each of them is seen.

Pictures are premultiplied RGBA [4, H, W] in [0, 1]: what is transparent has no colour, so nothing bleeds in when they
are resized.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F


def premultiplied(image: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """image: [H, W, 3], alpha: [H, W], in [0, 1] -> [4, H, W]."""
    return torch.cat([image.movedim(-1, 0) * alpha, alpha[None]])


def trim(picture: torch.Tensor) -> torch.Tensor | None:
    """A picture without the rows and columns at its borders where all is transparent; None where nothing is left."""
    seen = picture[3] > 0
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    if not len(rows):
        return None
    return picture[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def place(
    picture: torch.Tensor, size: Sequence[int], x: float, y: float, scale: float, rotation: float
) -> torch.Tensor:
    """A picture on a canvas: scaled, rotated, and moved.

    picture: [4, h, w], premultiplied. size: (H, W) of the canvas. x, y: where the centre lies, in fractions of the
    canvas.
    scale: 1 is as large as the canvas contains it upright. rotation: degrees, clockwise. Returns [4, H, W].
    """
    (height, width), (h, w) = size, picture.shape[1:]
    factor = scale * min(height / h, width / w)  # canvas pixels for one of the picture's
    if factor < 1:  # sampling single points of a larger picture would skip others
        small = max(1, math.ceil(h * factor)), max(1, math.ceil(w * factor))
        picture = F.interpolate(picture[None], size=small, mode="bilinear", antialias=True)[0]
    turn = math.radians(rotation)
    # From the canvas to the picture: each canvas pixel's offset from the layer's centre, turned back.
    across = (torch.arange(width) + 0.5 - x * width)[None, :]
    down = (torch.arange(height) + 0.5 - y * height)[:, None]
    across, down = math.cos(turn) * across + math.sin(turn) * down, math.cos(turn) * down - math.sin(turn) * across
    grid = torch.stack([across / (w * factor / 2), down / (h * factor / 2)], -1)
    sampled = F.grid_sample(
        picture[None], grid[None].to(picture), mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    edge = [
        (side * factor / 2 - offset.abs() + 0.5).clamp(0, 1) for side, offset in ((w, across), (h, down))
    ]  # how much of a pixel it covers
    return sampled * (edge[0] * edge[1]).to(picture)


def over(
    layer: Callable[[int], torch.Tensor], count: int, background: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers over a background (Porter and Duff 1984), and where each is seen.

    layer: the layer of a number, [4, H, W], premultiplied; 0 is at the back. They are asked for one by one, from the
    front, and none is kept. count: how many there are. background: [3, H, W].
    Returns the composite [3, H, W] and the visible masks [count, H, W], m_i = alpha_i prod_{k above i} (1 - alpha_k);
    with the background's, prod_k (1 - alpha_k), they sum to one.
    """
    above = torch.ones_like(background[0])  # how much is left to be seen through everything above
    composite, masks = torch.zeros_like(background), background.new_empty(count, *background.shape[1:])
    for number in reversed(range(count)):
        picture = layer(number)
        composite += above * picture[:3]
        masks[number] = above * picture[3]
        above = above * (1 - picture[3])
        del picture  # before the next is made
    return composite + above * background, masks
