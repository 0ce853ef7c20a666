"""What a collage does to a whole sampling run, in a MODEL: when each place may begin to change, and how strongly
ControlNets act where."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, ModelSamplingDiscrete
from comfy.patcher_extension import WrappersMP

from ..kernels.noise_map import free
from .clock import clock_of
from .models import family_of
from .refusals import check_shape

KEY = "montage_collage"


def with_noise_map(model: ModelPatcher, node: str, noise: torch.Tensor, dilation: float) -> ModelPatcher:
    """A clone of the MODEL in which every place of the latent stays at the image's own until its time comes.

    noise: noise map [H, W] in [0, 1]. dilation: of kernels.noise_map.free. Works through ComfyUI's own inpainting: a
    mask for each sigma, times the latent's noise_mask or what another node makes of it.
    """

    def outer_sample(
        executor: Callable,
        noise_: torch.Tensor,
        latent_image: torch.Tensor,
        sampler: Any,
        sigmas: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        check_shape(node, noise.shape, noise_.shape[-2:])
        if not latent_image.count_nonzero():
            raise ValueError(
                f"{node}: the latent is empty, so there is nothing to keep. Sample the encoded image of Collage Canvas."
            )
        finished = float(sigmas[-1]) == 0  # asked now, since UniPC writes into its sigmas
        output = executor(noise_, latent_image, sampler, sigmas, *args, **kwargs)
        if not finished:  # noise is left for another sampler
            return output
        return torch.where(level_at(noise_).to(output.device) > 0, output, latent_image.to(output))

    def sampler_sample(
        executor: Any,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Any,
        noise_: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        options = extra_args["model_options"]  # this run's own copy
        clock = clock_of(executor.class_obj, sigmas, options)
        previous = options.get("denoise_mask_function")
        sampling = copy.deepcopy(model_wrap.inner_model.model_sampling).cpu()  # to ask it without waiting for a GPU

        def part(sigma: torch.Tensor) -> float:
            return part_of_schedule(sampling, torch.tensor(clock.sigma_of(sigma)))

        options["denoise_mask_function"] = masked_by(level_at(noise_), dilation, part, previous)
        if denoise_mask is None:  # not earlier: a checkpoint for inpainting would be shown what is around a hole
            denoise_mask = torch.ones_like(noise_, dtype=torch.float32)
        samples = executor(
            model_wrap, sigmas, extra_args, clock.watching(callback), noise_, latent_image, denoise_mask, disable_pbar
        )
        clock.check()
        return samples

    def level_at(latent: torch.Tensor) -> torch.Tensor:
        return F.interpolate(noise[None, None], size=latent.shape[-2:], mode="nearest-exact")

    patched = with_wrapper(model, WrappersMP.OUTER_SAMPLE, outer_sample)
    return with_wrapper(patched, WrappersMP.SAMPLER_SAMPLE, sampler_sample)


def without_noise_map(model: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL in which a noise map masks nothing."""
    free_of_it = model.clone()
    free_of_it.remove_wrappers_with_key(WrappersMP.SAMPLER_SAMPLE, KEY)
    return free_of_it


def masked_by(
    level: torch.Tensor, dilation: float, part: Callable[[torch.Tensor], float], previous: Callable | None
) -> Callable:
    """A denoise_mask_function: the mask it is given, or what the previous such function makes of it, where the map is
    free. level: the map in main memory, where it is found what is free. part: (sigma [B]) -> t / 1000.
    """

    def mask(sigma: torch.Tensor, denoise_mask: torch.Tensor, extra_options: dict) -> torch.Tensor:
        t = part(sigma)
        if previous is not None:
            denoise_mask = previous(sigma, denoise_mask, extra_options=extra_options)
        return denoise_mask * free(level, t, dilation).to(denoise_mask.device, non_blocking=True)

    return mask


def part_of_schedule(sampling: Any, sigma: torch.Tensor) -> float:
    """t / 1000 of a sigma, where t is one of the model's 1000 time steps 0 to 999 (paper, section 3.4: a place is
    free from t <= 1000 h on, so that h = 0.8 is free at t = 800). Of a flow it is the time before its schedule is
    shifted, of which its sigmas are equal steps. Models that know no such steps go from 0 to 1.
    """
    if issubclass(type(sampling), CONST):
        sigma = sigma.float()
        sigmas = torch.cat([torch.zeros(1), sampling.sigmas.float()])
        after = int(torch.searchsorted(sigmas, sigma).clamp(1, len(sigmas) - 1))
        low, high = sigmas[after - 1], sigmas[after]
        return float((after - 1 + (sigma - low) / (high - low)) / (len(sigmas) - 1))
    t = float(sampling.timestep(torch.as_tensor(sigma)))
    if isinstance(sampling, ModelSamplingDiscrete):
        return t / sampling.num_timesteps
    first, last = (float(sampling.timestep(torch.as_tensor(s))) for s in (sampling.sigma_min, sampling.sigma_max))
    return (t - first) / (last - first)


def with_control_map(model: ModelPatcher, node: str, strength: torch.Tensor) -> ModelPatcher:
    """A clone of the MODEL that multiplies what ControlNets add to it by a map: to the features of a UNet, or to the
    image's tokens of a transformer. strength: [H, W].
    """
    family, there = family_of(model), strength

    def outer_sample(executor: Callable, noise: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        check_shape(node, strength.shape, noise.shape[-2:])
        if not any("control" in cond for group in executor.class_obj.conds.values() for cond in group):
            raise ValueError(
                f"{node}: no ControlNet acts in this run. Apply one to the sampler's conditioning (Apply ControlNet),"
                " or disconnect the node."
            )
        return executor(noise, *args, **kwargs)

    def apply_model(
        executor: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: Any | None = None,
        c_crossattn: Any | None = None,
        control: dict | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        nonlocal there
        if control is not None:
            there = there.to(x.device, non_blocking=True)  # once
            grid = None if family.is_unet else family.grid((x.shape[-2], x.shape[-1]))
            control = {
                block: [scaled(node, residual, there, grid) for residual in residuals]
                for block, residuals in control.items()
            }
        return executor(x, t, c_concat, c_crossattn, control, *args, **kwargs)

    return with_wrapper(with_wrapper(model, WrappersMP.OUTER_SAMPLE, outer_sample), WrappersMP.APPLY_MODEL, apply_model)


def scaled(
    node: str, residual: torch.Tensor | None, strength: torch.Tensor, grid: tuple[int, int] | None
) -> torch.Tensor | None:
    """A ControlNet's residual, or None, times the map: [B, C, h, w], or, where the model has a grid of tokens, [B,
    tokens, C]. Raises ValueError for one of other tokens.
    """
    if residual is None:
        return None
    if grid is None:
        return residual * F.interpolate(strength[None, None].to(residual), size=residual.shape[-2:], mode="area")
    if residual.ndim != 3 or residual.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{node}: a ControlNet adds {'x'.join(map(str, residual.shape))} to this MODEL, which has"
            f" {grid[0]}x{grid[1]} tokens, so it is unknown where in the picture it acts. Disconnect the node, or use"
            " another ControlNet."
        )
    return residual * F.interpolate(strength[None, None].to(residual), size=grid, mode="area").flatten(2).mT


def with_wrapper(model: ModelPatcher, kind: str, wrapper: Callable) -> ModelPatcher:
    patched = model.clone()
    patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched
