"""Generative Photomontage (arXiv 2408.07116): one image sampled with the self-attention composed of several."""

from collections.abc import Sequence

import torch

from ..kernels import labels
from ..patching.recipe import Recipe, RunContext, Start, begin_on
from ..patching.refusals import check_size
from ..patching.schedule import Window
from ..patching.streams import Stream
from ..patching.terms import AttentionTerm, TargetRows

Tensor = torch.Tensor


class CompositeAttention(Recipe):
    """Self-attention of the composite (paper, section 3.3): Q, K and V of a token come from the image that owns it.

    Composed as rows of what Q, K and V are made of, row by row. Base tokens take K and V from the recorded base
    run, and Q from the running model (Q^model) or the recorded run as well.
    """

    node = "Composite Attention Inject"

    def __init__(self, window: Window, stack: Sequence[Stream], owner: Tensor, base: int, base_q: str, kv: str) -> None:
        """stack: every image's Stream. owner: [H, W] int64 label map. base_q: "model" or "stored". kv: "composite", or
        for the paper's ablations "concat" (of all images) or "model" (the running one's).
        """
        super().__init__(window)
        self.longer_keys = kv == "concat"
        self.owner, self.base, self.base_q, self.kv = owner, base, base_q, kv
        self.base_stream = stack[base]
        self.read = [image for image in range(len(stack)) if self.reads(image)]
        self.streams = tuple(stack[image] for image in self.read)
        self.rows_of: dict[tuple, Tensor] = {}

    def reads(self, image: int) -> bool:
        if self.kv == "concat":
            return True
        needed = image != self.base or self.base_q == "stored" or self.kv == "composite"
        return needed and bool((self.owner == image).any())

    def rows(self, image: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The tokens that an image owns at a level."""
        key = image, grid, device
        if key not in self.rows_of:
            self.rows_of[key] = (labels.at_grid(self.owner, grid).flatten() == image).nonzero()[:, 0].to(device)
        return self.rows_of[key]

    def select(self, number: int, n: Tensor, grid: tuple[int, int]) -> Tensor:
        return n.clone() if self.kv == "concat" else n[:, self.rows(self.read[number], grid, n.device)]

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        n = target.q
        q, stored_base = n.clone(), None
        for image, source in zip(self.read, sources):
            rows = self.rows(image, grid, n.device)
            own = source[:, rows] if self.kv == "concat" else source
            if image == self.base and self.base_q == "model":
                stored_base = rows, own
            else:
                q[:, rows] = own
        if self.kv == "model":
            return [AttentionTerm(q, target.k, target.v)]
        if self.kv == "concat":
            keys = torch.cat(sources, 1).expand(n.shape[0], -1, -1)
        elif stored_base:
            keys = q.clone()
            keys[:, stored_base[0]] = stored_base[1]
        else:
            keys = q
        return [AttentionTerm(q, keys, keys)]

    def check(self, context: RunContext) -> None:
        check_size(self, self.base_stream.run, context.size)  # the start is its, also where its features are not read

    def start(self, context: RunContext, start: Start) -> Start:
        """Begin where the base image was: a composite of base tokens alone is the base image."""
        return Start(*begin_on(self.base_stream, self, context, start), start.sigmas)
