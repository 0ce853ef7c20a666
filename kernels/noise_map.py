"""How freely each place of a collage may change (Collage Diffusion, arXiv 2303.00262, section 3.4)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .grid_masks import dilate

DIRECT = 64  # sigmas up to which a blur is summed directly: above, Fourier transforms take less time


def noise_map(masks: torch.Tensor, noise: Sequence[float], background_noise: float, blur: float) -> torch.Tensor:
    """Where a pixel begins to change, h in [0, 1]: free as soon as t <= 1000 h.

    masks: visible masks [N, H, W]. noise: h of each layer, [N]. background_noise: h where no layer is. blur: standard
    deviation of the Gaussian over the map, in pixels of the canvas. A pixel in which a layer of noise 0 has the largest
    part keeps 0, whatever is next to it. Returns [H, W].
    """
    levels = [*noise, background_noise]
    rest = (1 - masks.sum(0)).clamp(min=0)
    mixed, largest = torch.zeros_like(rest), torch.full_like(rest, -1)
    free = torch.zeros_like(rest, dtype=torch.bool)
    for part, level in zip([*masks, rest], levels, strict=True):
        mixed += level * part
        leads = part > largest
        largest[leads] = part[leads]
        free[leads] = level > 0
    least, most = min(levels), max(levels)
    return gaussian(mixed.clamp(least, most), blur).clamp(least, most) * free


def gaussian(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of [H, W], cut off at 3 sigma; beyond its borders the picture continues as it ends.

    Above DIRECT by Fourier transforms in float64, which agree with the direct sum to 1e-6 of the largest value.
    """
    if sigma <= 0:
        return picture
    radius = math.ceil(3 * sigma)
    if sigma > DIRECT:
        across = _gaussian_along(picture.double(), sigma, radius)
        return _gaussian_along(across.T, sigma, radius).T.to(picture)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1).to(picture) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(picture[None, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None, :])[0, 0]


def _gaussian_along(rows: torch.Tensor, sigma: float, radius: int) -> torch.Tensor:
    """The blur along the rows of [H, W], each row [W]."""
    padded = F.pad(rows[None], [radius, radius], mode="replicate")[0]
    places = torch.arange(padded.shape[1], dtype=rows.dtype, device=rows.device)
    kernel = torch.exp(-((places - radius) ** 2) / (2 * sigma**2)) * (places <= 2 * radius)
    spectrum = torch.fft.rfft(padded) * torch.fft.rfft(kernel / kernel.sum())
    return torch.fft.irfft(spectrum, n=padded.shape[1])[:, 2 * radius :]


def free(noise: torch.Tensor, t: float, dilation: float) -> torch.Tensor:
    """Where the latent may change at time t: at t <= h, and never where h is 0.

    noise: noise map h [B, 1, h, w]. t: in [0, 1], the time step / 1000. dilation: latent pixels by which what is
    not yet free is grown at t = 1, less the lower t is (the authors': 4). The freest places are free at every t: a run
    that begins later than they could loses nothing, and a map of one value is plain image-to-image. Returns [B, 1, h,
    w], 0 or 1.
    """
    locked = noise < min(t, float(noise.max())) - 1e-4  # equal up to rounding
    return (~dilate(locked, int(dilation * t)) & (noise > 0)).float()
