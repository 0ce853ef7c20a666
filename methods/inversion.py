"""Inversion: the noise and the latents of every step that an existing picture could have come from.

For eps, v and EDM predictions it is DDIM inversion, for rectified flows the same Euler steps in the flow's own
variables; more than one iteration solves each step's implicit equation (kernels/inversion.py).
"""

import math
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, COSMOS_RFLOW

from ..kernels import inversion as kernel
from ..patching import bias, internals, run_masks, transfers
from ..patching.install import install, installed_in, uninstalled
from ..patching.recorder import recording_cut_features
from ..patching.streams import INVERSION, Evaluation, Recording, Run, recorded_conds
from ..patching.weights import Weights

Tensor = torch.Tensor
MOST_AUTOMATIC = 3  # iterations for a rectified flow, where a single one loses the picture


def invert(
    model: ModelPatcher,
    latent: Tensor,
    conditioning: list,
    sigmas: Tensor,
    iterations: int,
    callback: Callable,
    show_bar: bool,
) -> tuple[Recording, Tensor]:
    """(a Recording of the pictures' trajectories, the noise they came from [B, C, h, w]): as a latent that a sampler
    goes on with; for rectified flows, of whose latent nothing is left at sigma 1, as the noise itself.

    latent: [B, C, h, w], encoded pictures. sigmas: descending, ending in 0. iterations: evaluations of each step; 0 is
    one, or for rectified flows as many as keep the picture. Sampled at CFG 1.
    """
    model = _for_inversion(model, conditioning)
    sampling: Any = model.get_model_object("model_sampling")
    sigmas = sigmas.float()  # as samplers hand them on
    is_flow = issubclass(type(sampling), (CONST, COSMOS_RFLOW))
    iterations = iterations or (MOST_AUTOMATIC if is_flow else 1)
    lowest = min(float(sampling.sigma_min), float(sigmas[-2]))
    ladder = torch.cat([torch.tensor([lowest]), sigmas[:-1].flip(0).cpu()])
    zeros = torch.zeros_like(latent)
    heeds_bias = installed_in(model).heeds_bias  # as its replays will
    run = Run(Weights(model), INVERSION, sigmas, zeros, zeros, None, heeds_bias=heeds_bias)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning, conditioning)
    guider.set_cfg(1.0)
    settings = {"run": run, "iterations": iterations}
    sampler = comfy.samplers.KSAMPLER(_inverting_sampler, extra_options=settings)
    guider.sample(zeros, latent, sampler, ladder, callback=callback, disable_pbar=not show_bar)
    transfers.finish(model.load_device)
    first = run.evaluations[run.sigmas[0], 0, 0].x
    run.noise, run.final = as_noise(model, first, run.sigmas[0]), latent.cpu()
    recording = Recording()
    recording.add(run)
    return recording, run.noise if isinstance(sampling, CONST) else model.model.process_latent_out(first)


def _for_inversion(model: ModelPatcher, conditioning: list) -> ModelPatcher:
    """The MODEL without what this pack's nodes do to sampling runs only, since one MODEL often serves a whole graph.
    Feature Recorder, Token Attention Map and the nodes that compose would take the inversion for a run of theirs, and
    Collage Noise would keep part of the picture free of noise. A bias stays where the conditioning carries one.
    """
    is_biased = installed_in(model).heeds_bias and any(bias.KEY in settings for _, settings in conditioning)
    plain = run_masks.without_noise_map(uninstalled(model))
    return install(plain, heed_bias=True) if is_biased else plain


def _inverting_sampler(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict,
    callback: Callable,
    disable: bool,
    run: Run,
    iterations: int,
) -> Tensor:
    """A k-diffusion sampler over ascending sigmas, which fills `run` with the trajectory that it finds. What it returns
    is of no use where sigma is 1, since ComfyUI divides a flow's result by 1 - sigma.
    """
    run.conds = recorded_conds(model.inner_model.conds)
    options = internals.recorded_options(extra_args["model_options"])
    recording = {**extra_args, "model_options": recording_cut_features(run, model.inner_model, options)}
    sampling = model.inner_model.inner_model.model_sampling
    ones, found = x.new_ones(x.shape[0]), {}

    def predict_noise(y: Tensor, sigma: Tensor) -> Tensor:
        # the graph cut's features are of the first evaluation, which sees the picture itself
        denoised = model(y, sigma * ones, **(extra_args if run.keys else recording))
        callback({"i": len(found) - 1, "denoised": denoised, "x": y, "sigma": sigma})
        return (y - denoised) / sigma

    def variance(sigma: Tensor) -> Tensor:
        """Of y, where the picture's is 1: what the model itself scales its input by."""
        level, one = sigma.reshape(1).float(), torch.ones(1)
        plain, scaled = (sampling.calculate_input(s, one) for s in (torch.zeros(1), level))
        return ((plain / scaled) ** 2)[0].to(x.dtype)

    sigmas = sigmas.cpu()  # read once; numbers of main memory go with tensors of any device
    # a flow's sampler is handed (1 - sigma) latent
    y = x / sampling.noise_scaling(sigmas[:1], torch.zeros(1), torch.ones(1))[0] * variance(sigmas[0]) ** 0.5
    steps = kernel.invert(y, predict_noise, sigmas, variance, iterations)
    for sigma, y in steps:
        # a ladder that starts with a sigma of the schedule gives it twice
        found[float(sigma), 0, 0] = Evaluation(y, options)
    run.evaluations = {key: found[key] for key in reversed(found) if key[0] in run.sigmas}
    return x if isinstance(sampling, CONST) else y


def as_noise(model: ModelPatcher, x: Tensor, sigma: float) -> Tensor:
    """The noise that ComfyUI's samplers scale to x at sigma."""
    sampling: Any = model.get_model_object("model_sampling")
    highest = float(sampling.sigma_max)
    is_start = math.isclose(highest, sigma, rel_tol=1e-5) or sigma > highest
    return x / sampling.noise_scaling(torch.tensor([sigma]), torch.ones(1), torch.zeros(1), is_start)
