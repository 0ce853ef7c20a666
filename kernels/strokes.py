"""Stroke documents: what was painted in the editor, and the pixels that it covers. web/raster.js draws the same pixels
with the same arithmetic; tests/data/stroke_masks.json holds both to it.
"""

import json
from typing import Any

import numpy as np
import torch

UNIT = 10_000  # stroke coordinates run from 0 to UNIT along each axis; radii are in UNITs of the long side
LONGEST_DOCUMENT = 2_000_000  # characters
LEAST_RADIUS_SQUARED = 0.5  # in pixels: a disc of that radius reaches a pixel's centre wherever it lies
MOST_RUNS = 2**18  # that are computed at once
SLACK = 1e-6  # pixels: more than rounding can move the outline of a stroke


def parse_document(text: str, count: int) -> tuple[int | None, list[dict[str, Any]]]:
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
        raise ValueError(f"the stroke document is not JSON ({error})") from None
    if not isinstance(document, dict) or document.get("v") != 1 or not isinstance(document.get("strokes"), list):
        raise ValueError('the stroke document is not of version 1: expected {"v": 1, "base": 0, "strokes": [...]}')
    base = document.get("base")
    if base is not None and not _is_image(base, count):
        raise ValueError(
            f"the stroke document's base is image {base!r}, and there are {count} images (0 to {count - 1})"
        )
    for number, stroke in enumerate(document["strokes"]):
        _check_stroke(stroke, number, count)
    return base, document["strokes"]


def _is_image(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _check_stroke(stroke: Any, number: int, count: int) -> None:
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
        raise ValueError(f"stroke {number} has radius {stroke['r']!r}: expected 0 to {UNIT}")
    if (
        not isinstance(points, list)
        or len(points) < 2
        or len(points) % 2
        or not all(_is_number(c, -10 * UNIT, 10 * UNIT) for c in points)
    ):
        raise ValueError(
            f"stroke {number} has points {str(points)[:60]}: expected [x, y, x, y, ...], each from 0 to {UNIT}"
        )


def draw(strokes: list[dict[str, Any]], count: int, height: int, width: int) -> torch.Tensor:
    """The pixels that a document's strokes cover, drawn in order: [count, height, width] float32, 0 or 1, one mask for
    each image.

    A stroke covers each pixel whose centre is no farther from its path than its radius; the radius is sqrt(1/2) pixels
    at least, so that no stroke inside the picture or on its edge is lost.
    """
    masks = np.zeros((count, height, width), bool)
    for stroke in strokes:
        points = np.array(stroke["p"], np.float64).reshape(-1, 2) / UNIT * (width, height)
        radius = stroke["r"] / UNIT * max(width, height)
        top, covered = _cover(points, max(LEAST_RADIUS_SQUARED, radius * radius), height, width)
        masks[stroke["k"], top : top + len(covered)][covered] = not stroke.get("e")
    return torch.from_numpy(masks).float()


def _cover(points: np.ndarray, radius2: float, height: int, width: int) -> tuple[int, np.ndarray]:
    """The pixels whose centres lie within the radius of a path.

    points: [n, 2], x and y in pixels. radius2: the radius squared. Returns (top, covered): covered [rows, width] bool
    of the rows from `top` on; in all others nothing is covered.
    """
    a, b = np.concatenate([points[:1], points[:-1]]), points  # the first segment is the first point
    reach = np.sqrt(radius2) + SLACK
    first = np.clip(np.ceil(np.minimum(a[:, 1], b[:, 1]) - reach - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.floor(np.maximum(a[:, 1], b[:, 1]) + reach + 0.5), 0, height).astype(np.int64)
    top, rows = int(first.min()), max(0, int(last.max() - first.min()))
    steps = np.zeros(rows * (width + 1), np.int64)  # along each row: 1 where a run begins, -1 behind its end
    share = max(1, MOST_RUNS // height)
    for part in (slice(begin, begin + share) for begin in range(0, len(a), share)):
        row, start, end = _runs(a[part], b[part], first[part], last[part], radius2, width)
        at = (row - top) * (width + 1)
        steps += np.bincount(at + start, minlength=len(steps)) - np.bincount(at + end + 1, minlength=len(steps))
    return top, steps.reshape(rows, width + 1).cumsum(1)[:, :width] > 0


def _runs(
    a: np.ndarray, b: np.ndarray, first: np.ndarray, last: np.ndarray, radius2: float, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels within the radius of each segment, as runs along the rows: (row, start, end), both ends included.

    a, b: the segments' ends [n, 2]. first, last: the rows that they can reach, first..last-1, [n].
    """
    rows = np.maximum(last - first, 0)
    segment = np.repeat(np.arange(len(a)), rows)  # of each pair of a segment and a row
    row = np.arange(len(segment)) - np.repeat(np.cumsum(rows) - rows, rows) + first[segment]
    a, b = a[segment], b[segment]
    left, right = _crossings(a, b, row + 0.5, np.sqrt(radius2) + SLACK)
    start, end = np.clip(np.ceil(left - 0.5), 0, width), np.clip(np.floor(right - 0.5), -1, width - 1)
    while (outside := (start <= end) & ~_within(a, b, start + 0.5, row + 0.5, radius2)).any():
        start += outside
    while (outside := (start <= end) & ~_within(a, b, end + 0.5, row + 0.5, radius2)).any():
        end -= outside
    some = start <= end
    return row[some], start[some].astype(np.int64), end[some].astype(np.int64)


def _within(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray, radius2: float) -> np.ndarray:
    """Whether a place is within the radius of a segment: no roots, no quotients, so that every language rounds alike.

    a, b: the ends [n, 2]. x, y: [n]. Returns [n] bool.
    """
    px, py = x - a[:, 0], y - a[:, 1]
    qx, qy = x - b[:, 0], y - b[:, 1]
    dx, dy = b[:, 0] - a[:, 0], b[:, 1] - a[:, 1]
    along, length2 = px * dx + py * dy, dx * dx + dy * dy
    across = px * dy - py * dx
    return np.where(
        along <= 0,
        px * px + py * py <= radius2,
        np.where(along >= length2, qx * qx + qy * qy <= radius2, across * across <= radius2 * length2),
    )


def _crossings(a: np.ndarray, b: np.ndarray, y: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Where a row enters and leaves the outline of a segment: two discs and two long edges. The outline is convex.

    a, b: the ends [n, 2]. y: [n]. Returns (left, right) [n], infinity and -infinity where the row misses it.
    """
    (ax, ay), (bx, by) = a.T, b.T
    found = []
    for cx, cy in ((ax, ay), (bx, by)):
        half = np.sqrt(radius * radius - (y - cy) ** 2, where=np.abs(y - cy) <= radius, out=np.full(len(y), np.nan))
        found += [cx - half, cx + half]
    length = np.hypot(bx - ax, by - ay)
    with np.errstate(divide="ignore", invalid="ignore"):  # segments of no length and level ones have no such edge
        nx, ny = (ay - by) / length * radius, (bx - ax) / length * radius
        slope = (bx - ax) / (by - ay)
        for ex, ey, fy in ((ax + nx, ay + ny, by + ny), (ax - nx, ay - ny, by - ny)):
            found.append(np.where((ey > y) != (fy > y), ex + (y - ey) * slope, np.nan))
    left, right = np.fmin.reduce(found), np.fmax.reduce(found)
    return np.where(np.isnan(left), np.inf, left), np.where(np.isnan(right), -np.inf, right)
