"""Generative Photomontage (arXiv 2408.07116): one image sampled with the self-attention composed of several."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels import labels
from ..patching.recipe import Recipe, RunContext, Start, begin_on
from ..patching.refusals import check_size
from ..patching.schedule import Window
from ..patching.streams import Stream
from ..patching.terms import AttentionTerm, TargetRows

Tensor = torch.Tensor


class Level(NamedTuple):
    """Whose the tokens of a level are. image: among those that are read, int64 [tokens] (0 where it is none of them).
    token: of every token its number, int64. rows: the tokens that each image owns, int64. order: where each token
    stands among those rows, one image's after the other's, int64 [tokens]. asks: the tokens whose Q is the running
    model's, bool [tokens, 1]; None: none. owned: whether any token is an image's that is read.
    """

    image: torch.Tensor
    token: torch.Tensor
    rows: list[torch.Tensor]
    order: torch.Tensor
    asks: torch.Tensor | None
    owned: bool


class CompositeAttention(Recipe):
    """Self-attention of the composite (paper, section 3.3): Q, K and V of a token come from the image that owns it.

    Composed as rows of what Q, K and V are made of, row by row. Base tokens take K and V from the recorded base
    run, and Q from the running model (Q^model) or the recorded run as well.
    """

    node = "Composite Attention Inject"

    def __init__(
        self,
        window: Window,
        stack: Sequence[Stream],
        owner: Tensor,
        base: int,
        base_q: str,
        kv: str,
        exact: bool = False,
    ) -> None:
        """stack: every image's Stream. owner: [H, W] int64 label map. base_q: "model" or "stored". kv: "composite", or
        for the paper's ablations "concat" (of all images) or "model" (the running one's).
        """
        super().__init__(window, exact)
        self.longer_keys = kv == "concat"
        self.owner, self.base, self.base_q, self.kv = owner, base, base_q, kv
        self.base_stream = stack[base]
        self.read = [image for image in range(len(stack)) if self.reads(image)]
        self.streams = tuple(stack[image] for image in self.read)
        self.merges = kv != "concat"
        self.levels: dict[tuple, Level] = {}

    def reads(self, image: int) -> bool:
        if self.kv == "concat":
            return True
        needed = image != self.base or self.base_q == "stored" or self.kv == "composite"
        return needed and bool((self.owner == image).any())

    def level(self, grid: tuple[int, int], device: torch.device) -> Level:
        """Made once for each level and device."""
        key = grid, device
        if key not in self.levels:
            owner = labels.at_grid(self.owner, grid).flatten()
            rows = [(owner == image).nonzero()[:, 0] for image in self.read]
            every = torch.cat(rows) if rows else owner[:0]
            image, order = torch.zeros_like(owner), torch.zeros_like(owner)
            for number, own in enumerate(rows):
                image[own] = number
            order[every] = torch.arange(len(every))
            everywhere = image, torch.arange(len(owner)), *rows, order
            image, token, *rows, order = (part.to(device) for part in everywhere)
            asks = (owner == self.base)[:, None] if self.base_q == "model" else None
            if asks is not None:
                asks = asks.to(device) if asks.any() else None
            self.levels[key] = Level(image, token, rows, order, asks, bool(len(every)))
        return self.levels[key]

    def select(self, number: int, n: Tensor, grid: tuple[int, int]) -> Tensor:
        return n.clone() if self.kv == "concat" else n.index_select(2, self.level(grid, n.device).rows[number])

    def merge(self, selected: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        return selected if self.kv == "concat" else self.owned(selected, grid)

    def owned(self, rows: list[Tensor], grid: tuple[int, int]) -> list[Tensor]:
        """One image's worth of rows, each token's from the image that owns it; nothing where no image that is read owns
        any. rows: those that each image owns.
        """
        if not rows or not self.level(grid, rows[0].device).owned:
            return []
        return [torch.cat(rows, 2).index_select(2, self.level(grid, rows[0].device).order)]

    def select_all(self, n: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        level = self.level(grid, n.device)
        if self.kv == "concat" or not level.owned:
            return super().select_all(n, grid)
        return [n[:, level.image, level.token][:, None]]

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        n = target.q
        level, composed = self.level(grid, n.device), sources
        if self.kv == "concat":
            composed = self.owned([n.index_select(2, own) for n, own in zip(sources, level.rows)], grid)
        if not composed:
            q = n
        elif level.asks is None:
            q = composed[0]
        else:
            q = torch.where(level.asks, n, composed[0])
        if self.kv == "model" or not sources:
            return [AttentionTerm(q, target.k, target.v)]
        keys = sources[0] if len(sources) == 1 else torch.cat(sources, 2)
        return [AttentionTerm(q, keys, keys)]

    def check(self, context: RunContext) -> None:
        check_size(self, self.base_stream.run, context.size)  # the start is its, also where its features are not read

    def start(self, context: RunContext, start: Start) -> Start:
        """Begin where the base image was: a composite of base tokens alone is the base image."""
        return Start(*begin_on(self.base_stream, self, context, start), start.sigmas)
