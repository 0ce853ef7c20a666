"""How recordings and recipes get into a MODEL.

`install` clones a MODEL and gives it three wrappers, whatever the number of recipes:

    OUTER_SAMPLE     opens a Session for one sampling run; refuses what does not fit, before anything is computed
    PREDICT_NOISE    begins an evaluation of the guider: a visit of a sigma
    CALC_COND_BATCH  replays the streams that the recipes read here, then runs the target with the recipes on

Areas, hooks, ControlNet, memory and CFG halves stay ComfyUI's business below CALC_COND_BATCH. The attention patch
exists only in the options of a single evaluation, so nothing is left behind by a cancelled run, and it stands before
every other pack's attn1_patch: those then act on what is composed exactly as they act on a plain image. A recipe that
needs several attentions at a site also gets the attn1 slot there, which hands each of them to whoever held it before.
"""

from typing import NamedTuple

import torch
from comfy.patcher_extension import WrappersMP

from .branches import Branch  # noqa: F401
from .session import KEY, Session  # noqa: F401
from .sites import sites_of


class Recipe:
    """What the target does with its streams, at the sites and steps of a window. Subclasses say how.

    node: the display name for messages. window: schedule.Window. streams: the streams it reads, tuple of Stream.
    branches: whether it may feed a site from several attentions, or from one over a part of the rows. One recipe can at
    a site and step, and acts after those that do not.
    """

    node = "Montage"
    streams = ()
    branches = False

    def __init__(self, window):
        self.window = window

    def check(self, session):
        """Raise ValueError where the run at hand does not fit; called before sampling."""

    def start(self, session, noise, latent_image, sigmas):
        """The noise and latent image that the run begins with, [B, C, h, w], and its schedule: where no step of that is
        left, the latent image is what the run gives."""
        return noise, latent_image, sigmas

    def latent(self, session, x):
        """What the model is evaluated on instead of x, [B, C, h, w] in the model's own scale."""
        return x

    def denoised(self, session, denoised):
        """What an evaluation gives instead of the denoised latent, [B, C, h, w] in the model's own scale."""
        return denoised

    def output(self, session, output):
        """What the run gives instead of its output, [B, C, h, w]."""
        return output

    def keep(self, number, n, grid):
        """What to keep of stream `number` at a site. n: [1, tokens, channels], which others may write into; grid: (h,
        w).
        """
        return n.clone()

    def attn1(self, session, n, k, v, sources, grid):
        """The self-attention of one CFG half at a site: [Branch]. n, k, v: the inputs of Q, K and V, [B, tokens,
        channels].
        sources: what was kept, by stream. grid: (h, w) of the tokens."""
        raise NotImplementedError


def begin_on(stream, recipe, session, noise, latent_image, sigma=None):
    """The noise and latent image that put a run on a stream's trajectory at its first sigma (sigma: that of a shortened
    schedule), whatever the sampler's seed.

    At the schedule's start they are the stream's own; inside it, the noise that leads to its latent, x = latent + sigma
    * noise. Where the sampler adds no noise to another latent, it goes on with what an earlier sampler began, and
    nothing is changed.
    Raises ValueError for any other latent than the one that the stream began with.
    """
    run, row = stream
    latent = run.latent_image[row : row + 1]
    shortened, sigma = sigma not in (None, session.sigmas[0]), session.sigmas[0] if sigma is None else sigma
    if not torch.equal(latent_image.cpu(), latent.expand_as(latent_image)):
        if noise.any() or shortened:
            raise ValueError(
                f"{recipe.node}: the sampler was given another latent than its images began with. Connect the LATENT"
                " that the node gives; for a detailer or a second pass over a picture, use the MODEL before this node."
            )
        return noise, latent_image
    if sigma == run.sigmas[0]:
        own = run.noise[row : row + 1]
    else:
        x = session.evaluation_of(recipe, run, (sigma, run.visit_that_continues(sigma), 0)).x[row : row + 1]
        own = (x - session.model.model.process_latent_in(latent) * bool(latent.count_nonzero())) / sigma
    return own.expand_as(noise).to(noise), latent.expand_as(latent_image).to(latent_image)


class Patch(NamedTuple):
    """What is installed in a MODEL. Immutable, so that clones can share it."""

    groups: tuple = ()  # of recipes: those of one node
    recordings: tuple = ()
    maps: tuple = ()  # of words that the run looks for


def install(model, *recipes, recording=None, token_map=None):
    """A clone of the MODEL with a node's recipes, a recording or a map of words on top. The MODEL that came in is not
    changed.
    """
    sites_of(model)  # refuses what is no UNet
    old = model.attachments.get(KEY, Patch())
    patch = Patch(
        old.groups + ((recipes,) if recipes else ()),
        old.recordings + ((recording,) if recording else ()),
        old.maps + ((token_map,) if token_map else ()),
    )
    patched = model.clone()
    patched.set_attachments(KEY, patch)
    patched.set_additional_models(KEY, _control_models(recipe for group in patch.groups for recipe in group))
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _outer_sample),
        (WrappersMP.PREDICT_NOISE, _predict_noise),
        (WrappersMP.CALC_COND_BATCH, _calc_cond_batch),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _control_models(recipes):
    """The ControlNets that replays will need, for ComfyUI to load beside the UNet."""
    runs = dict.fromkeys(stream.run for recipe in recipes for stream in recipe.streams)
    controls = dict.fromkeys(
        cond["control"] for run in runs for group in run.conds.values() for cond in group if "control" in cond
    )
    models = [model for control in controls for model in control.get_models()]
    return list(dict.fromkeys(models))


# ---------------------------------------------------------------- wrappers


def _outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
    guider = executor.class_obj
    session = Session(guider, guider.model_patcher.attachments[KEY], noise, sampler, sigmas)
    for recipe in session.recipes:
        noise, latent_image, sigmas = recipe.start(session, noise, latent_image, sigmas)
    session.record(noise, latent_image, sigmas, denoise_mask)
    guider.model_options["transformer_options"][KEY] = session  # this run's own copy of the options
    try:
        output = (
            executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
            if len(sigmas) > 1
            else latent_image
        )
    finally:
        session.close()
    for recipe in session.recipes:
        output = recipe.output(session, output)
    session.finish(output)
    return output


def _predict_noise(executor, x, timestep, model_options={}, seed=None):
    session = model_options.get("transformer_options", {}).get(KEY)
    if session is None:
        return executor(x, timestep, model_options, seed)
    session.visit(float(timestep[0]))
    for recipe in session.recipes:
        x = recipe.latent(session, x)
    denoised = executor(x, timestep, model_options, seed)
    for recipe in session.recipes:
        denoised = recipe.denoised(session, denoised)
    return denoised


def _calc_cond_batch(executor, model, conds, x, timestep, options):
    session = options["transformer_options"].get(KEY)
    if session is None:  # called by someone's own code, outside of a sampling run
        return executor(model, conds, x, timestep, options)
    return session.evaluate(executor, model, conds, x, timestep, options)
