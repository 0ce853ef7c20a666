"""Images, masks and numbers as they come in: checked once, for every node that takes them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.latest import io

from ..patching.streams import Run, Stream
from ..patching.tokens import rows_of


def fraction(name: str, default: float, tooltip: str, **options: Any) -> io.Float.Input:
    """An input from 0 to 1 in hundredths: a threshold, a denoise, or a share of the schedule."""
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **options)


def exact_input() -> io.Boolean.Input:
    """The last input of every node that reads recorded images while it samples."""
    return io.Boolean.Input(
        "exact",
        default=False,
        optional=True,
        advanced=True,
        tooltip=(
            "Computes each replayed image by itself, bit for bit as it was recorded, instead of several in one batch,"
            " which rounds in another way. Slower, and on a transformer it takes more memory. Without effect on cached"
            " images, which are exact anyway."
        ),
    )


def image_of(node: str, name: str, image: torch.Tensor) -> torch.Tensor:
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


def mask_of(node: str, name: str, mask: torch.Tensor) -> torch.Tensor:
    """MASK [B, H, W], or [H, W], or [B, 1, H, W] as some packs give it -> [B, H, W], float32 on the CPU. Raises
    ValueError as image_of.
    """
    if mask.ndim not in (2, 3, 4) or not mask.numel():
        raise ValueError(
            f"{node}: {name} has the shape {tuple(mask.shape)}, and [masks, height, width] was expected. Connect a"
            " MASK."
        )
    return finite(node, name, mask.reshape(-1, *mask.shape[-2:])).cpu().float()


def mask_for(node: str, name: str, mask: torch.Tensor, size: tuple[int, int], cut: int = 8) -> torch.Tensor:
    """A MASK that says something about places of a picture -> [B, H, W] as mask_of, of any size in the picture's
    proportions. The one rule for all nodes.

    size: (height, width) of the picture, in pixels. cut: pixels of a pixel of its latent, which has cut the picture to
    multiples of them, so that much may differ. Raises ValueError as mask_of, for a mask of other proportions, and for
    the empty mask that Load Image gives for a picture without alpha.
    """
    mask = mask_of(node, name, mask)
    (height, width), (h, w) = mask.shape[1:], size
    if mask.shape == (1, 64, 64) and tuple(size) != (64, 64) and not mask.any():
        raise ValueError(
            f"{node}: {name} is 64x64 and empty: Load Image gives such a mask for a picture without transparency. Paint"
            " one (Open in MaskEditor), or connect another."
        )
    if abs(height * w - width * h) > max(cut * height, cut * width, h, w):
        raise ValueError(
            f"{node}: {name} is {width}x{height} and the picture {w}x{h}, another aspect ratio. Use a mask of the"
            " picture, or crop both alike."
        )
    return mask


def mask_for_run(node: str, name: str, mask: torch.Tensor, run: Run) -> torch.Tensor:
    """As mask_for, of a run's pictures."""
    return mask_for(node, name, mask, run.picture_size, run.weights.scale)


def start_latent(streams: Sequence[Stream]) -> dict[str, torch.Tensor]:
    """The LATENT that the runs of streams began with, an image each, and where it may change, if any has such a
    mask.
    """
    latent = {"samples": torch.cat([run.latent_image[row : row + 1] for run, row in streams])}
    masks = [None if run.denoise_mask is None else run.denoise_mask[row : row + 1, :1] for run, row in streams]
    known = next((mask for mask in masks if mask is not None), None)
    if known is not None:
        latent["noise_mask"] = torch.cat([torch.ones_like(known) if mask is None else mask for mask in masks])
    return latent


def finite(node: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor. Raises ValueError for NaN or infinite values."""
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"{node}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite."
            " A VAE in half precision can cause this: start ComfyUI with --fp32-vae or use another VAE."
        )
    return tensor


def refuse_nan(node: str, **values: float) -> None:
    """Raises ValueError for a value that is NaN: ComfyUI's bounds let one from the API through."""
    for name, value in values.items():
        if math.isnan(value):
            raise ValueError(f"{node}: {name} is NaN. Enter a number.")


def connected(node: str, name: str, value: Any) -> Any:
    """A CLIP or VAE. Raises ValueError for the nothing that a loader gives where its file holds none."""
    if value is None:
        what = {"clip": "text encoder (Load CLIP)", "vae": "VAE (Load VAE)"}[name]
        raise ValueError(
            f"{node}: {name} is empty: the file that was loaded has no {what.split(' (')[0]}. Load the model's {what}."
        )
    return value


def encoded(node: str, clip: CLIP, prompt: str) -> list:
    """The CONDITIONING of a prompt, whose tokens stand where its words are looked for. Raises ValueError for a CLIP
    that encodes them in another way.
    """
    tokens = connected(node, "clip", clip).tokenize(prompt)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    length, wanted = conditioning[0][0].shape[1], rows_of(clip, prompt)
    if length != wanted:
        raise ValueError(
            f"{node}: this CLIP encodes the prompt's {wanted} tokens to {length}: another node changes them (NegPip),"
            " and words cannot be found among them. Connect the CLIP and MODEL before that node."
        )
    return conditioning


def latent_of(node: str, model: ModelPatcher, latent: dict) -> torch.Tensor:
    """The samples of a LATENT. Raises ValueError for one of another VAE than the MODEL's; an empty one ComfyUI makes
    fit.
    """
    samples, wanted = latent["samples"], model.model.latent_format
    fits = samples.ndim in (4, wanted.latent_dimensions + 2) and samples.shape[1] == wanted.latent_channels
    if not fits and (samples.ndim != 4 or samples.any()):
        raise ValueError(
            f"{node}: the latent has the shape {'x'.join(map(str, samples.shape))}, and this MODEL works on"
            f" {wanted.latent_channels} channels of a {'picture' if wanted.latent_dimensions == 2 else 'video'}: it was"
            " made with another VAE. Encode the picture with the MODEL's own VAE."
        )
    return samples
