"""The layout editor draws in the browser what Collage Canvas composites: both keep to the numbers of one file."""

import json
import weakref
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


def test_one_layer_is_in_memory_at_a_time():
    """And the result is that of all at once (Porter and Duff)."""
    placed, alive = [], []

    def layer(number):
        assert not any(reference() is not None for reference in alive)
        picture = torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(number))
        picture[:3] *= picture[3]
        placed.append(number)
        alive.append(weakref.ref(picture))
        return picture

    background = torch.rand(3, 6, 5)
    composite, masks = kernel.over(layer, 7, background)
    assert placed == [6, 5, 4, 3, 2, 1, 0]
    alive.clear()
    expected, left = background, torch.ones(6, 5)
    for number in range(7):
        picture = layer(number)
        expected = picture[:3] + (1 - picture[3]) * expected
        alive.clear()
    for number in reversed(range(7)):
        alpha = layer(number)[3]
        assert torch.allclose(masks[number], left * alpha, atol=1e-6)
        left = left * (1 - alpha)
        alive.clear()
    assert torch.allclose(composite, expected, atol=1e-6)
