"""Layout-and-Retouch (arXiv 2407.09779), stage two: a layout sampled again, with the subject's look fed from a photo
and the surroundings from the layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..kernels import adaptive_mask as kernel
from ..patching.recipe import Recipe, RunContext, Start, begin_on, first_step
from ..patching.schedule import Window, levels, position
from ..patching.streams import Stream
from ..patching.terms import AttentionTerm, TargetRows
from ..patching.transfers import at_hand
from .position_shift import Shift, centre

Tensor = torch.Tensor


class LiveMask(NamedTuple):
    """An adaptive mask whose attention map is that of the run which reads it. The fields are kernel.adaptive's."""

    segment: torch.Tensor | None
    threshold: float
    min_area: float
    mode: str


class FromLayout(Recipe):
    """Where the target begins: on the layout's trajectory, after the steps in which it takes all of Q, K and V from the
    layout. With one starting latent such a target is the layout, whatever its prompt, so that these steps need no
    computing.

    layouts: streams, one for all images or one for each. end: of those steps, 0 to 1. last: where the node's other
    recipes end; with both 0 it does nothing.
    """

    node = "Multi Source Swap"
    same_weights = False  # the layout and the photo may be of the plain model

    def __init__(self, layouts: list[Stream], end: float, last: float) -> None:
        super().__init__(Window(0.0, max(end, last), ()))
        self.layouts, self.end = layouts, end

    @property
    def followed(self) -> Sequence[Stream]:
        return self.layouts

    def check(self, context: RunContext) -> None:
        for run in dict.fromkeys(stream.run for stream in self.layouts):
            first = first_step(run) / (len(run.sigmas) - 1)
            begun = [position(sigma, run.sigmas) for sigma in context.sigmas[:-1]]
            if any(self.end <= step < first for step in begun):
                raise ValueError(
                    f"{self.node}: another model made the layout up to {first:g} of its schedule, so that it can be"
                    f" changed only after that. Set layout_end to {first:g} or more."
                )

    def start(self, context: RunContext, start: Start) -> Start:
        noise, latent_image, sigmas = start
        run, images = self.layouts[0].run, len(noise)
        if len(self.layouts) not in (1, images):
            raise ValueError(
                f"{self.node}: {len(self.layouts)} layouts for a batch of {images}. Sample the LATENT that the node"
                " gives."
            )
        streams = self.layouts * (images // len(self.layouts))
        schedule = levels(sigmas)
        skipped = sum(position(sigma, run.sigmas) < self.end for sigma in schedule[:-1])
        sigmas = sigmas[skipped:]
        if len(sigmas) == 1:
            return Start(noise, torch.stack([run.final[row] for run, row in streams]).to(latent_image), sigmas)
        begun = [
            begin_on(stream, self, context, Start(noise[i : i + 1], latent_image[i : i + 1], sigmas), schedule[skipped])
            for i, stream in enumerate(streams)
        ]
        noises, latents = zip(*begun)
        return Start(torch.cat(noises), torch.cat(latents), sigmas)


def of_images(sources: Sequence[Tensor]) -> Tensor:
    """The rows of one stream for all images, or of one for each: [conditionings, 1 or B, tokens, C]."""
    return sources[0] if len(sources) == 1 else torch.cat(list(sources), 1)


class Share(NamedTuple):
    """How much an attention counts. rows: the tokens where it does, int64 (None: all). weight: [1 or B, tokens, 1]
    (None: 1).
    """

    rows: torch.Tensor | None
    weight: torch.Tensor | None


NOTHING = Share(torch.zeros(0, dtype=torch.int64), None)


def share_of(weight: Tensor, like: Tensor) -> Share:
    """weight: of every token, [1 or B, tokens, 1] in main memory."""
    rows = weight.amax(0).flatten().nonzero()[:, 0]
    if not len(rows):
        return NOTHING
    counted = weight[:, rows]
    return Share(
        None if len(rows) == weight.shape[1] else rows.to(like.device, non_blocking=True),
        None if (counted == 1).all() else at_hand(counted, like),
    )


class ObjectMask:
    """M: where the object is in the layout. mask: [1 or B, H, W] in [0, 1], or a LiveMask. What depends on its values
    is found in main memory, where a live one's map is too.
    """

    def __init__(self, mask: Tensor | LiveMask) -> None:
        self.mask = mask
        self.made: tuple[Tensor | None, Tensor] | None = None  # (map, M) of a live mask
        self.levels: dict[tuple, list[Share]] = {}  # of the mask as it is now
        self.centres: dict[tuple[int, int], Tensor] = {}  # the same

    def check(self, node: str, context: RunContext) -> None:
        if isinstance(self.mask, LiveMask) and not context.measures_words:
            raise ValueError(
                f"{node}: a running mask needs Token Attention Map on the MODEL, with the words to look for. Put"
                " it there, or connect the MASK of Adaptive Mask Blend."
            )

    def current(self, context: RunContext) -> Tensor:
        """M, [1 or B, H, W]; a live one is made once for each map."""
        if not isinstance(self.mask, LiveMask):
            return self.mask
        found = context.attention_map
        if self.made is None or self.made[0] is not found:
            known = torch.zeros(1, *context.size) if found is None else found
            self.made = found, kernel.adaptive(known, self.mask.segment, context.size, *self.mask[1:]).mask
            self.levels, self.centres = {}, {}
        return self.made[1]

    def centre(self, context: RunContext, grid: tuple[int, int]) -> Tensor:
        """Where M lies, in tokens, [1 or B, 2]."""
        mask = self.current(context)
        if grid not in self.centres:
            self.centres[grid] = centre(kernel.at_size(mask, grid))
        return self.centres[grid]

    def shares(self, context: RunContext, grid: tuple[int, int], like: Tensor) -> list[Share]:
        """What M and 1 - M are at a level, in the type and on the device of a tensor."""
        mask, key = self.current(context), (grid, like.device, like.dtype)
        if key not in self.levels:
            weight = kernel.at_size(mask, grid).flatten(1)[..., None]
            self.levels[key] = [share_of(weight, like), share_of(1 - weight, like)]
        return self.levels[key]


class Place:
    """Where the reference's keys are to be. shift: of the subject onto the object. subject: its mask in the reference,
    [1 or B, H, W] in [0, 1]. inside: the object's in the layout. None: unknown, needed only where they are to be
    found.
    """

    def __init__(self, shift: Shift, subject: Tensor | None = None, inside: ObjectMask | None = None) -> None:
        self.shift, self.subject, self.inside = shift, subject, inside
        self.centres: dict[tuple[int, int], Tensor] = {}  # of the subject

    def moved(self, context: RunContext, reference: Tensor, grid: tuple[int, int]) -> Tensor:
        """The reference's rows, [conditionings, 1 or B, tokens, C], as if the subject stood where the object is."""
        middle = torch.zeros(1, 2)
        if self.shift.given is not None:
            shifts = self.shift.tokens(middle, middle, grid)
        elif self.subject is None or self.inside is None:
            return reference
        else:
            if grid not in self.centres:
                self.centres[grid] = centre(kernel.at_size(self.subject, grid))
            shifts = self.shift.tokens(self.centres[grid], self.inside.centre(context, grid), grid)
        return torch.stack([context.family.moved(rows, shifts) for rows in reference])


class FromReference(Recipe):
    """Keys and values of the reference for the target's queries (equation 3). references: streams, one for all images
    or one for each. place: where its keys are to be (None: where they are).
    """

    node = "Multi Source Swap"
    same_weights = False  # the layout and the photo may be of the plain model

    def __init__(
        self, window: Window, references: Sequence[Stream], place: Place | None = None, exact: bool = False
    ) -> None:
        super().__init__(window, exact)
        self.streams, self.place = references, place

    def check(self, context: RunContext) -> None:
        if self.place and self.place.inside:
            self.place.inside.check(self.node, context)

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        reference = of_images(sources)
        if self.place:
            reference = self.place.moved(context, reference, grid)
        return [AttentionTerm(target.q, reference, reference)]


class FromBoth(Recipe):
    """The same, blended with the layout's own attention: phi* = M phi_t + (1 - M) phi_o (equation 4). Rows of no weight
    are not computed. inside: M.
    """

    node = "Multi Source Swap"
    same_weights = False  # the layout and the photo may be of the plain model
    several_terms = True

    def __init__(
        self,
        window: Window,
        references: Sequence[Stream],
        layouts: Sequence[Stream],
        inside: ObjectMask,
        place: Place | None = None,
        exact: bool = False,
    ) -> None:
        super().__init__(window, exact)
        self.streams, self.count = (*references, *layouts), len(references)
        self.inside, self.place = inside, place

    def check(self, context: RunContext) -> None:
        self.inside.check(self.node, context)

    def attend(
        self, context: RunContext, target: TargetRows, sources: list[Tensor], grid: tuple[int, int]
    ) -> list[AttentionTerm]:
        reference, layout = of_images(sources[: self.count]), of_images(sources[self.count :])
        if self.place:
            reference = self.place.moved(context, reference, grid)
        sides = (target.q, reference), (layout, layout)
        return [
            AttentionTerm(queries if rows is None else queries.index_select(2, rows), keys, keys, rows, weight)
            for (queries, keys), (rows, weight) in zip(sides, self.inside.shares(context, grid, target.q))
            if rows is None or len(rows)
        ]
