"""Collages for the tests and the evidence: layers, and the canvas they lie on."""

import torch
from comfy_api.latest import io

from ..nodes.collage import CollageCanvas, CollageLayer

THINGS = [
    "ball",
    "box",
    "star",
    "ring",
    "tree",
    "house",
    "cat",
    "dog",
    "bird",
    "fish",
    "car",
    "boat",
    "cup",
    "hat",
    "book",
    "shoe",
    "lamp",
    "chair",
    "flower",
    "leaf",
]  # a word for each of twenty layers


def layer(
    image,
    text="",
    x=0.5,
    y=0.5,
    scale=1.0,
    rotation=0.0,
    depth=0,
    w_pos=0.4,
    w_neg=0.7,
    noise=0.8,
    control=1.0,
    trim=True,
    behind=(),
    mask=None,
    node="1",
    prompt=None,
    **more,
):
    made = CollageLayer.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: node, io.Hidden.prompt: prompt}})
    return made.execute(
        image, text, x, y, scale, rotation, depth, w_pos, w_neg, noise, control, trim, behind, mask, **more
    ).args[0]


def canvas(
    layers, width=64, height=64, prompt="", background="#969696", background_noise=0.8, blur=0.0, background_image=None
):
    """(collage, image, masks, noise map, prompt)."""
    return CollageCanvas.execute(
        layers, width, height, prompt, background, background_noise, blur, background_image
    ).args


def plain(colour, height=32, width=32, alpha=1.0):
    return torch.tensor([*colour, alpha]).expand(1, height, width, 4)


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
