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

    Recipes read the map of the evaluations before the one that is being made: what that has found so far depends on
    which CFG half ComfyUI evaluates first, or whether both at once.
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
        self.new: dict[tuple[int, int], list[torch.Tensor]] = {}  # grid -> what is not yet in it, [B, heads, tokens]
        self.indicators: dict[tuple, torch.Tensor] = {}
        self.count = 0
        self.earlier: tuple[dict[tuple[int, int], torch.Tensor], int] = {}, 0  # sums and count before this evaluation
        self.known: torch.Tensor | None = None  # `before`, once it was asked for
        if not self.lengths:
            raise ValueError(
                f'Token Attention Map: this sampler has no conditioning of the prompt "{wanted.prompt}". Connect the'
                " CONDITIONING of Token Attention Map to the sampler's positive, through a ControlNet if there is one."
            )

    def look(self, attention: TextAttention, length: int) -> None:
        """Count one attention in, if it is of the map's sites. attention: of one conditioning that is measured.
        length: rows of one copy of its text.
        """
        if attention.site not in self.wanted.sites:
            return
        q, k, heads = attention.q, attention.k, attention.heads
        key = heads, k.shape[1], length, k.device, k.dtype
        if key not in self.indicators:
            self.indicators[key] = indicator(k, heads, self.wanted.tokens, length)
        self.add(shares(q, k, heads, self.indicators[key]), attention.grid)

    def add(self, found: torch.Tensor, grid: tuple[int, int]) -> None:
        """Count one site in. found: [B, heads, tokens], to be summed over heads."""
        self.new.setdefault(grid, []).append(found)
        self.count += 1

    def sum_up(self) -> None:
        """Sum what was counted in: all at once, since every operation is a launch on a GPU."""
        for grid, found in self.new.items():
            total = torch.cat(found, 1).sum(1, dtype=torch.float32).view(-1, *grid)
            self.sums[grid] = self.sums[grid] + total if grid in self.sums else total
        self.new = {}

    def begin_evaluation(self) -> None:
        self.sum_up()
        self.earlier, self.known = ({**self.sums}, self.count), None

    def before(self) -> torch.Tensor | None:
        """The map of the evaluations before this one, [B, h, w] in [0, 1] in main memory, for which a GPU is waited
        for, once an evaluation; None in the first.
        """
        if self.known is None:
            found = mean(*self.earlier)
            self.known = found if found is None else found.cpu()
        return self.known

    def read(self) -> torch.Tensor | None:
        """The map so far, on the model's device; None before the first site."""
        self.sum_up()
        return mean(self.sums, self.count)


def mean(sums: dict[tuple[int, int], torch.Tensor], count: int) -> torch.Tensor | None:
    """The mean of maps, min-max normalised: [B, h, w] in [0, 1] at the finest of their grids; None of none. A flat map
    is 0. sums: grid -> sum of maps [B, h, w]. count: of all of them.
    """
    if not sums:
        return None
    finest = max(sums)
    total = functools.reduce(torch.add, (resized(found, finest) for found in sums.values())) / count
    low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
    return (total - low) / torch.where(high > low, high - low, 1)


def indicator(k: torch.Tensor, heads: int, tokens: tuple[int, ...], length: int) -> torch.Tensor:
    """1 / heads at some text tokens and 0 elsewhere, [1, 1, text tokens, 1] like k [B, text tokens, heads x d]. tokens:
    positions on a text axis of `length`, which ComfyUI may have repeated to batch prompts of different lengths: the
    copies count together.
    """
    found = k.new_zeros(1, 1, k.shape[1], 1)
    found[:, :, [token + start for start in range(0, k.shape[1], length) for token in tokens]] = 1 / heads
    return found


def shares(q: torch.Tensor, k: torch.Tensor, heads: int, wanted: torch.Tensor) -> torch.Tensor:
    """Softmax probability that an attention gives to the text tokens of an indicator together, divided by the number of
    heads: [B, heads, queries]. The attention itself, with the indicator in the place of V.

    q: [B, queries, heads x d], k: [B, text tokens, heads x d].
    """
    q, k = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k))
    v = wanted.expand(len(q), heads, -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)[..., 0]


def resized(maps: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Maps [B, h, w] at another grid, bilinear."""
    if tuple(maps.shape[1:]) == tuple(grid):
        return maps
    return torch.nn.functional.interpolate(maps[:, None], size=tuple(grid), mode="bilinear")[:, 0]
