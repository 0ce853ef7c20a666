"""Boxes, points and masks: what needs no model. Boxes are ComfyUI's BOUNDING_BOX dicts, in pixels."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..kernels.grid_masks import dilate
from . import Problem

CHOICES = ["best score", "largest", "all", "index"]
COLOURS = [(230, 60, 90), (40, 150, 230), (250, 170, 30), (60, 180, 90), (160, 90, 220), (20, 180, 180)]
LEFT_OUT, EDGE = (150, 150, 150), (255, 235, 60)


def per_image(boxes: Any, images: int) -> list[list[dict]]:
    """BOUNDING_BOX in any of the forms that ComfyUI's nodes use -> one list for each image.

    A single dict or a flat list is meant for every image; a list of lists has one for each, or one for all.
    """
    if not boxes:
        return [[] for _ in range(images)]
    if isinstance(boxes, dict):
        boxes = [[boxes]]
    elif isinstance(boxes[0], dict):
        boxes = [boxes]
    if len(boxes) == 1:
        return [list(boxes[0]) for _ in range(images)]
    if len(boxes) != images:
        raise Problem(
            f"there are boxes of {len(boxes)} images and {images} images; connect the same batch to both nodes."
        )
    return [list(found) for found in boxes]


def inside(box: dict, height: int, width: int) -> dict | None:
    """The part of a box that lies in the picture; None if that is less than a pixel a side, or not a number."""
    try:
        sides = [float(side) for side in corners(box)]
    except (KeyError, TypeError, ValueError):
        raise Problem(f"{box!r} is not a box; ComfyUI's boxes have x, y, width and height, in pixels.") from None
    if not all(map(math.isfinite, sides)):
        return None
    x0, x1 = (min(max(x, 0.0), width) for x in sides[0::2])
    y0, y1 = (min(max(y, 0.0), height) for y in sides[1::2])
    if x1 - x0 < 1 or y1 - y0 < 1:
        return None
    return {**box, "x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}


def corners(box: dict) -> tuple[float, float, float, float]:
    return box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]


def score(box: dict) -> float:
    """Boxes drawn by hand carry no score: they are certain."""
    given = box.get("score")
    return 1.0 if given is None else float(given)


def overlap(a: dict, b: dict) -> float:
    """Intersection over union, 0..1."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners(a), corners(b)
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    return shared / max(a["width"] * a["height"] + b["width"] * b["height"] - shared, 1e-9)


def without_duplicates(boxes: list[dict], threshold: float) -> list[dict]:
    """Non-maximum suppression among boxes of one label; the best first. At threshold 1 all stay."""
    kept: list[dict] = []
    for box in sorted(boxes, key=score, reverse=True):
        if all(box.get("label") != other.get("label") or overlap(box, other) <= threshold for other in kept):
            kept.append(box)
    return kept


def choose(boxes: list[dict], how: str, index: int) -> list[dict]:
    """The boxes to cut out, chosen among those of each label, best score first."""
    labels = dict.fromkeys(box.get("label") for box in boxes)
    groups = [sorted((b for b in boxes if b.get("label") == label), key=score, reverse=True) for label in labels]
    if how == "best score":
        groups = [group[:1] for group in groups]
    elif how == "largest":
        groups = [[max(group, key=lambda b: b["width"] * b["height"])] for group in groups]
    elif how == "index":
        groups = [group[index : index + 1] for group in groups]
    return [box for group in groups for box in group]


def read_points(text: str | None, what: str) -> list[tuple[float, float]]:
    """[{"x": .., "y": ..}, ..] in pixels, the form of core's SAM3 nodes and of point editors."""
    if not text or not text.strip():
        return []
    try:
        points = [(float(point["x"]), float(point["y"])) for point in json.loads(text)]
    except (ValueError, TypeError, KeyError):
        raise Problem(f'{what} is not a list of points; write [{{"x": 120, "y": 80}}], in pixels.') from None
    if not all(math.isfinite(value) for point in points for value in point):
        raise Problem(f"{what} holds a value that is not a number; give pixels.")
    return points


def fill(boxes: list[dict], height: int, width: int) -> Tensor:
    """The pixels whose centres lie in the boxes, as a mask (H, W) bool."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    for box in boxes:
        x0, y0, x1, y1 = (math.floor(value + 0.5) for value in corners(box))
        mask[y0:y1, x0:x1] = True
    return mask


def overlay(image: Tensor, subject: Tensor, edit: Tensor, chosen: list[dict], others: list[dict]) -> Tensor:
    """The picture (H, W, 3) in 0..1 with the subject tinted, the editable region's border in yellow, and the boxes:
    the chosen in colour, those left out in grey. Each bears its number (the `index` of its label), label and score."""
    tinted = image.clone()
    inner = subject > 0.5
    tinted[inner] = 0.5 * tinted[inner] + 0.5 * torch.tensor(COLOURS[0], dtype=image.dtype) / 255
    grown = dilate(edit[None], 1 + max(image.shape[:2]) // 512)[0]
    tinted[(grown > 0.5) & (edit <= 0.5)] = torch.tensor(EDGE, dtype=image.dtype) / 255

    picture = Image.fromarray((tinted * 255).round().clamp(0, 255).to(torch.uint8).numpy())
    draw = ImageDraw.Draw(picture)
    size = max(10, min(image.shape[:2]) // 32)
    ranked = sorted(chosen + others, key=score, reverse=True)
    labels = list(dict.fromkeys(box.get("label") for box in chosen + others))
    for box in others + chosen:  # the chosen on top
        colour = COLOURS[labels.index(box.get("label")) % len(COLOURS)] if box in chosen else LEFT_OUT
        number = [b for b in ranked if b.get("label") == box.get("label")].index(box)
        text = f"{number} {box.get('label') or ''} {score(box):.2f}"
        draw.rectangle(corners(box), outline=colour, width=max(1, size // 6))
        left, top, right, bottom = draw.textbbox((0, 0), text, font_size=size)
        x = min(box["x"], max(0, image.shape[1] - right))
        y = box["y"] - bottom if box["y"] >= bottom else box["y"]  # above the box, in it at the picture's top
        draw.rectangle((x, y, x + right, y + bottom), fill=colour)
        draw.text((x, y), text, fill=(255, 255, 255), font_size=size)
    return torch.from_numpy(np.asarray(picture).copy()).to(image.dtype) / 255
