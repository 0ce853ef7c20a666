"""The attention of diffusion transformers.

One hook reaches them all, the `optimized_attention_override` of ComfyUI's transformer options: it is given Q, K and V
after projection, normalisation and RoPE, of text and image together. There every row of Q, K and V belongs to one
token, so that rows can be composed as on a UNet: what stands for the input n of a UNet's self-attention is [Q K V] of
the image tokens, packed one after the other. The rows of the text, of padding and of reference images stay the
target's own.

The override is a single slot, and another pack (SageAttention nodes) may hold it: it goes on computing every attention.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import comfy.model_base
import torch

from .. import internals
from ..terms import EVERY, TargetRows
from .base import ModelFamily, SelfAttention, SelfAttentionRows, Site, SiteHandler, TextAttention, TextBias
from .masks import knows_masks, with_pytorch
from .positions import Positions, of_axes, of_halves

Tensor = torch.Tensor

FIRST, LAST, APART = "first", "last", "apart"


class Architecture(NamedTuple):
    """What has to be known of a class of networks.

    name: for messages. blocks: {kind of block: its module list}, in the order of execution. text: whether the text's
    rows stand first or last in the joint attention, or are read by a cross-attention of its own. is_numbered: whether
    the network says which block is running; else its attentions are counted. has_references: whether it says how many
    rows of reference images follow the image's own. refused: arguments of the network with which its rows cannot be
    told apart. positions: the network's embedder of places, and how it is read; None where keys say nothing of them.
    is_scaled: whether the network heeds what ScaleROPE says of the distance of tokens.
    """

    name: str
    blocks: dict[str, str]
    text: str = FIRST
    is_numbered: bool = True
    has_references: bool = False
    refused: tuple[str, ...] = ()
    positions: tuple[str, Callable[[Any], Positions]] | None = ("pe_embedder", of_axes)
    is_scaled: bool = False


TWO_STREAMS = {"double": "double_blocks", "single": "single_blocks"}
_COSMOS = Architecture(
    "Cosmos-Predict2 and Anima", {"double": "blocks"}, text=APART, positions=("pos_embedder", of_halves)
)

# class -> what is known of it; names instead of the classes themselves, so that none has to be there
ARCHITECTURES = {
    "comfy.ldm.flux.model.Flux": Architecture("Flux.1 and Flux.2", TWO_STREAMS, has_references=True, is_scaled=True),
    "comfy.ldm.chroma.model.Chroma": Architecture("Chroma", TWO_STREAMS),
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": Architecture(
        "Qwen-Image", {"double": "transformer_blocks"}, has_references=True
    ),
    "comfy.ldm.lumina.model.NextDiT": Architecture(
        "Z-Image and Lumina 2",
        {"double": "layers"},
        refused=("ref_latents", "siglip_feats"),
        positions=("rope_embedder", of_axes),
        is_scaled=True,
    ),
    "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": Architecture(
        "SD3 and SD3.5", {"double": "joint_blocks"}, is_numbered=False, positions=None
    ),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": Architecture("Hunyuan-Image", TWO_STREAMS, refused=("ref_latent",)),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": Architecture(
        "HiDream-I1",
        {"double": "double_stream_blocks", "single": "single_stream_blocks"},
        text=LAST,
        is_numbered=False,
        refused=("image_cond",),
    ),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": _COSMOS,
    "comfy.ldm.anima.model.Anima": _COSMOS,
    "comfy.ldm.wan.model.WanModel": Architecture(
        "Wan (single pictures)",
        {"double": "blocks"},
        text=APART,
        refused=("reference_latent", "context_latents", "time_dim_concat"),
        positions=("rope_embedder", of_axes),
        is_scaled=True,
    ),
}

PRESETS = ("all", "first third", "first half", "last half", "middle half")
ALL, FIRST_THIRD, FIRST_HALF, LAST_HALF, MIDDLE_HALF = PRESETS
# What the nodes' own defaults and presets, which are written for UNets, stand for on a transformer. It has no levels:
# its late blocks stand for the decoder, and for words those in the middle, where they are bound to places. A subject's
# keys are heeded in the first third, Flux's double blocks. Ours, not the papers': evidence/benchmarks/presets.py
# chooses on the demo transformer, and docs/evidence.md has what other scenes say.
FOR_UNETS = {
    "u@1-2": LAST_HALF,  # Multi Source Swap
    "u2-": FIRST_THIRD,  # Collaborative Attention
    "d1-,m,u": ALL,  # Collaborative Attention, "paper generation"
    "d@2-4,u@2-4": MIDDLE_HALF,  # Token Attention Map
}


def architecture_of(network: torch.nn.Module) -> Architecture | None:
    """What is known of a network; None where nothing is."""
    kind = type(network)
    if getattr(network, "cond_type_embedding", None) is not None:  # HunyuanVideo 1.5: other rows before the text's
        return None
    return ARCHITECTURES.get(f"{kind.__module__}.{kind.__qualname__}")


class DiT(ModelFamily):
    """Diffusion transformers. A site is one attention that image tokens take part in, by the number of its block among
    those of its kind; SD3.5-medium's blocks may have a second one, of image tokens alone.
    """

    lockstep = True

    @classmethod
    def owns(cls, network: torch.nn.Module) -> bool:
        return architecture_of(network) is not None

    @functools.cached_property
    def architecture(self) -> Architecture:
        found = architecture_of(self.network)
        assert found is not None
        return found

    # ------------------------------------------------------------ sites

    def sites(self) -> tuple[Site, ...]:
        found = []
        for kind, modules in self.architecture.blocks.items():
            for number, block in enumerate(getattr(self.network, modules)):
                alone = getattr(getattr(block, "x_block", None), "x_block_self_attn", False)
                found += [Site(kind, number, index) for index in range(1 + bool(alone))]
        return tuple(found)

    @property
    def text_sites(self) -> frozenset[Site]:
        return frozenset(site for site in self.sites() if site.index == 0)

    @property
    def most_text_tokens(self) -> int | None:
        return getattr(self.model.model, "most_text_tokens", None)

    def own_text(self, tokens: int, length: int) -> tuple[slice, int]:
        if isinstance(self.model.model, comfy.model_base.Flux2):  # padded on the left
            return slice(max(0, length - tokens), length), tokens
        if isinstance(self.model.model, comfy.model_base.Anima):  # an adapter makes a text of its own of it
            return slice(0, length), length
        return slice(0, length), min(tokens, self.most_text_tokens or tokens)

    def parse_sites(self, text: str) -> tuple[Site, ...]:
        """The sites that a text names, in the order of execution.

        `text` is one of PRESETS or a comma-separated list of kinds of blocks, each with a number or a range of numbers,
        counted from 0 ("single20-": to the last): "double0-18,single0-37". A kind alone is all its blocks. The nodes'
        defaults for UNets stand for what FOR_UNETS says. Raises ValueError that lists what the model has.
        """
        sites, text = self.sites(), text.strip()
        text = FOR_UNETS.get(text.replace(" ", ""), text)
        third, half, quarter = (len(sites) // n for n in (3, 2, 4))
        middle = sites[quarter : len(sites) - quarter]
        presets = dict(zip(PRESETS, (sites, sites[: max(1, third)], sites[:half], sites[half:], middle)))
        if text in presets:
            return presets[text]
        named = {key for word in text.replace(" ", "").split(",") for key in self.named(word)}
        return tuple(site for site in sites if site[:2] in named)

    def named(self, word: str) -> Iterator[tuple[str, int]]:
        """The blocks of one word of a list."""
        counts = Counter(site.block for site in self.sites() if site.index == 0)
        there = ", ".join(f"{kind}0-{count - 1}" for kind, count in counts.items())
        there = f"Write a preset ({', '.join(PRESETS)}) or blocks of this transformer: {there}."
        match = re.fullmatch(r"([a-z]+)(?:(\d+)(?:-(\d*))?)?", word)
        if not match or match[1] not in counts:
            raise ValueError(f'"{word}" names no attention block. {there}')
        kind, first, last = match.groups()
        numbers = range(int(first or 0), counts[kind] if not first or last == "" else int(last or first) + 1)
        if not numbers:
            raise ValueError(f'"{word}" is an empty range. {there}')
        if numbers[-1] >= counts[kind]:
            raise ValueError(f'"{word}": this model has no {kind}{numbers[-1]}. {there}')
        return ((kind, number) for number in numbers)

    # ------------------------------------------------------------ the graph cut's features

    def cut_site(self) -> Site:
        return self.sites()[0]

    def cut_features(self, rows: Tensor) -> Tensor:
        """V of the first block: K turns with a token's position (RoPE), V does not. Of the demo transformer's features
        it tells objects' edges as well as any that every model's hook reaches (evidence/benchmarks/edges.py).
        """
        return rows.chunk(3, -1)[2]

    # ------------------------------------------------------------ places

    @property
    def has_positions(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.architecture.positions is not None

    @functools.cached_property
    def positions(self) -> Positions | None:
        if self.architecture.positions is None:
            return None
        embedder, read = self.architecture.positions
        found = read(getattr(self.network, embedder))
        options = self.model.model_options["transformer_options"].get("rope_options") or {}
        down, right = (options.get(f"scale_{axis}", 1.0) if self.architecture.is_scaled else 1.0 for axis in "yx")
        return found._replace(down=down * found.down, right=right * found.right)

    def moved(self, rows: Tensor, shifts: Tensor) -> Tensor:
        if self.positions is None or not shifts.any():
            return rows
        q, k, v = rows.expand(max(len(rows), len(shifts)), -1, -1).chunk(3, -1)
        return torch.cat([q, self.positions.moved(k, shifts), v], -1)

    # ------------------------------------------------------------ attention

    def grid(self, latent_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of a latent."""
        patch: Any = getattr(self.network, "patch_spatial", None) or self.network.patch_size
        patch = patch[-1] if isinstance(patch, (tuple, list)) else patch
        height, width = latent_size
        return math.ceil(height / patch), math.ceil(width / patch)

    def hooked(self, options: dict, handler: SiteHandler) -> dict:
        calls: list[_NetworkCall] = []  # the one that is running

        def apply_model(
            executor: Callable, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, *args: Any, **kwargs: Any
        ) -> Tensor:
            for name in self.architecture.refused:
                if kwargs.get(name) is not None:
                    raise handler.references(self.architecture.name)
            calls.append(_NetworkCall(self, handler, x, c_crossattn))
            try:
                result = executor(x, t, c_concat, c_crossattn, *args, **kwargs)
                calls[-1].check_complete()
            finally:
                calls.pop()
            return result

        def override(
            func: Callable,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            heads: int,
            mask: Tensor | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> Tensor:
            def attend(q: Tensor, k: Tensor, v: Tensor, wanted: Tensor | None) -> Tensor:
                if occupant is not None:
                    held = functools.partial(occupant, func, q, k, v, heads)
                    if wanted is None or wanted is mask:  # the model's own mask is between the two of them
                        return held(wanted, *args, **kwargs)
                    found = self.masks.attend(lambda wanted: held(wanted, *args, **kwargs), wanted)
                    if found is not None:
                        return found
                plain = func if wanted is None or knows_masks(func) else with_pytorch()
                return plain(q, k, v, heads, wanted, *args, **kwargs)

            if not calls:  # a ControlNet runs blocks of its own before the network is called
                return attend(q, k, v, mask)
            return calls[-1].attention(q, k, v, heads, mask, attend, kwargs.get("transformer_options") or {})

        occupant = internals.replace_attention(options, override)
        internals.wrap_network(options, apply_model)
        return options


class _NetworkCall:
    """One call of the network: where it stands, and which rows of its attentions are the image's."""

    def __init__(self, family: DiT, handler: SiteHandler, x: Tensor, context: Tensor | None) -> None:
        """x: latents [conditionings x B, C, h, w] or [..., C, 1, h, w]. context: the text [.., tokens, channels]."""
        self.handler, self.architecture, self.sites = handler, family.architecture, family.sites()
        height, width = x.shape[-2:]
        self.latent_size, self.images = (height, width), len(x)
        self.grid = family.grid(self.latent_size)
        self.tokens = math.prod(self.grid)
        multiple = getattr(family.network, "pad_tokens_multiple", None) or 1
        self.padded = math.ceil(self.tokens / multiple) * multiple
        self.text_tokens = 0 if context is None else context.shape[1]
        # Wan's image-to-video models read the picture's features in another attention before the text
        self.text_index = 2 if getattr(family.network, "img_emb", None) is not None else 1
        self.seen: Counter[tuple[str, int]] = Counter()  # attentions of each block
        self.count = 0  # of attentions, where the blocks are not numbered

    def check_complete(self) -> None:
        """Refuse a call in which blocks were left out."""
        if self.architecture.is_numbered:
            missing = [site for site in self.sites if not self.seen[site[:2]]]
        else:
            missing = list(self.sites[self.count :])
        if missing:
            raise self.handler.skipped(missing)

    def place(self, options: dict) -> Site | None:
        """Which attention of which block is computed, where it is one of a block: the index of a cross-attention is 1
        or more. None for a refiner and the like.
        """
        if not self.architecture.is_numbered:
            self.count += 1
            if self.count > len(self.sites):
                raise self.handler.skipped(self.sites[-1:])
            return self.sites[self.count - 1]
        if "block_index" not in options:
            return None
        block = options.get("block_type", next(iter(self.architecture.blocks))), options["block_index"]
        site = Site(*block, self.seen[block])
        self.seen[block] += 1
        if site.index and self.architecture.text != APART:
            raise self.handler.skipped([site])
        return site

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, attend: Callable, options: dict
    ) -> Tensor:
        """Compute one attention of the network. q, k, v: [B, heads, tokens, d] or [B, tokens, heads x d]; V of SD3 is
        [B, tokens, heads, d].
        """
        place = self.place(options)
        handler, text = self.handler, self.architecture.text
        if place is None:
            return attend(q, k, v, mask)
        if text == APART and place.index:
            site = place._replace(index=0)
            if place.index == self.text_index and site in handler.measured_sites | handler.biased_sites:
                whole = slice(0, q.shape[-2]), slice(0, k.shape[-2])
                return _Attention(self, site, q, k, v, heads, mask, attend, options, *whole).of_text()
            return attend(q, k, v, mask)
        acting = (handler.self_attention_sites, handler.measured_sites, handler.biased_sites)
        if not any(place in sites for sites in acting):
            return attend(q, k, v, mask)
        if v.ndim > q.ndim:
            v = v.flatten(2)
        image, columns = self.rows(place, q, k, options)
        return _Attention(self, place, q, k, v, heads, mask, attend, options, image, columns).of_image()

    def rows(self, site: Site, q: Tensor, k: Tensor, options: dict) -> tuple[slice, slice | None]:
        """Which rows of an attention are the image's, and which columns the text's (None: none)."""
        alone = self.architecture.text == APART or site.index > 0
        references = sum(options.get("reference_image_num_tokens", ())) if self.architecture.has_references else 0
        others = q.shape[-2] - self.padded - references
        fits = others == 0 if alone else others >= self.text_tokens
        if not fits or q.shape[-2] != k.shape[-2] or len(q) != self.images:
            raise self.handler.wrong_tokens(site, tuple(q.shape), f"{self.images} images of {self.tokens} tokens")
        if alone or self.architecture.text == LAST:
            first, text = 0, self.padded
        else:
            first, text = others, 0
        return slice(first, first + self.tokens), None if alone else slice(text, text + self.text_tokens)


class _Attention:
    """One attention that the image takes part in. image: its rows, columns: those of the text, None where there are
    none. Rows stand in dimension -2 of q, k and v, whose layout is the model's; a handler sees [B, tokens, heads x d].
    """

    def __init__(
        self,
        call: _NetworkCall,
        site: Site,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None,
        attend: Callable,
        options: dict,
        image: slice,
        columns: slice | None,
    ) -> None:
        self.call, self.site, self.q, self.k, self.v, self.heads = call, site, q, k, v, heads
        self.mask, self.attend, self.uuids = _with_heads(mask), attend, options["uuids"]
        self.model_mask, self.image, self.columns = mask, image, columns

    # ------------------------------------------------------------ with what the handler wants

    def of_text(self) -> Tensor:
        """A cross-attention to the text, measured and biased."""
        biases = self.look()
        return self.plain(self.q, self.k, self.v, biases)

    def of_image(self) -> Tensor:
        """A self-attention or joint attention, composed, measured and biased."""
        handler, rows = self.call.handler, None
        if self.site in handler.self_attention_sites:
            packed = torch.cat([_joined(t[..., self.image, :]) for t in (self.q, self.k, self.v)], -1)
            found = SelfAttention(self.site, self.uuids, packed, self.call.grid, self.call.latent_size)
            rows = handler.self_attention(found)
        if rows is None:
            return self.plain(self.q, self.k, self.v, self.look())
        is_plain = rows.packed is None and rows.k.shape[1] == self.call.tokens
        own = rows if is_plain else rows.own
        q, k, v = (self.q, self.k, self.v) if own is None else self.with_image(own, rows.beside)
        return self.plain(q, k, v, self.look()) if is_plain else self.fed(q, k, v, rows, self.look())

    def look(self) -> TextBias | None:
        """Let the handler measure the attention to the text, and say what is added to its logits, of the image's tokens
        and the text's.
        """
        handler, site = self.call.handler, self.site
        if self.columns is None or site not in handler.measured_sites | handler.biased_sites:
            return None
        q, k = _joined(self.q[..., self.image, :]), _joined(self.k[..., self.columns, :])
        seen = TextAttention(
            site, self.uuids, q, k, self.heads, self.call.images, self.call.grid, self.call.latent_size
        )
        if site in handler.measured_sites:
            handler.text_attention(seen)
        return handler.bias(seen) if site in handler.biased_sites else None

    # ------------------------------------------------------------ one attention

    def plain(self, q: Tensor, k: Tensor, v: Tensor, found: TextBias | None) -> Tensor:
        """One attention of the usual shape, or one for each conditioning where some are biased: its mask is large."""
        if found is None:
            return self.attend(q, k, v, self.model_mask)
        count, done = len(found.acts), []
        for number, (bias, *part) in enumerate(zip(found.parts(), *(t.chunk(count) for t in (q, k, v)))):
            images = slice(number * len(part[0]), (number + 1) * len(part[0]))
            if bias is None:
                mask = self.model_mask if self.mask is None else self.mask[self.images_of(images)]
            else:
                mask = self.biased_mask(part[0], part[1].shape[-2], bias, images)
            done.append(self.attend(*part, mask))
        return torch.cat(done)

    def biased_mask(self, q: Tensor, keys: int, bias: Tensor, images: slice) -> Tensor:
        """The model's own mask with a bias on the image's rows and the text's columns, [B, 1, queries, keys]."""
        mask = _zeros(q, len(q), q.shape[-2], keys)
        if self.mask is not None:
            mask += _additive(self.mask[self.images_of(images)], mask)
        mask[:, :, self.image, self.columns] += bias
        return mask

    def images_of(self, images: slice) -> slice:
        """The rows of the model's mask for some images: it may be one for all."""
        return images if self.mask is not None and len(self.mask) > 1 else slice(None)

    # ------------------------------------------------------------ composed

    def with_image(self, rows: TargetRows | SelfAttentionRows, beside: int) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V with other rows for the image; the images beside the target's keep theirs."""
        done = []
        for t, part in zip((self.q, self.k, self.v), self.parts(rows)):
            t = t.clone()
            images = self.target_images(t, beside)
            images[..., self.image, :] = self.apart(part).unflatten(0, images.shape[:2])
            done.append(t)
        q, k, v = done
        return q, k, v

    @staticmethod
    def parts(rows: TargetRows | SelfAttentionRows) -> tuple[Tensor, Tensor, Tensor]:
        """Of packed rows for Q, K and V, what each is made of."""
        return rows.q.chunk(3, -1)[0], rows.k.chunk(3, -1)[1], rows.v.chunk(3, -1)[2]

    def apart(self, t: Tensor) -> Tensor:
        """[B, tokens, heads x d] in the model's own layout."""
        return t.unflatten(-1, (self.q.shape[1], -1)).transpose(1, 2) if self.q.ndim == 4 else t

    def target_images(self, t: Tensor, beside: int) -> Tensor:
        """The target's images of each conditioning, a view [conditionings, B, ...]."""
        images = t.unflatten(0, (len(self.uuids), -1))
        return images[:, : images.shape[1] - beside]

    def fed(self, q: Tensor, k: Tensor, v: Tensor, rows: SelfAttentionRows, found: TextBias | None) -> Tensor:
        """An attention in several terms, or whose image tokens have keys in another number than they are. q, k, v: with
        the image rows that the text attends to.
        """
        bias = self.joint_bias(found, q)
        if not rows.beside:
            return _Fed(self, q, k, v, self.mask, bias).attend(rows)
        images = torch.arange(len(q), device=q.device).unflatten(0, (len(self.uuids), -1))
        target, others = (part.flatten() for part in images.split([images.shape[1] - rows.beside, rows.beside], 1))

        def of(images: Tensor, t: Tensor | None) -> Tensor | None:
            return t if t is None or len(t) == 1 else t[images]

        fed = _Fed(self, q[target], k[target], v[target], of(target, self.mask), of(target, bias))
        done = fed.attend(rows)
        out = done.new_empty(len(q), *done.shape[1:])
        out[target] = done
        out[others] = self.attend(*(of(others, t) for t in (self.q, self.k, self.v, self.mask)))
        return out

    def joint_bias(self, found: TextBias | None, q: Tensor) -> Tensor | None:
        """The biases of all conditionings, [B, 1, rows, text tokens]: 0 for rows that are not the image's."""
        if found is None:
            return None
        assert self.columns is not None  # else there is no text to be biased towards
        done = q.new_zeros(len(q), 1, q.shape[-2], self.columns.stop - self.columns.start)
        done[:, :, self.image] = found.whole
        return done


class _Fed:
    """An attention whose image tokens are fed with keys of another number: for some images of the batch. mask: [1 or B,
    1 or heads, 1 or rows, rows], bias: [B, 1, rows, text tokens].
    """

    def __init__(
        self, whole: _Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> None:
        self.whole, self.q, self.k, self.v, self.mask, self.bias = whole, q, k, v, mask, bias
        self.first, self.last = whole.image.start, whole.image.stop
        self.rows = torch.arange(q.shape[-2], device=q.device)

    def attend(self, rows: SelfAttentionRows) -> Tensor:
        """[B, rows, heads x d]."""
        q, k, v = self.whole.parts(rows)
        attend, first = self.whole.attend, self.first
        if rows.packed is None:
            mask = self.mask_for(self.rows, k.shape[1], EVERY)
            return attend(self.around(self.q, q), self.around(self.k, k), self.around(self.v, v), mask)
        image = rows.packed.attend(q, k, v, self.of_term)
        others = torch.cat([self.rows[:first], self.rows[self.last :]])
        if not len(others):
            return image
        mask = self.mask_for(others, self.last - first, EVERY)
        done = attend(self.q[..., others, :], self.k, self.v, mask)
        return torch.cat([done[:, :first], image, done[:, first:]], 1)

    def of_term(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor | None, images: slice) -> Tensor:
        """One term: some tokens of the image attend to the rows that are not the image's, and to its own keys."""
        queries = self.rows[self.first : self.last]
        mask = self.mask_for(queries if tokens is None else queries[tokens], k.shape[1], images)
        keys, values = self.around(self.k[images], k), self.around(self.v[images], v)
        result = self.whole.attend(self.whole.apart(q), keys, values, mask)
        if result.shape != q.shape:
            raise self.whole.call.handler.wrong_result(self.whole.site, tuple(result.shape), tuple(q.shape))
        return result

    def around(self, whole: Tensor, own: Tensor) -> Tensor:
        """Rows [B, any, heads x d] in the place of the image's, between the others."""
        return torch.cat([whole[..., : self.first, :], self.whole.apart(own), whole[..., self.last :, :]], -2)

    def mask_for(self, queries: Tensor, keys: int, images: slice) -> Tensor | None:
        """The mask for some rows, with `keys` in the place of the image's, none of which is masked."""
        parts = [t if t is None or len(t) == 1 else t[images] for t in (self.mask, self.bias)]
        mask, bias = (t if t is None or t.shape[2] == 1 else t[:, :, queries] for t in parts)
        if mask is None and bias is None:
            return None
        batch = max(len(t) for t in (mask, bias) if t is not None)
        total = self.k.shape[-2] - (self.last - self.first) + keys
        done = _zeros(self.q, batch, len(queries), total, heads=1 if mask is None else mask.shape[1])
        if mask is not None:
            added = _additive(mask, done)
            done[..., : self.first] += added[..., : self.first]
            done[..., self.first + keys :] += added[..., self.last :]
        if bias is not None:
            columns = self.whole.columns
            assert columns is not None
            moved = 0 if columns.stop <= self.first else keys - (self.last - self.first)
            done[..., columns.start + moved : columns.stop + moved] += bias
        return done


def _joined(t: Tensor) -> Tensor:
    """[B, tokens, heads x d] of either layout."""
    return t if t.ndim == 3 else t.transpose(1, 2).flatten(2)


def _with_heads(mask: Tensor | None) -> Tensor | None:
    """A mask as ComfyUI's attentions read it, [1 or B, 1 or heads, 1 or queries, keys]."""
    if mask is None or mask.ndim == 4:
        return mask
    return mask[None, None] if mask.ndim == 2 else mask[:, None]


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask.to(like)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(~mask, torch.finfo(like.dtype).min)


def _zeros(like: Tensor, batch: int, queries: int, keys: int, heads: int = 1) -> Tensor:
    """A mask of nothing; attention kernels copy masks whose rows are not aligned."""
    return like.new_zeros(batch, heads, queries, keys + -keys % 16)[..., :keys]
