"""Stroke documents, and the pixels that they cover: the same ones in Python and in the editor's JavaScript.

python tests/test_strokes.py        writes tests/data/stroke_masks.json anew, needs COMFYUI_PATH
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from montage.kernels import strokes as kernel

MASKS = Path(__file__).parent / "data" / "stroke_masks.json"
DOCUMENTS = 500


class Random:
    """A generator that JavaScript has too (tests/web/strokes.test.js)."""

    def __init__(self, seed):
        self.state = seed

    def below(self, limit):
        self.state = self.state * 16807 % 2147483647
        return self.state % limit


def random_document(seed):
    """(images, height, width, strokes): small pictures, thin pens, points on the edges and outside of them, erasers."""
    draw = Random(seed + 1)
    images, height, width = 1 + draw.below(4), 1 + draw.below(72), 1 + draw.below(96)
    strokes = []
    for _ in range(1 + draw.below(6)):
        stroke = {"k": draw.below(images), "r": draw.below((60, 60, 400, 2000)[draw.below(4)]) / 4, "p": []}
        for _ in range(2 * (1 + draw.below(5))):
            place = draw.below(8)
            stroke["p"].append((0, 10_000)[place] if place < 2 else draw.below(48_000) / 4 - 1000)
        if draw.below(5) == 0:
            stroke["e"] = 1
        strokes.append(stroke)
    return images, height, width, strokes


def summary(seed):
    """The masks of a random document in short, and how many pixels are painted for several images."""
    images, height, width, strokes = random_document(seed)
    masks = kernel.draw(strokes, images, height, width) > 0
    return f"{hashlib.sha256(masks.numpy().tobytes()).hexdigest()[:12]} {int((masks.sum(0) > 1).sum())}"


def test_random_documents_cover_the_pixels_of_the_file():
    """tests/web/strokes.test.js holds web/raster.js to the same file, its conflicts included."""
    assert [summary(seed) for seed in range(DOCUMENTS)] == json.loads(MASKS.read_text(encoding="utf-8"))


def test_a_pixel_is_covered_when_its_centre_is_within_the_radius():
    """By distances alone; half of the documents have pens of less than a pixel."""
    for seed in range(60):
        images, height, width, strokes = random_document(seed)
        strokes = [{**stroke, "e": 0} for stroke in strokes]
        drawn = kernel.draw(strokes, images, height, width)
        y, x = np.mgrid[:height, :width] + 0.5
        nearest = np.full((images, height, width), np.inf)  # distance from the outline, negative inside
        for stroke in strokes:
            radius = max(math.sqrt(0.5), stroke["r"] / 10_000 * max(width, height))
            points = np.array(stroke["p"]).reshape(-1, 2) / 10_000 * (width, height)
            for a, b in zip(points[[0, *range(len(points) - 1)]], points, strict=True):
                length2 = max(((b - a) ** 2).sum(), 1e-12)
                along = (((x - a[0]) * (b - a)[0] + (y - a[1]) * (b - a)[1]) / length2).clip(0, 1)
                distance = np.hypot(x - a[0] - along * (b - a)[0], y - a[1] - along * (b - a)[1]) - radius
                nearest[stroke["k"]] = np.minimum(nearest[stroke["k"]], distance)
        assert (drawn.numpy()[nearest < -1e-9] == 1).all() and (drawn.numpy()[nearest > 1e-9] == 0).all()


@pytest.mark.parametrize("size", [(48, 64), (7, 5), (1, 1), (512, 512)])
@pytest.mark.parametrize("radius", [0, 1])
def test_no_stroke_in_the_picture_is_lost(size, radius):
    """On its corners and edges too, the right and lower ones among them; what lies outside does not come in."""
    for x in (0, 5000, 10_000):
        for y in (0, 3333.5, 10_000):
            assert kernel.draw([{"k": 0, "r": radius, "p": [x, y]}], 1, *size).any()
    for points in ([10_000, 1000, 10_000, 9000], [1000, 10_000, 9000, 10_000]):
        lines = kernel.draw([{"k": 0, "r": radius, "p": points}], 1, *size)[0]
        along, across = (lines[:, -1], lines[:, :-1]) if points[0] == 10_000 else (lines[-1], lines[:-1])
        assert along.mean() >= 0.75 and not across.any()
    assert not kernel.draw([{"k": 0, "r": 1, "p": [12_000, -2000, 12_000, 12_000]}], 1, 48, 64).any()


def test_a_long_stroke_is_drawn_in_parts(monkeypatch):
    points = np.random.default_rng(0).integers(0, 10_000, 400).tolist()
    whole = kernel.draw([{"k": 0, "r": 90, "p": points}], 1, 64, 64)
    monkeypatch.setattr(kernel, "MOST_RUNS", 200)
    assert torch.equal(kernel.draw([{"k": 0, "r": 90, "p": points}], 1, 64, 64), whole) and 0 < whole.mean() < 1


def document(strokes, **more):
    return json.dumps({"v": 1, "strokes": strokes, **more})


def test_a_document_is_drawn_in_order():
    base, strokes = kernel.parse_document(
        document(
            [
                {"k": 1, "r": 500, "p": [1000, 5000, 9000, 5000]},
                {"k": 0, "r": 500, "p": [5000, 1500]},
                {"k": 1, "r": 600, "p": [5000, 5000], "e": 1},
            ],
            base=1,
        ),
        2,
    )
    assert base == 1
    drawn = kernel.draw(strokes, 2, 100, 200)  # a radius is in parts of the long side: 10 pixels
    assert drawn.shape == (2, 100, 200)
    assert drawn[1, 50, 30] == 1 and drawn[1, 50, 100] == 0 and drawn[1, 50, 170] == 1  # erased in the middle
    assert drawn[1, 45, 30] == 1 and drawn[1, 65, 30] == 0
    assert drawn[0, 15, 100] == 1 and float(drawn[0].sum()) == pytest.approx(3.14159 * 100, rel=0.02)


def test_the_same_document_fits_every_resolution():
    _, strokes = kernel.parse_document(document([{"k": 0, "r": 700, "p": [2000, 2000, 8000, 7000]}]), 1)
    small, large = (kernel.draw(strokes, 1, size, size) for size in (64, 512))
    assert float(small.mean()) == pytest.approx(float(large.mean()), rel=0.1)


def test_an_empty_text_is_an_empty_document():
    assert kernel.parse_document("", 3) == (None, [])
    assert kernel.draw([], 3, 8, 9).shape == (3, 8, 9)


@pytest.mark.parametrize(
    "text, part",
    [
        ("{", "not JSON"),
        ("[]", "not of version 1"),
        ('{"v": 2, "strokes": []}', "not of version 1"),
        ('{"v": 1}', "not of version 1"),
        (document([], base=2), "base is image 2, and there are 2 images"),
        (document([7]), "stroke 0 is 7"),
        (document([{"k": 2, "r": 5, "p": [1, 2]}]), "stroke 0 is on image 2, and there are 2 images (0 to 1)"),
        (document([{"k": True, "r": 5, "p": [1, 2]}]), "on image True"),
        (document([{"k": 0, "r": -1, "p": [1, 2]}]), "radius -1"),
        (document([{"k": 0, "r": 5, "p": [1]}]), "points [1]"),
        (document([{"k": 0, "r": 5, "p": [1, "x"]}]), "points [1, 'x']"),
        (document([{"k": 0, "r": 5, "p": [1, 1e9]}]), "points"),
        ('{"v": 1, "strokes": [{"k": 0, "r": NaN, "p": [0, 0]}]}', "radius nan"),
        ("x" * 2_000_001, "2000001 characters"),
    ],
)
def test_a_wrong_document_says_what_is_wrong(text, part):
    with pytest.raises(ValueError) as error:
        kernel.parse_document(text, 2)
    assert part in str(error.value)


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(summary(seed)) for seed in range(DOCUMENTS))
    MASKS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
