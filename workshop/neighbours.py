"""What else people patch a MODEL or a conditioning with: ComfyUI's own nodes, and what other packs do to the same
places.
"""

from collections.abc import Callable

import comfy.hooks
import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..patching.models import sites_of
from .random_models import control_net


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AddedCallbacks:
    """The protocol of IPAdapter's family: one object in an attn2 slot, with `add`."""

    def __init__(self, callback):
        self.callbacks = [callback]

    def add(self, callback):
        self.callbacks.append(callback)

    def __call__(self, q, k, v, extra):
        out = optimized_attention(q, k, v, extra["n_heads"])
        return sum((callback(out) for callback in self.callbacks), out)


def adapter(model):
    """As such packs do it: join what lies in the slot, or take it."""
    model = model.clone()
    slots = model.model_options["transformer_options"].get("patches_replace", {}).get("attn2", {})
    for site in sites_of(model):
        for key in (site, site[:2]):
            if key in slots:
                slots[key].add(lambda out: 0.3 * out)
                break
        else:
            model.set_model_attn2_replace(AddedCallbacks(lambda out: 0.3 * out), site.block, site.number)
    return model


def pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0).args[0]


def sag(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


def nag(model):
    from comfy_extras.nodes_nag import NAGuidance

    return NAGuidance.execute(model, 5.0, 0.5, 1.5).args[0]


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).args[0]


def hypertile(model):
    from comfy_extras.nodes_hypertile import HyperTile

    (patched,) = HyperTile.execute(model, 64, 1, 0, False)
    return patched


def tome(model):
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, 0.3).args[0]


def differential(model):
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    return DifferentialDiffusion.execute(model).args[0]


def context_windows(model):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(model, 8, 2, "standard_static", 1, False, "pyramid", 3, False).args[0]


def lora(model):
    model = model.clone()
    model.add_patches(
        {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": ("diff", (noise(5, 32, 32),))}, 1.0
    )
    return model


def scaled_queries(model):
    """Another pack in the list of attn1 patches."""
    model = model.clone()
    model.set_model_attn1_patch(lambda n, k, v, extra: (n * 1.3, k, v))
    return model


def replaced_attention(model):
    """Another pack in the attn1 slot, at one site."""
    model = model.clone()
    model.set_model_attn1_replace(
        lambda q, k, v, extra: optimized_attention(q, k, 1.2 * v, extra["n_heads"]), "output", 5
    )
    return model


def function_wrapper(model):
    """Another pack around the whole model."""
    model = model.clone()
    model.set_model_unet_function_wrapper(lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"]))
    return model


def controlled(conditioning):
    control = control_net()
    control.set_cond_hint(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)), strength=1.0)
    return [[text, {**extra, "control": control, "control_apply_to_uncond": True}] for text, extra in conditioning]


def lora_hook(conditioning):
    weights = {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.diff": noise(5, 32, 32)}
    return comfy.hooks.set_hooks_for_conditioning(conditioning, comfy.hooks.create_hook_lora(weights, 1.0, 0.0))


def late(conditioning):
    """Two prompts that relieve each other."""
    text, extra = conditioning[0]
    return [
        [text, {**extra, "start_percent": 0.0, "end_percent": 0.5}],
        [1.5 * text, {**extra, "start_percent": 0.5, "end_percent": 1.0}],
    ]


# ---------------------------------------------------------------- protocols of other packs, each in a few lines


def told_halves(model: ModelPatcher) -> ModelPatcher:
    """IPAdapter's family: acts on the conditional half alone, which it tells by cond_or_uncond."""
    model = model.clone()

    def patch(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict) -> tuple:
        scale = torch.tensor([1.0 if which else 1.5 for which in extra["cond_or_uncond"]])
        scale = scale.repeat_interleave(len(n) // len(scale))[:, None, None]
        return n, context * scale, value * scale

    model.set_model_attn2_patch(patch)
    return model


def told_rows(model: ModelPatcher) -> ModelPatcher:
    """IPAdapter Embeds Batch, LatentKeyframes, StyleAligned: another strength for each image, by its place in the
    batch.
    """
    model = model.clone()

    def patch(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict) -> tuple:
        rows = torch.arange(len(n)) % (len(n) // len(extra["cond_or_uncond"]))
        scale = (1 + 0.5 * rows)[:, None, None]
        return n, context * scale, value * scale

    model.set_model_attn2_patch(patch)
    return model


def both_halves(model: ModelPatcher) -> ModelPatcher:
    """bleh's BlockCFG: guidance inside a block, which wants the conditional and the unconditional half together."""
    model = model.clone()

    def patch(h: torch.Tensor, options: dict) -> torch.Tensor:
        if sorted(options["cond_or_uncond"]) != [0, 1]:
            raise RuntimeError("a half came alone")
        first, second = h.chunk(2)
        return torch.cat([first + 0.1 * (first - second), second])

    model.set_model_input_block_patch(patch)
    return model


def own_windows(model: ModelPatcher, length: int = 1) -> ModelPatcher:
    """AnimateDiff-Evolved: context windows of its own, a part of the batch at a time."""
    model = model.clone()

    def windows(args: dict) -> list[torch.Tensor]:
        parts = [slice(i, i + length) for i in range(0, len(args["input"]), length)]
        found = [
            comfy.samplers.calc_cond_batch(
                args["model"], args["conds"], args["input"][part], args["sigma"][part], args["model_options"]
            )
            for part in parts
        ]
        return [torch.cat(of_cond) for of_cond in zip(*found)]

    model.set_model_sampler_calc_cond_batch_function(windows)
    return model


def own_noise(model: ModelPatcher) -> ModelPatcher:
    """AnimateDiff-Evolved's sample settings: other noise, given inside OUTER_SAMPLE."""
    model = model.clone()

    def outer_sample(executor: Callable, given: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return executor(given.flip(-1), *args, **kwargs)

    model.add_wrapper(WrappersMP.OUTER_SAMPLE, outer_sample)
    return model


def in_its_own_way(model: ModelPatcher) -> ModelPatcher:
    """DeepCache and its kin: runs the UNet by itself, without what other nodes have put into the options."""
    model = model.clone()

    def run(apply: Callable, args: dict) -> torch.Tensor:
        options = {**args["c"]["transformer_options"], "patches": {}, "patches_replace": {}, "wrappers": {}}
        return apply(args["input"], args["timestep"], **{**args["c"], "transformer_options": options})

    model.set_model_unet_function_wrapper(run)
    return model


def reads_its_options(model: ModelPatcher) -> ModelPatcher:
    """EasyCache's protocol: a wrapper around the calls of the model, and in the options something that it wants to find
    there.
    """
    model = model.clone()
    model.model_options["transformer_options"]["a pack"] = {}

    def calls(
        executor: Callable, model: object, conds: list, x: torch.Tensor, sigma: torch.Tensor, options: dict
    ) -> list:
        options["transformer_options"]["a pack"]["calls"] = True
        return executor(model, conds, x, sigma, options)

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "a pack", calls)
    return model


class NegPip:
    """NegPip's CLIP: encodes keys and values in turn, twice as many tokens."""

    def __init__(self, clip: object) -> None:
        self.clip = clip

    def __getattr__(self, name: str) -> object:
        return getattr(self.clip, name)

    def encode_from_tokens_scheduled(self, tokens: dict) -> list:
        found = self.clip.encode_from_tokens_scheduled(tokens)
        return [[features.repeat_interleave(2, 1), extra] for features, extra in found]
