"""The attention of diffusion UNets: SD1.x, SD2.x and SDXL.

A site is one transformer block of the UNet, which holds one self-attention (attn1) and one cross-attention (attn2).
Its key is what ComfyUI hands to an attention patch: `extra_options["block"] + (extra_options["block_index"],)`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import comfy.ldm.modules.attention as attention
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention, SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

from .. import internals, slots
from ..terms import PackedAttention
from .base import ModelFamily, SelfAttention, Site, SiteHandler, TextAttention
from .masks import MaskCheck, knows_masks, with_pytorch

Tensor = torch.Tensor

LETTERS = {"d": "input", "m": "middle", "u": "output"}
PRESETS = {"all": "d,m,u", "encoder": "d", "middle": "m", "decoder": "u"}


class UNet(ModelFamily):
    """SD1.x, SD2.x and SDXL."""

    network: Any  # a UNetModel, whose parts are declared as plain modules
    is_unet = True

    @classmethod
    def owns(cls, network: torch.nn.Module) -> bool:
        return isinstance(network, UNetModel)

    # ------------------------------------------------------------ sites

    def blocks(self) -> dict[tuple[str, int], Sequence[BasicTransformerBlock]]:
        """{(block, number): its transformer blocks}, in the order of execution."""
        unet = self.network
        found = {}
        middle = [unet.middle_block] if unet.middle_block is not None else []
        for name, modules in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
            for number, module in enumerate(modules):
                for layer in module:
                    if isinstance(layer, SpatialTransformer) and not layer.transformer_blocks[0].disable_self_attn:
                        found[name, number] = layer.transformer_blocks
        return found

    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(*key, index) for key, blocks in self.blocks().items() for index in range(len(blocks)))

    def transformer_block(self, site: Site) -> BasicTransformerBlock:
        """The module at a site. Call its layers, never read their weights: those may live elsewhere."""
        return self.blocks()[site.block, site.number][site.index]

    def scales(self) -> dict[tuple[str, int], int]:
        """{(block, number): how many latent pixels a token is wide there}: 1, 2, 4, 8. A latent of h rows has
        ceil(h / scale).
        """
        unet = self.network
        scale, found = 1, {("middle", 0): 2 ** (len(unet.channel_mult) - 1)}
        for number, module in enumerate(unet.input_blocks):
            scale *= 2 ** any(isinstance(layer, Downsample) for layer in module)
            found["input", number] = scale
        for number, module in enumerate(unet.output_blocks):
            found["output", number] = scale
            scale //= 2 ** any(isinstance(layer, Upsample) for layer in module)
        return found

    def parse_sites(self, text: str) -> tuple[Site, ...]:
        """The sites that a text names, in the order of execution.

        `text` is a preset ("all", "encoder", "middle", "decoder") or a comma-separated list in the grammar the field
        uses for block lists: d, m, u for the down, middle and up path; then the number among the blocks of that path
        that have attention (counted from 0), or a range of numbers ("u2-": to the last); then, after a dot, the index
        or range of indices of transformer blocks inside: "d2.2-9,m0,u0-5". A letter alone is its whole path. After an @
        stands the scale, or a range of scales, that a block must have: "u@1-2" is the up path at the latent's
        resolution and at half of it. Raises ValueError that lists what the model has.
        """
        grammar = _Grammar(self.blocks(), self.scales())
        preset = PRESETS.get(text.strip())
        # a pruned UNet may have no attention on a path: a preset is what there is of its paths
        words = [p for p in preset.split(",") if grammar.paths[p]] if preset else text.replace(" ", "").split(",")
        named = {site for word in words for site in grammar.named(word)}
        if not named:
            raise ValueError(grammar.nothing(text))
        return tuple(site for site in self.sites() if site in named)

    # ------------------------------------------------------------ the graph cut's features

    def cut_site(self) -> Site:
        return self.sites()[0]

    def cut_features(self, rows: torch.Tensor) -> torch.Tensor:
        """K of the first self-attention (Generative Photomontage, section 3.2)."""
        return self.transformer_block(self.cut_site()).attn1.to_k(rows)

    # ------------------------------------------------------------ attention

    def hooked(self, options: dict, handler: SiteHandler) -> dict:
        transformer = options["transformer_options"]
        packed: dict[tuple, PackedAttention] = {}  # (site, uuids) -> how to attend, between the patch and the slot
        if handler.self_attention_sites:
            internals.add_first(options, "attn1_patch", _self_attention_patch(handler, packed))
        for site in handler.packed_sites:
            slots.occupy(transformer, "attn1", site, lambda s, o: _packed_attention(handler, s, o, packed))
        if handler.measured_sites:
            found = ((site, self.transformer_block(site).attn2) for site in handler.measured_sites)
            attentions = {site: module for site, module in found if module is not None}
            internals.add_first(options, "attn2_patch", _measuring_patch(handler, attentions))
        for site in handler.biased_sites:
            slots.occupy(transformer, "attn2", site, lambda s, o: _biased_attention(handler, self.masks, s, o))
        return options


def _self_attention_patch(handler: SiteHandler, packed: dict[tuple, PackedAttention]) -> Callable:
    """The attn1_patch: it stands before every other pack's, which then act on what is composed as on a plain image."""

    def patch(n: Tensor, k: Tensor, v: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        site, uuids = _site_of(extra), extra["uuids"]
        rows = handler.self_attention(SelfAttention(site, uuids, n, _grid_of(extra), _latent_size_of(extra)))
        if rows is None:
            return n, k, v
        if rows.packed is not None:
            packed[site, tuple(uuids)] = rows.packed
        return rows.q, rows.k, rows.v

    return patch


def _packed_attention(
    handler: SiteHandler, site: Site, occupant: Callable | None, packed: dict[tuple, PackedAttention]
) -> Callable:
    """What stands in the attn1 slot of a site: runs each term through whoever stood there before, or ComfyUI's own
    attention.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        if occupant:
            result = occupant(q, k, v, extra)
        else:
            precision = extra["attn_precision"]
            result = optimized_attention(q, k, v, extra["n_heads"], attn_precision=precision, transformer_options=extra)
        if result.shape != q.shape:
            raise handler.wrong_result(site, tuple(result.shape), tuple(q.shape))
        return result

    def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        terms = packed.pop((site, tuple(extra["uuids"])), None)
        if terms is None:
            return attend(q, k, v, extra)
        lengths = q.shape[1], k.shape[1], v.shape[1]
        if lengths != terms.lengths:
            raise handler.wrong_rows(site, lengths, terms.lengths)
        return terms.attend(q, k, v, lambda q, k, v, rows, images: attend(q, k, v, extra))

    return replace


def _measuring_patch(handler: SiteHandler, attentions: dict[Site, CrossAttention]) -> Callable:
    """An attn2_patch that changes nothing and stands before every other, so that whatever another pack makes of the
    text stays in effect, and what is measured is the model's own attention.
    """

    def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        site = _site_of(extra)
        if site in attentions:
            module = attentions[site]
            q, k = module.to_q(n), module.to_k(context)
            handler.text_attention(_text_attention(site, q, k, module.heads, extra))
        return n, context, value

    return patch


def _biased_attention(handler: SiteHandler, masks: MaskCheck, site: Site, occupant: Callable | None) -> Callable:
    """What stands in the attn2 slot of a site. Where another pack (IPAdapter) holds the slot already, the result is its
    output plus (biased - plain attention), for the conditionings that are biased.
    """

    def replace(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        heads, count = extra["n_heads"], len(extra["uuids"])
        settings = {"attn_precision": extra["attn_precision"], "transformer_options": extra}
        bias = handler.bias(_text_attention(site, q, k, heads, extra))
        if occupant is None:
            if bias is None:
                return attention.optimized_attention(q, k, v, heads, **settings)
            return _masked(masks, bias.whole, q, k, v, heads, **settings)
        whole = occupant(q, k, v, extra)
        if bias is None:
            return whole
        out, parts = list(whole.chunk(count)), zip(q.chunk(count), k.chunk(count), v.chunk(count))
        for number, (mask, part) in enumerate(zip(bias.parts(), parts)):
            if mask is not None:
                biased = _masked(masks, mask, *part, heads, **settings)
                plain = attention.optimized_attention(*part, heads, **settings)
                out[number] = out[number] + (biased - plain)
        return torch.cat(out)

    return replace


def _masked(masks: MaskCheck, mask: Tensor, *args: Any, **settings: Any) -> Tensor:
    """ComfyUI's attention with a mask, or another node's that is in its place and heeds masks."""
    attend, options = attention.optimized_attention_masked, settings["transformer_options"]
    if not knows_masks(attend):
        attend = with_pytorch()
    if internals.ATTENTION in options:
        found = masks.attend(lambda mask: attend(*args, mask=mask, **settings), mask)
        if found is not None:
            return found
        settings["transformer_options"] = {key: value for key, value in options.items() if key != internals.ATTENTION}
    return attend(*args, mask=mask, **settings)


def _text_attention(site: Site, q: Tensor, k: Tensor, heads: int, extra: dict) -> TextAttention:
    return TextAttention(
        site, extra["uuids"], q, k, heads, extra["original_shape"][0], _grid_of(extra), _latent_size_of(extra)
    )


def _site_of(extra: dict) -> Site:
    block, number = extra["block"]
    return Site(block, number, extra["block_index"])


def _grid_of(extra: dict) -> tuple[int, int]:
    height, width = extra["activations_shape"][-2:]
    return height, width


def _latent_size_of(extra: dict) -> tuple[int, int]:
    height, width = extra["original_shape"][-2:]
    return height, width


# ---------------------------------------------------------------- the grammar of sites


class _Grammar:
    """Block lists of one UNet. paths: {letter: [(block, number)] of the blocks with attention}."""

    def __init__(self, blocks: dict[tuple[str, int], Sequence], scales: dict[tuple[str, int], int]) -> None:
        self.paths = {letter: [key for key in blocks if key[0] == name] for letter, name in LETTERS.items()}
        self.depth = {key: len(found) for key, found in blocks.items()}
        self.scales = scales

    def named(self, word: str) -> Iterator[Site]:
        """The sites of one word of a list."""
        match = re.fullmatch(r"([dmu])(?:(\d+)(?:-(\d*))?(?:\.(\d+)(?:-(\d+))?)?)?(?:@(\d+)(?:-(\d+))?)?", word)
        if not match:
            raise ValueError(f'"{word}" names no attention block. {self}')
        letter, first, last, low, high, finest, coarsest = match.groups()
        keys = self.paths[letter]
        if first is None and not keys:  # a path of a pruned UNet that has no attention: nothing to add
            return
        numbers = range(int(first or 0), len(keys) if not first or last == "" else int(last or first) + 1)
        if not numbers:
            raise ValueError(f'"{word}" is an empty range. {self}')
        for number in numbers:
            if number >= len(keys):
                raise ValueError(f'"{word}": this model has no {letter}{number}. {self}')
            key = keys[number]
            indices = range(int(low), int(high or low) + 1) if low else range(self.depth[key])
            if not indices or indices[-1] >= self.depth[key]:
                raise ValueError(f'"{word}": block {letter}{number} has {self.depth[key]} transformer blocks. {self}')
            if finest is None or int(finest) <= self.scales[key] <= int(coarsest or finest):
                yield from (Site(*key, index) for index in indices)

    def nothing(self, text: str) -> str:
        there = sorted({self.scales[key] for key in self.depth})
        return f'"{text}": this model has no attention there, only at the scales {there}. {self}'

    def __str__(self) -> str:
        paths = []
        for letter, found in self.paths.items():
            if found:
                deepest = max(self.depth[key] for key in found)
                inside = f" (with up to {deepest} transformer blocks: {letter}0.0-{self.depth[found[0]] - 1})"
                paths.append(f"{letter}0-{len(found) - 1}{inside if deepest > 1 else ''}")
        return f"Write a preset ({', '.join(PRESETS)}) or blocks of this model: {', '.join(paths)}."
