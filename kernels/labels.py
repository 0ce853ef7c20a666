"""Label maps: who owns a pixel, at the image's size and at every level of the UNet. -1 means nobody."""

import json

import numpy as np
import torch
from PIL import Image, ImageDraw

UNIT = 10_000  # stroke coordinates run from 0 to UNIT along each axis; radii are in UNITs of the long side
LONGEST_DOCUMENT = 2_000_000  # characters

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


def palette(count):
    """`count` distinct colours [count, 3] in [0, 1]; the first ten are PALETTE, the others darker turns of it."""
    turns = torch.arange(count) // len(PALETTE)
    return PALETTE[torch.arange(count) % len(PALETTE)] * (0.7**turns)[:, None]


def at_grid(labels, grid):
    """A label map at another level: the label of each cell's top-left pixel.

    labels: [H, W] int64 tensor, grid: (h, w). Nearest, never an average of masks: the labels stay a partition.
    """
    resized = torch.nn.functional.interpolate(labels[None, None].double(), size=tuple(grid), mode="nearest")
    return resized[0, 0].long()


def from_masks(masks, base):
    """The label map of masks, one for each image: the largest mask wins, and `base` where all are zero.

    masks: [N, H, W] in [0, 1] -> [H, W] int64.
    """
    return torch.where(masks.amax(0) > 0, masks.argmax(0), base)


def to_masks(labels, count):
    """One mask for each label, [count, H, W] float32: a partition."""
    return (labels[None] == torch.arange(count)[:, None, None]).float()


def picture(labels, count):
    """The label map in colours, [H, W, 3] in [0, 1]; black where nobody is."""
    colours = torch.cat([palette(count), torch.zeros(1, 3)])
    return colours[labels]


def pool(marks, grid):
    """Strokes on a grid of cells, so that no stroke is lost however thin.

    marks: [N, H, W] in [0, 1], what was painted on each image; a pixel counts above 0.5, and a cell belongs to the
    image that covers most of it, if any does. Returns [h, w] int64, -1 where nothing was painted.
    """
    covered = (marks > 0.5).float()[None]
    counts = torch.nn.functional.adaptive_avg_pool2d(covered, tuple(grid))[0]
    return torch.where(counts.amax(0) > 0, counts.argmax(0), -1)


def from_picture(image, count):
    """Strokes from a label picture: a pixel marks the image whose colour it has, dark pixels mark nothing.

    image: [H, W, 3] in [0, 1] -> [count, H, W] float32.
    """
    candidates = torch.cat([palette(count), torch.zeros(1, 3)])
    nearest = torch.cdist(image[..., :3].reshape(-1, 3).float(), candidates).argmin(-1).reshape(image.shape[:2])
    return to_masks(nearest, count)


def parse_document(text, count):
    """A stroke document: {"v": 1, "base": image, "strokes": [{"k": image, "r": radius, "p": [x, y, x, y, ...], "e": 1
    to erase}]}.

    Coordinates are in UNITs of each axis, radii in UNITs of the long side. Returns (base or None, strokes).
    Raises ValueError that says what is wrong with it.
    """
    if len(text) > LONGEST_DOCUMENT:
        raise ValueError(
            f"the stroke document has {len(text)} characters, more than {LONGEST_DOCUMENT}: paint with fewer strokes"
        )
    if not text.strip():
        return None, []
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the stroke document is no JSON ({error})") from None
    if not isinstance(document, dict) or document.get("v") != 1 or not isinstance(document.get("strokes"), list):
        raise ValueError('the stroke document is not of version 1: {"v": 1, "base": 0, "strokes": [...]} was expected')
    base = document.get("base")
    if base is not None and not _is_image(base, count):
        raise ValueError(
            f"the stroke document's base is image {base!r}, and there are {count} images (0 to {count - 1})"
        )
    for number, stroke in enumerate(document["strokes"]):
        _check_stroke(stroke, number, count)
    return base, document["strokes"]


def _is_image(value, count):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _is_number(value, low, high):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _check_stroke(stroke, number, count):
    if not isinstance(stroke, dict) or not {"k", "r", "p"} <= stroke.keys():
        raise ValueError(
            f'stroke {number} is {str(stroke)[:60]}: each needs "k" (image), "r" (radius) and "p" (points)'
        )
    if not _is_image(stroke["k"], count):
        raise ValueError(
            f"stroke {number} is on image {stroke['k']!r}, and there are {count} images (0 to {count - 1})"
        )
    points = stroke["p"]
    if not _is_number(stroke["r"], 0, UNIT):
        raise ValueError(f"stroke {number} has radius {stroke['r']!r}: 0 to {UNIT} was expected")
    if (
        not isinstance(points, list)
        or len(points) < 2
        or len(points) % 2
        or not all(_is_number(c, -10 * UNIT, 10 * UNIT) for c in points)
    ):
        raise ValueError(
            f"stroke {number} has points {str(points)[:60]}: [x, y, x, y, ...] in 0 to {UNIT} was expected"
        )


def draw(strokes, count, height, width):
    """Draw a document's strokes in order: [count, height, width] float32, one mask for each image."""
    masks = [Image.new("L", (width, height)) for _ in range(count)]
    pens = [ImageDraw.Draw(mask) for mask in masks]
    for stroke in strokes:
        pen, ink = pens[stroke["k"]], 0 if stroke.get("e") else 255
        radius = max(0.5, stroke["r"] / UNIT * max(width, height))
        points = [(x / UNIT * width, y / UNIT * height) for x, y in zip(stroke["p"][::2], stroke["p"][1::2])]
        if len(points) > 1:
            pen.line(points, fill=ink, width=max(1, round(2 * radius)), joint="curve")
        for x, y in (points[0], points[-1]):
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=ink)
    return torch.from_numpy(np.stack([np.asarray(mask) for mask in masks])).float() / 255
