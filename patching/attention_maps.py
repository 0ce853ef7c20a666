"""Where a model looks for words: the attention maps of a sampling run, while it samples and after it.

A TokenMap says what to measure; a LiveAttentionMap measures it, for one run, and changes nothing. Only the
conditionings that carry the map's prompt are measured (`marked`), each image of a batch by itself.
"""

import functools
from typing import Any, NamedTuple

import torch

from .models import Site, TextAttention

MARK = "montage_prompt"  # where a CONDITIONING says which text it was made of


class TokenMap(NamedTuple):
    """What to measure. words: the map's name. prompt: whose conditionings are measured. tokens: positions of the words
    on the token axis of that conditioning. sites: the attentions to look at.
    """

    words: str
    prompt: str
    tokens: tuple[int, ...]
    sites: tuple[Site, ...]


def marked(conditioning: list, prompt: str) -> list:
    """The CONDITIONING that a prompt was encoded to, saying so."""
    return [[embedding, {**settings, MARK: prompt}] for embedding, settings in conditioning]


class LiveAttentionMap:
    """A TokenMap in one run: the mean over heads, over the sites and over the steps so far (MCA-Ctrl and MasaCtrl take
    1/4 of the latent, Layout-and-Retouch says "decoder"), min-max normalised for each image.

    before: what recipes read while the model is evaluated, the map of the evaluations before this one (None in the
    first). What this one has found so far depends on which CFG half ComfyUI evaluates first, or whether both at once.
    """

    def __init__(self, wanted: TokenMap, conds: dict[str, list[dict]]) -> None:
        """conds: a guider's, {role: [conditioning]}."""
        self.wanted = wanted
        self.lengths: dict[Any, int] = {
            cond["uuid"]: cond["cross_attn"].shape[1]
            for group in conds.values()
            for cond in group
            if cond.get(MARK) == wanted.prompt
        }
        self.sums: dict[tuple[int, int], torch.Tensor] = {}  # grid -> sum of maps [B, h, w]
        self.count = 0
        self.before: torch.Tensor | None = None
        if not self.lengths:
            raise ValueError(
                f'Token Attention Map: this sampler has no conditioning of the prompt "{wanted.prompt}". Connect the'
                " CONDITIONING of Token Attention Map to the sampler's positive, through a ControlNet if there is one."
            )

    def begin_evaluation(self) -> None:
        self.before = self.read()

    def look(self, attention: TextAttention, length: int) -> None:
        """Count one attention in, if it is of the map's sites. attention: of one conditioning that is measured.
        length: rows of one copy of its text.
        """
        if attention.site in self.wanted.sites:
            self.add(probability(attention.q, attention.k, attention.heads, self.wanted.tokens, length), attention.grid)

    def add(self, found: torch.Tensor, grid: tuple[int, int]) -> None:
        """Count one site in. found: [B, tokens]."""
        found = found.unflatten(1, grid)
        self.sums[grid] = self.sums[grid] + found if grid in self.sums else found
        self.count += 1

    def read(self) -> torch.Tensor | None:
        """The map so far, [B, h, w] in [0, 1] at the finest grid that was measured; None before the first site. A flat
        map is 0.
        """
        if not self.sums:
            return None
        finest = max(self.sums)
        maps = (resized(found, finest) for found in self.sums.values())
        total = functools.reduce(torch.add, maps) / self.count
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        return (total - low) / torch.where(high > low, high - low, 1)


def probability(q: torch.Tensor, k: torch.Tensor, heads: int, tokens: tuple[int, ...], length: int) -> torch.Tensor:
    """Softmax probability that an attention gives to some text tokens together, mean over heads: [B, queries].

    q: [B, queries, heads x d], k: [B, text tokens, heads x d]. tokens: positions on a text axis of `length`, which
    ComfyUI may have repeated to batch prompts of different lengths: the copies count together.
    """
    q, k = (part.unflatten(2, (heads, -1)).transpose(1, 2).float() for part in (q, k))
    copies = [token + start for start in range(0, k.shape[2], length) for token in tokens]
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return (logits[..., copies].logsumexp(3) - logits.logsumexp(3)).exp().mean(1)


def resized(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Maps [B, h, w] at another grid, bilinear."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    return torch.nn.functional.interpolate(maps[:, None], size=tuple(grid), mode="bilinear")[:, 0]
