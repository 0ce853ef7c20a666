"""DDIM inversion (Song et al. 2021) as the attention-control papers do it, in variance-exploding variables.

With y = x / sqrt(abar) and sigma = sqrt((1 - abar) / abar) the step from t_k to t_{k+1} is Euler's:

    y_{k+1} = y_k + (sigma_{k+1} - sigma_k) eps(x_k, t_{k+1})

The model sees the *old* latent with the *new* timestep. A k-diffusion model divides its input by sqrt(data^2 + sigma^2)
of the sigma it is called with, which would be the new one: `model_input` makes up for the difference. data: the
standard deviation of what the network was trained on, 1 for eps and v predictions, 0.5 for EDM.
"""


def model_input(y, sigma, next_sigma, data=1.0):
    """What to call a k-diffusion model with at next_sigma, so that its network sees the latent of sigma."""
    return y * ((data**2 + next_sigma**2) / (data**2 + sigma**2)) ** 0.5


def step(y, eps, sigma, next_sigma):
    """y at next_sigma, from y at sigma and the noise that the model predicts."""
    return y + (next_sigma - sigma) * eps


def invert(latent, predict_noise, sigmas, data=1.0):
    """All latents of an inversion, the image's first.

    latent: the image's, [B, C, h, w]. predict_noise: (y, sigma) -> eps of a k-diffusion model. sigmas: ascending; the
    image is taken to lie at the first (the model's smallest, not 0), where y = x sqrt(1 + sigma^2 / data^2).
    Yields (sigma, y) for each of `sigmas`.
    """
    y = latent * (1 + (sigmas[0] / data) ** 2) ** 0.5
    yield sigmas[0], y
    for sigma, next_sigma in zip(sigmas, sigmas[1:]):
        y = step(y, predict_noise(model_input(y, sigma, next_sigma, data), next_sigma), sigma, next_sigma)
        yield next_sigma, y
