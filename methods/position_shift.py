"""Keys that come from other places than they are asked from.

A transformer's keys carry the place of their token (RoPE), and a query looks first at its own place in the other image
too: a subject that stands elsewhere than the area it is to fill is overlooked there. Its keys are therefore turned as
if it stood on the area.
"""

import logging
import re
from typing import NamedTuple

import torch
from comfy.model_patcher import ModelPatcher

from ..patching.models import family_of

Tensor = torch.Tensor

AUTO, NONE = "auto", "none"


class Shift(NamedTuple):
    """How far a subject's tokens are moved. given: (down, right) in fractions of the picture; None: from the centre of
    the subject to that of the area.
    """

    given: tuple[float, float] | None = None

    def tokens(self, subject: Tensor, area: Tensor, grid: tuple[int, int]) -> Tensor:
        """(down, right) in whole tokens, [1 or B, 2]; 0 where one of them is nowhere. subject, area: their centres in
        tokens, [1 or B, 2]. All in main memory.
        """
        if self.given is not None:
            return (torch.tensor([self.given]) * torch.tensor(grid)).round()
        return (area - subject).round().nan_to_num(0.0)


def shift_of(node: str, model: ModelPatcher, text: str, size: tuple[int, int]) -> Shift | None:
    """The shift that a node's input names: "auto", "none", or pixels to the right and down, such as "64, -32". None
    where it is none or the MODEL's keys say nothing of places, which the log says where somebody may wait for it. node:
    its display name. size: (H, W) of the picture in pixels. Raises ValueError for another text.
    """
    text = text.strip().lower()
    numbers = re.fullmatch(r"([+-]?\d+(?:\.\d+)?)\s*[,;x ]\s*([+-]?\d+(?:\.\d+)?)", text)
    if not numbers and text not in (AUTO, NONE):
        raise ValueError(
            f'{node}: shift: "{text}" was not understood. Write {AUTO}, {NONE}, or how many pixels to the right and'
            " down, such as 64, -32."
        )
    family = family_of(model)
    if text == NONE:
        return None
    if not family.has_positions:
        if numbers or not family.is_unet:
            logging.info(
                "%s: shift does nothing on this %s, whose attention keys carry no positions (no RoPE).",
                node,
                type(model.model).__name__,
            )
        return None
    if not numbers:
        return Shift()
    right, down = (float(number) for number in numbers.groups())
    return Shift((down / size[0], right / size[1]))


def centre(weight: Tensor) -> Tensor:
    """Where something lies on a grid, (down, right) in tokens, [B, 2]; NaN where it is nowhere. weight: [B, h, w], 0
    or more.
    """
    weight = weight.float()
    total, places = weight.sum((1, 2)), (torch.arange(side, device=weight.device) for side in weight.shape[1:])
    down, right = places
    return torch.stack([(weight.sum(2) * down).sum(1) / total, (weight.sum(1) * right).sum(1) / total], 1)


def moved_queries(rows: Tensor, tokens: Tensor, shifts: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows of some tokens, taken from where the shift brings them from; from the border where that is outside. rows:
    [1, h x w, C]. tokens: int64 [n]. shifts: (down, right), [1 or B, 2]. Returns [1 or B, n, C].
    """
    h, w = grid
    shifts = shifts.to(tokens.device, tokens.dtype, non_blocking=True)
    down = (tokens // w - shifts[:, :1]).clamp(0, h - 1)
    right = (tokens % w - shifts[:, 1:]).clamp(0, w - 1)
    return rows[0, down * w + right]
