"""Images, masks and numbers as they come in: checked once, for every node that takes them."""

import math

import torch


def image_of(node, name, image):
    """IMAGE [B, H, W, C] with 3 or 4 channels -> the same, float32 on the CPU.

    node: the display name for messages. Raises ValueError for another shape, for one with nothing in it, and for NaN or
    infinite values.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4) or not image.numel():
        raise ValueError(
            f"{node}: {name} has the shape {tuple(image.shape)}, and [images, height, width, 3 or 4 channels] was"
            " expected. Connect an IMAGE."
        )
    return finite(node, name, image).cpu().float()


def mask_of(node, name, mask):
    """MASK [B, H, W], or [H, W], or [B, 1, H, W] as some packs give it -> [B, H, W], float32 on the CPU. Raises
    ValueError as image_of.
    """
    if mask.ndim not in (2, 3, 4) or not mask.numel():
        raise ValueError(
            f"{node}: {name} has the shape {tuple(mask.shape)}, and [masks, height, width] was expected. Connect a"
            " MASK."
        )
    return finite(node, name, mask.reshape(-1, *mask.shape[-2:])).cpu().float()


def finite(node, name, tensor):
    """The same tensor. Raises ValueError for NaN or infinite values."""
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{node}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite."
            " A VAE in half precision can cause this: start ComfyUI with --fp32-vae or use another VAE."
        )
    return tensor


def numbers(node, **values):
    """Raises ValueError for a value that is NaN: ComfyUI's bounds let one from the API through."""
    for name, value in values.items():
        if math.isnan(value):
            raise ValueError(f"{node}: {name} is NaN. Enter a number.")
