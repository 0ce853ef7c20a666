"""Draws with the demo models in ComfyUI's own classes and samplers, many different prompts at once."""

import os
import sys

import torch
from torch import Tensor

STEPS, GUIDANCE = 16, 3.0
SAMPLERS = {"unet": ("ddim", "normal"), "dit": ("euler", "simple")}  # sampler and scheduler


def start_comfyui(path: str | None = None) -> None:
    """Makes a ComfyUI tree importable in this process, on the CPU where there is no GPU."""
    path = path or os.environ.get("COMFYUI_PATH")
    if path:
        sys.path.insert(0, path)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()


def load(path=None):
    """A demo model, the UNet unless a file is named, as ComfyUI's (MODEL, CLIP, VAE)."""
    import comfy.sd

    from . import supported_model

    supported_model.register()
    return comfy.sd.load_checkpoint_guess_config(str(path or supported_model.WEIGHTS))[:3]


def architecture(model) -> str:
    """ "unet" or "dit"."""
    from . import supported_model

    return supported_model.architecture(model)


def encode(clip, captions: list[str]) -> list:
    """A CONDITIONING with one row for each caption: row i of a batch follows caption i."""
    rows = [clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True) for caption in captions]
    return [[torch.cat([context for context, _ in rows]), {"pooled_output": torch.cat([pooled for _, pooled in rows])}]]


def noise(seeds, side: int = 16) -> Tensor:
    """(n, 4, side, side), row i from seed i alone."""
    return torch.cat(
        [torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    )


@torch.inference_mode()
def sample(model, clip, captions: list[str], start: Tensor, control=None, steps: int = STEPS) -> Tensor:
    """Latents (n, 4, h, w) of n captions from n starting noises. control: (ControlNet, hints (n, h, w, 3))."""
    import comfy.sample

    positive, negative = encode(clip, captions), encode(clip, [""])
    if control:
        net = control[0].copy().set_cond_hint(control[1].movedim(-1, 1), 1.0)
        for conditioning in (positive, negative):
            conditioning[0][1] |= {"control": net, "control_apply_to_uncond": False}
    return comfy.sample.sample(
        model,
        start,
        steps,
        GUIDANCE,
        *SAMPLERS[architecture(model)],
        positive,
        negative,
        torch.zeros_like(start),
        disable_pbar=True,
        seed=0,
    )


@torch.inference_mode()
def draw(models, captions: list[str], seeds, batch: int = 16, **kwargs) -> Tensor:
    """(n, h, w, 3) pictures in [0, 1]."""
    model, clip, vae = models
    pictures = []
    for i in range(0, len(captions), batch):
        latents = sample(model, clip, captions[i : i + batch], noise(seeds[i : i + batch]), **kwargs)
        pictures.append(vae.decode(latents))
    return torch.cat(pictures)


def swap_self_attention(model, parts: str):
    """A MODEL for batches of n sources followed by n targets: each target's self-attention inputs are replaced
    by its source's, only what feeds keys and values ("kv") or queries too ("qkv")."""
    from . import supported_model

    def swapped(x, halves):
        x = x.unflatten(0, (halves, 2, -1)).clone()
        x[:, 1] = x[:, 0]
        return x.flatten(0, 2)

    def patch(q, k, v, extra_options):
        halves = len(extra_options["cond_or_uncond"])
        return swapped(q, halves) if parts == "qkv" else q, swapped(k, halves), swapped(v, halves)

    def joint(q, k, v, extra_options, **_):
        """The transformer's text tokens, which come first, keep their own."""
        halves, words = len(extra_options["cond_or_uncond"]), supported_model.DIT_WORDS
        named = {"q": q, "k": k, "v": v}
        return {
            name: torch.cat([rows[:, :, :words], swapped(rows[:, :, words:], halves)], 2)
            for name, rows in named.items()
            if name in parts
        }

    patched = model.clone()
    patched.set_model_attn1_patch(joint if architecture(model) == "dit" else patch)
    return patched


def silence_self_attention(model):
    """A MODEL whose self-attention layers add nothing."""
    patched = model.clone()
    patched.set_model_attn1_output_patch(lambda n, extra_options: torch.zeros_like(n))
    return patched


def narrow_self_attention(model):
    """A MODEL in which every token attends to itself alone: the layers work, but nothing travels."""

    def own_value(q, k, v, extra_options):
        return v

    patched = model.clone()
    for site in attention_sites(model):
        patched.set_model_attn1_replace(own_value, *site)
    return patched


def attention_sites(model) -> list[tuple[str, int]]:
    """(block, number) of every self-attention layer, as set_model_attn1_replace names them."""
    from comfy.ldm.modules.attention import SpatialTransformer

    net = model.model.diffusion_model
    blocks = (("input", net.input_blocks), ("middle", [net.middle_block]), ("output", net.output_blocks))
    return [
        (name, i)
        for name, group in blocks
        for i, block in enumerate(group)
        if any(isinstance(layer, SpatialTransformer) for layer in block)
    ]
