"""MCA-Ctrl (arXiv 2505.01428): a subject of one picture in a region of another, by self-attention over their masked
tokens.
"""

from typing import NamedTuple

import torch

from ..kernels import grid_masks
from ..patching.recipe import Recipe, RunContext, Start, begin_on
from ..patching.schedule import Window
from ..patching.streams import Stream
from ..patching.terms import AttentionTerm, TargetRows
from ..patching.transfers import at_hand
from .position_shift import Shift, centre, moved_queries

Tensor = torch.Tensor

LATE = "u2-"  # the paper's layers 9 to 15: the decoder from its last block at a quarter of the latent on


class Preset(NamedTuple):
    """Parts of the schedule (start, end) in which SAGI and SALQ act, and the blocks of SALQ; SAGI acts in all."""

    sagi: tuple[float, float]
    salq: tuple[float, float]
    salq_sites: str


PRESETS = {
    "notebook edit": Preset((0.0, 0.1), (0.1, 1.0), LATE),
    "notebook generation": Preset((0.02, 0.1), (0.1, 1.0), "all"),
    "paper swap": Preset((0.0, 0.4), (0.4, 0.96), LATE),
    "paper generation": Preset((0.0, 0.7), (0.7, 0.96), "d1-,m,u"),
}
CUSTOM = "custom"
FORWARD, REVERSE = "SAGI first", "SALQ first"


# ---------------------------------------------------------------- where the subject goes


class Parts(NamedTuple):
    """The tokens of a level that the subject feeds (front) and that the condition feeds (back), int64; where the area's
    centre is, [1 or B, 2] in main memory; how much of their results counts, [B, tokens, 1], and which of the back
    tokens each image may attend to, int64 for each of them. None: all.
    """

    front: torch.Tensor
    back: torch.Tensor
    centre: torch.Tensor
    front_weight: torch.Tensor | None = None
    back_weight: torch.Tensor | None = None
    allowed: list[torch.Tensor] | None = None


class MaskArea:
    """The edited area M_C, given as a mask."""

    def __init__(self, mask: Tensor) -> None:
        """mask: [H, W] bool, True where the subject goes."""
        self.mask = mask
        self.found: dict[tuple, Parts] = {}

    def parts(self, context: RunContext, grid: tuple[int, int], like: Tensor) -> Parts:
        return self.known_parts(grid, like.device)

    def known_parts(self, grid: tuple[int, int], device: torch.device) -> Parts:
        key = grid, device
        if key not in self.found:
            area = grid_masks.cells(self.mask, grid)
            front, back = (part.flatten().nonzero()[:, 0].to(device) for part in (area, ~area))
            self.found[key] = Parts(front, back, centre(area[None]))
        return self.found[key]


class WordsArea:
    """The edited area M_C, from where the target looks for words while it samples (section 3.3): the map so far of
    the last Token Attention Map on the MODEL, in each image for itself.
    """

    def __init__(self, share: float, soft: bool) -> None:
        """share: of the tokens, that belong to the subject. soft: whether the others do in part."""
        self.share, self.soft = share, soft
        self.maps: Tensor | None = None
        self.found: dict[tuple[int, int], Parts] = {}

    def parts(self, context: RunContext, grid: tuple[int, int], like: Tensor) -> Parts | None:
        """None in the first step, before there is a map."""
        maps = context.attention_map
        if maps is not self.maps:
            self.maps, self.found = maps, {}
        if maps is not None and grid not in self.found:
            share = grid_masks.strongest(maps, grid, self.share, self.soft)
            self.found[grid] = self.parts_of(share.flatten(1), centre(share >= 1), like)
        return self.found.get(grid)

    def known_parts(self, grid: tuple[int, int], device: torch.device) -> None:
        """Nothing is known before the target is there."""

    @staticmethod
    def parts_of(share: Tensor, middle: Tensor, like: Tensor) -> Parts:
        """share: of the subject, [B, tokens] in [0, 1]. middle: where it is, [B, 2]. Both in main memory, where what
        depends on values makes nobody wait. like: a tensor of the device and of the weights' type.
        """
        front, back = (part.any(0).nonzero()[:, 0] for part in (share > 0, share < 1))
        allowed = share[:, back] < 1
        # of an image that is all subject: its weight is 0, but there must be a key
        allowed |= ~allowed.any(1, keepdim=True)
        keys = None if allowed.all() else [own.nonzero()[:, 0] for own in allowed]

        def there(part: Tensor) -> Tensor:
            return part.to(like.device, non_blocking=True)

        of_front, of_back = (there(part.to(like.dtype)) for part in (share[:, front, None], 1 - share[:, back, None]))
        return Parts(there(front), there(back), middle, of_front, of_back, keys and [there(own) for own in keys])


# ---------------------------------------------------------------- the recipes


class MaskedAttention(Recipe):
    """Self-attention of the target: in the edited area over the subject's tokens, elsewhere over the condition's.

    Equations 6, 7, 10 and 11, as the released code reads them (7 and 11 are misprinted): M_C F_subject + (1 - M_C)
    F_condition, where F_subject attends to the tokens in M_S and F_condition to those outside M_C. Both by gathered
    queries and keys. target_asks: whether the queries are the target's; else they are those of subject and condition.
    """

    node = "Collaborative Attention"
    several_terms = True
    target_asks = True

    def __init__(
        self,
        window: Window,
        subject: Stream,
        condition: Stream | None,
        subject_mask: Tensor,
        area: MaskArea | WordsArea,
        fresh: Tensor | None = None,
        shift: Shift | None = None,
        exact: bool = False,
    ) -> None:
        """subject, condition: Streams, the condition None where the target is its own. subject_mask: M_S, [H, W] bool.
        area: MaskArea or WordsArea. fresh: where the target begins with noise of its own, [H, W] bool (None: nowhere).
        shift: of the subject onto the area (None: it stays where it is).
        """
        super().__init__(window, exact)
        self.condition, self.subject_mask, self.area, self.fresh = condition, subject_mask, area, fresh
        self.streams = (subject, condition) if condition else (subject,)
        self.shift = shift
        self.subjects: dict[tuple, tuple[Tensor, Tensor]] = {}
        self.asking: dict[tuple, Tensor] = {}

    def start(self, context: RunContext, start: Start) -> Start:
        """Begin where the condition began: z_T of the target is the condition's."""
        if not self.condition:
            return start
        own, latent_image = begin_on(self.condition, self, context, start)
        if self.fresh is not None:
            own = torch.where(grid_masks.cells(self.fresh, context.size).to(own.device), start.noise, own)
        return Start(own, latent_image, start.sigmas)

    def subject_on(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The subject's tokens in its own image, int64 [n], and their centre, [1, 2]."""
        key = grid, device
        if key not in self.subjects:
            found = grid_masks.cells(self.subject_mask, grid)
            self.subjects[key] = found.flatten().nonzero()[:, 0].to(device), centre(found[None])
        return self.subjects[key]

    def select(self, number: int, n: Tensor, grid: tuple[int, int]) -> Tensor:
        rows = self.rows_held(number, grid, n.device)
        return n.clone() if rows is None else n.index_select(2, rows)

    def rows_held(self, number: int, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """The tokens of a stream that are held until the target is there, int64: of the subject those in M_S, of the
        condition those outside M_C. None: all, where that is not known yet.
        """
        if number == 0:
            return self.subject_on(grid, device)[0]
        parts = self.area.known_parts(grid, device)
        return parts and parts.back

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        n = target.q
        parts = self.area.parts(context, grid, n)
        if parts is None:
            return [AttentionTerm(*target)]
        terms = []
        if len(parts.front):
            middle = self.subject_on(grid, n.device)[1]
            shifts = None if self.shift is None else self.shift.tokens(middle, parts.centre, grid)
            queries, keys = self.front(context, n, sources[0], parts, shifts, grid)
            terms.append(AttentionTerm(queries, keys, keys, parts.front, parts.front_weight))
        if len(parts.back):
            keys = sources[1] if self.condition else n
            if keys.shape[2] != len(parts.back):
                keys = keys.index_select(2, parts.back)
            queries = n.index_select(2, parts.back) if self.target_asks and self.condition else keys
            terms.append(AttentionTerm(queries, keys, keys, parts.back, parts.back_weight, parts.allowed))
        return terms

    def front(
        self,
        context: RunContext,
        n: Tensor,
        subject: Tensor,
        parts: Parts,
        shifts: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """(queries, keys) in the edited area. n: the target's rows. subject: those that were held. shifts: of the
        subject, (down, right) in tokens, [1 or B, 2].
        """
        raise NotImplementedError


class SAGI(MaskedAttention):
    """Self-attention global injection: the attention outputs of subject and condition themselves (section 3.3,
    equations 5 to 7). A shift takes the subject's from where it stands in its own image.
    """

    target_asks = False

    def rows_held(self, number: int, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Of the subject also those in M_C, which ask: before the others, or all where those that ask are not known
        yet or stand elsewhere.
        """
        parts = self.area.known_parts(grid, device)
        if number:
            return parts and parts.back
        if parts is None or self.shift is not None:
            return None
        key = grid, device
        if key not in self.asking:
            self.asking[key] = torch.cat([parts.front, self.subject_on(grid, device)[0]])
        return self.asking[key]

    def front(
        self,
        context: RunContext,
        n: Tensor,
        subject: Tensor,
        parts: Parts,
        shifts: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        if self.rows_held(0, grid, n.device) is not None:
            return subject[:, :, : len(parts.front)], subject[:, :, len(parts.front) :]
        keys = subject.index_select(2, self.subject_on(grid, n.device)[0])
        if shifts is None:
            return subject.index_select(2, parts.front), keys
        return torch.stack([moved_queries(rows, parts.front, shifts, grid) for rows in subject]), keys


class SALQ(MaskedAttention):
    """Self-attention local query: the target asks, subject and condition answer (section 3.3, equations 8 to 11). A
    shift turns the subject's keys.
    """

    def front(
        self,
        context: RunContext,
        n: Tensor,
        subject: Tensor,
        parts: Parts,
        shifts: Tensor | None,
        grid: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        if shifts is not None:
            subject = torch.stack([context.family.moved(rows, shifts) for rows in subject])
        return n.index_select(2, parts.front), subject


class BackgroundLock(Recipe):
    """Holds the latent outside the edited area on the condition's trajectory, and leaves the condition's own latent
    there in the end (the released code's LocalBlend, which is one step too noisy).
    """

    node = MaskedAttention.node

    def __init__(self, condition: Stream, mask: Tensor) -> None:
        """mask: M_C, [H, W] bool."""
        super().__init__(Window(0.0, 1.0, ()))
        self.condition, self.mask = condition, mask
        self.streams = (condition,)
        self.inside: dict[tuple, Tensor] = {}
        self.end: Tensor | None = None  # the condition's result, as `denoised` has it

    def locked(self, x: Tensor, kept: Tensor) -> Tensor:
        """x [B, C, h, w] with the kept latent [1, C, h, w] outside the edited area."""
        key = x.shape[-2:], x.device
        if key not in self.inside:
            self.inside[key] = grid_masks.cells(self.mask, x.shape[-2:]).to(x.device)
        return torch.where(self.inside[key], x, at_hand(kept, x))

    def final(self, context: RunContext) -> Tensor:
        """The condition's latent where the run at hand ends: its result, or on the way there."""
        run, row = self.condition
        sigma = context.sigmas[-1]
        if sigma == 0 and run.sigmas[-1] == 0:
            return run.final[row : row + 1]
        return context.to_latent_scale(context.latent_that_continues(self, self.condition, sigma))

    def check(self, context: RunContext) -> None:
        self.final(context)

    def latent(self, context: RunContext, x: Tensor) -> Tensor:
        return self.locked(x, context.latent_here(self, self.condition))

    def denoised(self, context: RunContext, denoised: Tensor) -> Tensor:
        if self.end is None:
            run, row = self.condition
            self.end = at_hand(context.to_model_scale(run.final[row : row + 1]), denoised)
        return self.locked(denoised, self.end)

    def output(self, context: RunContext, output: Tensor) -> Tensor:
        return self.locked(output, self.final(context))
