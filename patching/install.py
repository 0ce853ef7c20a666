"""How recipes, recordings, maps and biases get into a MODEL.

`install` clones a MODEL and gives it four wrappers, whatever the number of nodes:

    OUTER_SAMPLE      opens a Session for one sampling run; refuses what does not fit, before anything is computed
    SAMPLER_SAMPLE    the sampler begins: notices noise that another node has changed since
    PREDICT_NOISE     begins an evaluation of the guider: a visit of a sigma
    CALC_COND_BATCH   hands each call of the model to the engine

Areas, hooks, ControlNet, memory and CFG halves stay ComfyUI's business below CALC_COND_BATCH. The attention hooks exist
only in the options of a single call, so nothing is left behind by a cancelled run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from . import internals, refusals
from .attention_maps import TokenMap
from .clock import clock_of
from .internals import KEY
from .models import sites_of
from .recipe import Recipe, Start
from .session import Session, session_in
from .streams import Recording

Tensor = torch.Tensor
WRAPPED = (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)


class Installed(NamedTuple):
    """What this pack's nodes have installed in a MODEL. Immutable, so that clones can share it."""

    groups: tuple[tuple[Recipe, ...], ...] = ()  # of recipes: those of one node
    recordings: tuple[Recording, ...] = ()
    maps: tuple[TokenMap, ...] = ()  # of words that the run looks for
    heeds_bias: bool = False  # whether biases that the conditioning carries act


def installed_in(model: ModelPatcher) -> Installed:
    return internals.attached(model, Installed())


def install(
    model: ModelPatcher,
    *recipes: Recipe,
    recording: Recording | None = None,
    token_map: TokenMap | None = None,
    heed_bias: bool = False,
) -> ModelPatcher:
    """A clone of the MODEL with a node's recipes, a recording or a map of words on top, or one that heeds the biases of
    its conditioning. The MODEL that came in is not changed.
    """
    sites_of(model)  # refuses a model of no known family
    old = installed_in(model)
    new = Installed(
        old.groups + ((recipes,) if recipes else ()),
        old.recordings + ((recording,) if recording else ()),
        old.maps + ((token_map,) if token_map else ()),
        old.heeds_bias or heed_bias,
    )
    patched = model.clone()
    patched.set_attachments(KEY, new)
    # the ControlNets that replays will need, for ComfyUI to load beside the model
    streams = [stream for group in new.groups for recipe in group for stream in recipe.streams]
    conds = [cond for run in dict.fromkeys(s.run for s in streams) for group in run.conds.values() for cond in group]
    patched.set_additional_models(KEY, internals.control_models(conds))
    wrappers = _outer_sample, _sampler_sample, _predict_noise, _calc_cond_batch
    for kind, wrapper in zip(WRAPPED, wrappers, strict=True):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def uninstalled(model: ModelPatcher) -> ModelPatcher:
    """A clone of the MODEL with nothing in it that `install` put there."""
    plain = model.clone()
    plain.remove_attachments(KEY)
    plain.remove_additional_models(KEY)
    for kind in WRAPPED:
        plain.remove_wrappers_with_key(kind, KEY)
    return plain


def _outer_sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if len(sigmas) < 2:  # no step is sampled (SplitSigmas at its end): there is nothing to record or compose
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    refusals.insist()
    guider = executor.class_obj
    try:
        return _sample_in_session(executor, guider, noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    except ValueError as refused:
        refusals.remember(refused)
        raise


def _sample_in_session(
    executor: Any,
    guider: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    session = Session(guider, installed_in(guider.model_patcher), noise, sampler, sigmas)
    noise, latent_image, sigmas = session.start(Start(noise, latent_image, sigmas), denoise_mask)
    guider.model_options["transformer_options"][KEY] = session  # this run's own copy of the options
    try:
        output = latent_image
        if len(sigmas) > 1:
            output = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    except BaseException:  # ComfyUI's interrupt too
        session.abandon()
        raise
    finally:
        session.close()
    return session.finish(output)


def _sampler_sample(
    executor: Any, model_wrap: Any, sigmas: Tensor, extra_args: dict, callback: Any, noise: Tensor, *args: Any
) -> torch.Tensor:
    options = extra_args["model_options"]
    session = session_in(options)
    if session is None:
        return executor(model_wrap, sigmas, extra_args, callback, noise, *args)
    clock = clock_of(executor.class_obj, sigmas, options)
    session.begin_sampling(clock, noise)
    samples = executor(model_wrap, sigmas, extra_args, clock.watching(callback), noise, *args)
    clock.check()
    return samples


def _predict_noise(
    executor: Callable,
    x: Tensor,
    timestep: Tensor,
    model_options: dict = {},  # noqa: B006  ComfyUI's own signature
    seed: Any = None,
) -> torch.Tensor:
    session = session_in(model_options)
    if session is None:
        return executor(x, timestep, model_options, seed)
    session.begin_evaluation(timestep)
    for recipe in session.recipes:
        x = recipe.latent(session.context, x)
    denoised = executor(x, timestep, model_options, seed)
    session.end_evaluation()
    for recipe in session.recipes:
        denoised = recipe.denoised(session.context, denoised)
    return denoised


def _calc_cond_batch(
    executor: Callable, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict
) -> list[torch.Tensor]:
    session = session_in(options)
    if session is None:  # a replay, or somebody's own code outside of a sampling run
        return executor(model, conds, x, timestep, options)
    return session.evaluate(executor, model, conds, x, timestep, options)
