"""The attention sites of a diffusion UNet: where a recipe may act.

A site is one transformer block of the UNet, which holds one self-attention (attn1) and one cross-attention (attn2).
Its key is what ComfyUI hands to an attention patch: `extra_options["block"] + (extra_options["block_index"],)`.
"""

import re
from typing import NamedTuple

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample


class Site(NamedTuple):
    block: str  # "input", "middle" or "output"
    number: int  # of the UNet's block, as ComfyUI counts them
    index: int  # of the transformer block inside it


LETTERS = {"d": "input", "m": "middle", "u": "output"}
PRESETS = {"all": "d,m,u", "encoder": "d", "middle": "m", "decoder": "u"}


def unet_of(model):
    """The UNet of a MODEL. Raises ValueError for every other kind of diffusion model."""
    unet = model.get_model_object("diffusion_model")
    unet = getattr(unet, "_orig_mod", unet)  # a torch.compile'd module keeps the real one here
    if not isinstance(unet, UNetModel):
        raise ValueError(
            "Montage works inside the attention of SD1.x, SD2.x and SDXL UNets; this MODEL is a "
            f"{type(model.model).__name__} with a {type(unet).__name__}. Load an SD1.x, SD2.x or SDXL checkpoint."
        )
    return unet


def blocks_of(model):
    """{(block, number): its transformer blocks}, in the order of execution."""
    unet = unet_of(model)
    found = {}
    middle = [unet.middle_block] if unet.middle_block is not None else []
    for name, modules in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, module in enumerate(modules):
            for layer in module:
                if isinstance(layer, SpatialTransformer):
                    found[name, number] = layer.transformer_blocks
    return found


def sites_of(model):
    """Every attention site of the MODEL, in the order of execution (16 for SD1.5, 70 for SDXL)."""
    return tuple(Site(*key, index) for key, blocks in blocks_of(model).items() for index in range(len(blocks)))


def transformer_block(model, site):
    """The module at a site. Call its layers, never read their weights: those may live elsewhere."""
    return blocks_of(model)[site.block, site.number][site.index]


def scales_of(model):
    """{(block, number): how many latent pixels a token is wide there}: 1, 2, 4, 8. A latent of h rows has ceil(h /
    scale).
    """
    unet = unet_of(model)
    scale, found = 1, {("middle", 0): 2 ** (len(unet.channel_mult) - 1)}
    for number, module in enumerate(unet.input_blocks):
        scale *= 2 ** any(isinstance(layer, Downsample) for layer in module)
        found["input", number] = scale
    for number, module in enumerate(unet.output_blocks):
        found["output", number] = scale
        scale //= 2 ** any(isinstance(layer, Upsample) for layer in module)
    return found


def parse_sites(model, text):
    """The sites that a text names, in the order of execution.

    `text` is a preset ("all", "encoder", "middle", "decoder") or a comma-separated list in the grammar the field
    uses for block lists: d, m, u for the down, middle and up path; then the number among the blocks of that path
    that have attention (counted from 0), or a range of numbers ("u2-": to the last); then, after a dot, the index or
    range of indices of transformer blocks inside: "d2.2-9,m0,u0-5". A letter alone is its whole path. After an @ stands
    the scale, or a range of scales, that a block must have: "u@1-2" is the up path at the latent's resolution and at
    half of it.
    Raises ValueError that lists what the model has.
    """
    scales = scales_of(model)
    keys = {letter: [key for key in blocks_of(model) if key[0] == name] for letter, name in LETTERS.items()}
    depth = {key: len(blocks) for key, blocks in blocks_of(model).items()}
    named = set()
    for word in PRESETS.get(text.strip(), text).replace(" ", "").split(","):
        match = re.fullmatch(r"([dmu])(?:(\d+)(?:-(\d*))?(?:\.(\d+)(?:-(\d+))?)?)?(?:@(\d+)(?:-(\d+))?)?", word)
        if not match:
            raise ValueError(f'"{word}" names no attention block. {_grammar(keys, depth)}')
        letter, first, last, low, high, finest, coarsest = match.groups()
        end = len(keys[letter]) if not first or last == "" else int(last or first) + 1
        numbers = range(int(first or 0), end)
        for number in numbers:
            if number >= len(keys[letter]):
                raise ValueError(f'"{word}": this model has no {letter}{number}. {_grammar(keys, depth)}')
            key = keys[letter][number]
            indices = range(int(low), int(high or low) + 1) if low else range(depth[key])
            if not indices or indices[-1] >= depth[key]:
                raise ValueError(
                    f'"{word}": block {letter}{number} has {depth[key]} transformer blocks. {_grammar(keys, depth)}'
                )
            if finest is None or int(finest) <= scales[key] <= int(coarsest or finest):
                named.update(Site(*key, index) for index in indices)
        if not numbers:
            raise ValueError(f'"{word}" is an empty range. {_grammar(keys, depth)}')
    if not named:
        raise ValueError(
            f'"{text}": this model has no attention at that scale, only at {sorted({scales[key] for key in depth})}.'
            f" {_grammar(keys, depth)}"
        )
    return tuple(site for site in sites_of(model) if site in named)


def _grammar(keys, depth):
    paths = []
    for letter, found in keys.items():
        if found:
            deepest = max(depth[key] for key in found)
            inside = (
                f" (with up to {deepest} transformer blocks: {letter}0.0-{depth[found[0]] - 1})" if deepest > 1 else ""
            )
            paths.append(f"{letter}0-{len(found) - 1}{inside}")
    return f"Write a preset ({', '.join(PRESETS)}) or blocks of this model: {', '.join(paths)}."
