"""A batch of pictures through the two models, one picture at a time, each picture's features computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import Problem, boxes
from .grounding_dino import Detections, ImageFeatures, detect_shape
from .managed import ManagedModel
from .segment_anything import BACKGROUND_POINT, POINT
from .vocabulary import MAX_TOKENS, caption_of


class Prompt(NamedTuple):
    """One thing to cut out: a box, points, or a box with points in it."""

    box: tuple[float, float, float, float] | None
    points: tuple = ()


def as_bytes(image: Tensor) -> list[np.ndarray]:
    """IMAGE (B, H, W, C) in 0..1 -> uint8 RGB pictures, the form that both models were trained on."""
    if not len(image):
        raise Problem("the batch holds no image.")
    for number, picture in enumerate(image):
        if not torch.isfinite(picture).all():
            raise Problem(
                f"image {number} holds values that are not numbers; usually a VAE failed in fp16: decode it in fp32."
            )
    return list((rgb_of(image) * 255).round().to(torch.uint8).numpy())


def rgb_of(image: Tensor) -> Tensor:
    """IMAGE with 1, 3 or 4 channels -> (B, H, W, 3) fp32 in 0..1 on the CPU."""
    return image[..., :3].expand(-1, -1, -1, 3).float().clamp(0, 1).cpu()


def _key(picture: np.ndarray) -> tuple:
    return picture.shape, hashlib.blake2b(np.ascontiguousarray(picture).data, digest_size=16).digest()


def find(
    detector: ManagedModel, pictures: list[np.ndarray], phrases: list[str], short_side: int, tick: Callable
) -> list[Detections]:
    """All that the detector sees in each picture; tick() after each."""
    model = detector.load()
    tokens = len(model.tokenizer.ids(caption_of(phrases)))
    if tokens > MAX_TOKENS:
        raise Problem(
            f"the phrases are {tokens} tokens long and Grounding DINO reads {MAX_TOKENS}; ask for fewer things at once."
        )
    found = []
    for picture in pictures:
        features = _searchable(detector, model, picture, short_side)
        found.append(model.detect(features.to(model.feat_map.weight.device), phrases))
        tick()
    return found


def _searchable(detector: ManagedModel, model: Any, picture: np.ndarray, short_side: int) -> ImageFeatures:
    key = _key(picture), short_side
    features = detector.features.get(key)
    if features is None:
        rows, columns = picture.shape[:2]
        height, width = detect_shape(rows, columns, short_side)
        if model.places(height, width) < model.num_queries:
            raise Problem(
                f"an image of {picture.shape[1]}x{picture.shape[0]} is searched at {width}x{height}, too few pixels; "
                "raise detect_size, or crop the image if it is a thin strip."
            )
        features = model.image_features(picture, short_side).to("cpu")
        detector.features.put(key, features, features.tensors)
    return features


def labelled(
    found: Detections, phrases: list[str], size: tuple[int, int], box_threshold: float, text_threshold: float
) -> list[dict]:
    """Detections -> boxes in pixels of a picture of size (H, W), each labelled with the phrase that fits it best."""
    height, width = size
    best, which = found.phrase_scores.max(1)
    keep = (found.scores > box_threshold) & (best > text_threshold)
    rows = zip(found.boxes[keep].tolist(), found.scores[keep].tolist(), which[keep].tolist(), strict=True)
    kept = [
        boxes.inside(
            {
                "x": (x - w / 2) * width,
                "y": (y - h / 2) * height,
                "width": w * width,
                "height": h * height,
                "label": phrases[phrase],
                "score": score,
            },
            height,
            width,
        )
        for (x, y, w, h), score, phrase in rows
    ]
    return [box for box in kept if box]


def prompts_of(chosen: list[dict], positive: list[tuple], negative: list[tuple]) -> list[Prompt]:
    """One prompt a box with the points that lie in it, and one more of the positive points that lie in none."""
    points = [(x, y, POINT) for x, y in positive] + [(x, y, BACKGROUND_POINT) for x, y in negative]

    def holds(box: Any, point: Any) -> bool:
        return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]

    corners = [boxes.corners(box) for box in chosen]
    prompts = [Prompt(box, tuple(p for p in points if holds(box, p))) for box in corners]
    free = tuple(p for p in points if not any(holds(box, p) for box in corners))
    return [*prompts, Prompt(None, free)] if any(label == POINT for *_, label in free) else prompts


def cut(segmenter: ManagedModel, pictures: list[np.ndarray], prompts: list[list[Prompt]], tick: Callable) -> Tensor:
    """The union of each picture's prompts: (B, H, W) bool on the CPU; tick() after each picture."""
    height, width = pictures[0].shape[:2]
    masks = torch.zeros(len(pictures), height, width, dtype=torch.bool)
    model: Any = segmenter.load() if any(prompts) else None
    for mask, picture, wanted in zip(masks, pictures, prompts, strict=True):
        embedding = _embedded(segmenter, model, picture) if wanted else None
        for prompt in wanted:
            mask |= model.cut(embedding, (height, width), prompt.box, prompt.points)[0].cpu()
        tick()
    return masks


def _embedded(segmenter: ManagedModel, model: Any, picture: np.ndarray) -> Tensor:
    key = _key(picture)
    embedding = segmenter.features.get(key)
    if embedding is None:
        embedding = model.embed(picture).cpu()
        segmenter.features.put(key, embedding, [embedding])
    return embedding
