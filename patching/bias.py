"""An additive bias on the cross-attention of single conditionings.

The CONDITIONING itself carries the Bias (`attach`), and the MODEL is made to look for it (`install`), so that it acts
on this prompt alone: not on the negative one, not on another pack's, and in whatever batches ComfyUI computes them.

    OUTER_SAMPLE  notes which conditionings of the run are biased; refuses what does not fit, before anything is
    computed APPLY_MODEL   biases one call of the model, in which some of them are

The patch exists only in the options of a single call. It takes the attn2 slot there last, whoever stands in it
(IPAdapter and its kin): with a biased prompt, what the occupant makes of the plain attention is added.
"""

import logging

import comfy.ldm.modules.attention as attention
import node_helpers
import torch
from comfy.patcher_extension import WrappersMP

from .run_masks import check_shape
from .schedule import position
from .sites import sites_of

KEY = "montage_bias"  # of our wrappers in a MODEL, of the Run in a run's options, and of the Bias in a conditioning


class Bias:
    """What is added to the logits of one conditioning. Subclasses say how.

    node: the display name for messages. window: schedule.Window. size: (H, W) of the canvas that its masks lie on.
    """

    node = "Montage"

    def __init__(self, window, size):
        self.window, self.size = window, size

    def prepare(self, grid, tokens, copies, like):
        """What stays the same for a whole run at a level: anything. grid: (h, w). tokens: of the conditioning. copies:
        how often it is repeated in K. like: a tensor of the device and type."""

    def bias(self, prepared, q, k, heads, sigma):
        """The bias [B, 1, pixels, K], in q's type and finite. q: [B, pixels, C], k: [B, K, C]."""
        raise NotImplementedError


def attach(conditioning, bias):
    """A CONDITIONING that carries the bias."""
    return node_helpers.conditioning_set_values(conditioning, {KEY: bias})


def install(model):
    """A clone of the MODEL that heeds biases. The MODEL that came in is not changed."""
    sites_of(model)  # refuses what is no UNet
    patched = model.clone()
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _outer_sample), (WrappersMP.APPLY_MODEL, _apply_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


class Run:
    """A sampling run: its biased conditionings, size and schedule, and what the biases prepared."""

    def __init__(self, conds, size, sigmas):
        biased = [cond for group in conds.values() for cond in group if KEY in cond]
        self.biases = {
            cond["uuid"]: (cond[KEY], cond["cross_attn"].shape[1]) for cond in biased
        }  # and the tokens of each
        self.node = biased[0][KEY].node if biased else ""
        self.size, self.sigmas = size, sigmas
        self.prepared = {}


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider, (height, width) = executor.class_obj, noise.shape[-2:]
    run = Run(guider.conds, (height, width), sigmas.tolist())
    if not run.biases:
        raise ValueError(
            "Collage Cross Attention: its MODEL is sampled without its CONDITIONING. Connect both to the sampler: the"
            " conditioning as positive."
        )
    for bias, _ in run.biases.values():
        check_shape(run.node, bias.size, run.size)
    if guider.model_options.get("context_handler") is not None:
        raise ValueError(
            f"{run.node}: context windows cut the latent into pieces that do not match the canvas. Disconnect the"
            " context window node from this MODEL."
        )
    options = guider.model_options["transformer_options"]  # this run's own copy
    options[KEY] = run
    if options["wrappers"][WrappersMP.APPLY_MODEL].pop("torch.compile", None):
        logging.warning(
            "%s: torch.compile is left out of this run, since it would leave out the attention patches.", run.node
        )
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        run.prepared.clear()  # a recording of the run keeps its options


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
    run = transformer_options.get(KEY)
    acting, fired = {}, set()
    if run is not None:  # None where someone's own code calls the model outside of a sampling run
        sigma = float(t[0])
        where = position(sigma, run.sigmas)
        acting = {
            uuid: run.biases[uuid]
            for uuid in transformer_options["uuids"]
            if uuid in run.biases and run.biases[uuid][0].window.has(where)
        }
    if acting:
        transformer_options = patched(transformer_options, run, acting, sigma, fired)
    result = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    missing = [site for site in wanted(acting) if site not in fired]
    if missing:
        raise RuntimeError(
            f"{run.node}: the cross-attention of {len(missing)} blocks was never reached, the first of them"
            f" {tuple(missing[0])}. Another node runs these blocks in its own way: disconnect it from this MODEL, or"
            " leave the blocks out."
        )
    return result


def wanted(acting):
    return {site for bias, _ in acting.values() for site in bias.window.sites}


def patched(options, run, acting, sigma, fired):
    """Transformer options in which cross-attention is biased, and `fired` filled with the sites where it was.
    acting: {uuid: (Bias, tokens of the conditioning)}."""
    replace = options.get("patches_replace", {})
    slot = dict(replace.get("attn2", {}))
    for site in wanted(acting):
        occupant = slot.get(site, slot.get(site[:2]))
        slot[tuple(site)] = replacement(site, occupant, run, acting, sigma, fired)
    return {**options, "patches_replace": {**replace, "attn2": slot}}


def replacement(site, occupant, run, acting, sigma, fired):
    """What stands in the attn2 slot of a site."""

    def attend(q, k, v, extra):
        fired.add(site)
        uuids, grid = extra["uuids"], tuple(extra["activations_shape"][-2:])
        check(run, extra, q, grid)
        heads, settings = extra["n_heads"], {"attn_precision": extra["attn_precision"], "transformer_options": extra}
        done = []
        for uuid, *part in zip(uuids, *(t.chunk(len(uuids)) for t in (q, k, v))):
            bias, tokens = acting.get(uuid, (None, 0))
            if bias is None or site not in bias.window.sites:
                done.append(None if occupant else attention.optimized_attention(*part, heads, **settings))
                continue
            key = bias, grid, tokens, k.shape[1], q.device, q.dtype
            if key not in run.prepared:
                run.prepared[key] = bias.prepare(grid, tokens, k.shape[1] // tokens, q)
            biased = masked(*part, heads, mask=bias.bias(run.prepared[key], part[0], part[1], heads, sigma), **settings)
            done.append(biased - attention.optimized_attention(*part, heads, **settings) if occupant else biased)
        if occupant is None:
            return torch.cat(done)
        out = occupant(q, k, v, extra)
        return torch.cat(
            [part if change is None else part + change for part, change in zip(out.chunk(len(uuids)), done)]
        )

    return attend


def masked(*args, **kwargs):
    """ComfyUI's attention with a mask. Flash attention knows none, and would say so at every call."""
    attend = attention.optimized_attention_masked
    return (attention.attention_pytorch if attend is attention.attention_flash else attend)(*args, **kwargs)


def check(run, extra, q, grid):
    if tuple(extra["original_shape"][-2:]) != run.size or q.shape[1] != grid[0] * grid[1]:
        raise ValueError(
            f"{run.node}: the model is run on {extra['original_shape'][-2:]} of {run.size[0]}x{run.size[1]} latent"
            f" pixels ({q.shape[1]} tokens for a grid of {grid[0]}x{grid[1]}). Areas and tiles do not match the canvas:"
            " use masks instead of areas, and disconnect what cuts the latent into tiles."
        )
    if q.shape[0] != extra["original_shape"][0]:
        raise ValueError(
            f"{run.node}: another node (an attention couple, for instance) multiplies the batch inside cross-attention."
            " Disconnect it from this MODEL."
        )
