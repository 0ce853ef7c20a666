"""The layout editor draws in the browser what Collage Canvas composites: both keep to the numbers of one file."""

import json
from pathlib import Path

import pytest
import torch

from montage.kernels import collage as kernel

PLACES = json.loads((Path(__file__).parent / "data" / "collage_places.json").read_text(encoding="utf-8"))


def distance_inside(corners, width, height):
    """How far each pixel's centre lies inside a convex polygon, [H, W]; negative outside. Corners clockwise, as
    seen.
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    sides = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        length = ((bx - ax) ** 2 + (by - ay) ** 2) ** 0.5
        sides.append(((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / length)
    return torch.stack(sides).amin(0)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place['rotation']} degrees")
def test_a_layer_is_where_the_editor_draws_it(place):
    (width, height), (w, h) = place["canvas"], place["layer"]
    picture = torch.zeros(4, h, w)
    picture[:, : h // 2, : w // 2] = 1  # its top left quarter, so that turning it the wrong way is seen
    alpha = kernel.place(picture, (height, width), *(place[name] for name in ("x", "y", "scale", "rotation")))[3]

    top_left, top_right, bottom_right, bottom_left = (torch.tensor(corner) for corner in place["corners"])
    right, down = (top_right - top_left) * (w // 2) / w, (bottom_left - top_left) * (h // 2) / h
    quarter = [top_left, top_left + right, top_left + right + down, top_left + down]
    inside = distance_inside([corner.tolist() for corner in quarter], width, height)
    soft = 1 + (top_right - top_left).norm().item() / w  # a pixel of the canvas and one of the picture
    assert (inside > soft).sum() > 100
    assert alpha[inside > soft].min() > 0.99
    assert alpha[inside < -soft].max() < 0.01
