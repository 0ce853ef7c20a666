"""Inversion of Euler's method (Song et al. 2021, DDIM), in variables in which a sampling step is

    y_k = y_{k+1} + (sigma_k - sigma_{k+1}) eps(y_{k+1}, sigma_{k+1})

For eps, v and EDM predictions those are y = x / sqrt(abar) and sigma = sqrt((1 - abar) / abar), for rectified flows x
and sigma themselves, with eps the velocity. The step back from y_k needs eps at y_{k+1}, which is not known yet:

    y_{k+1} = y_k + (sigma_{k+1} - sigma_k) eps(y*, sigma_{k+1})

DDIM inversion takes for y* the latent of y_k: the network sees the *old* latent with the *new* timestep. Further
iterations take the y_{k+1} found so far, a fixed-point iteration towards the exact inverse.
"""

from collections.abc import Callable, Iterator

import torch

Tensor = torch.Tensor


def step(y: Tensor, eps: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """y at next_sigma, from y at sigma and the noise (velocity) that the model predicts."""
    return y + (next_sigma - sigma) * eps


def invert(
    y: Tensor,
    predict_noise: Callable[[Tensor, Tensor], Tensor],
    sigmas: Tensor,
    variance: Callable[[Tensor], Tensor | float],
    iterations: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All latents of an inversion, the image's first: (sigma, y [B, C, h, w]) for each of `sigmas`.

    y: the image, at the first sigma (the model's smallest, not 0). predict_noise: (y, sigma) -> eps. sigmas: ascending.
    variance: of y at a sigma; a network is called with y / sqrt(variance), so that the latent of one sigma is met again
    at another with y scaled by the root of their ratio. iterations: evaluations of each step, 1 or more.
    """
    yield sigmas[0], y
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        guess = y * (variance(next_sigma) / variance(sigma)) ** 0.5
        for _ in range(iterations):
            guess = step(y, predict_noise(guess, next_sigma), sigma, next_sigma)
        y = guess
        yield next_sigma, y
