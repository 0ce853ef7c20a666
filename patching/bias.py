"""An additive bias on the attention of single conditionings to their text.

The CONDITIONING itself carries the Bias (`attach`), and the MODEL is made to look for it (`install`), so that it acts
on this prompt alone: not on the negative one, not on another pack's, and in whatever batches ComfyUI computes them.
"""

from typing import Any

import node_helpers
import torch

from .models.base import TextAttention
from .schedule import Window

KEY = "montage_bias"  # of the Bias in a conditioning


class Bias:
    """What is added to the logits of one conditioning. Subclasses say how.

    node: the display name for messages. window: schedule.Window. size: (H, W) of the canvas that its masks lie on.
    """

    node = "Montage"

    def __init__(self, window: Window, size: tuple[int, int]) -> None:
        self.window, self.size = window, size

    def prepare(self, grid: tuple[int, int], tokens: int, copies: int, like: torch.Tensor) -> Any:
        """What stays the same for a whole run at a level: anything. grid: (h, w). tokens: of the conditioning. copies:
        how often it is repeated in K. like: a tensor of the device and type.
        """

    def at(self, prepared: Any, sigma: float, attention: TextAttention) -> Any:
        """What of it stays the same for an evaluation at a sigma, at all sites of the level that are of this one's
        shape.
        """
        return prepared

    def write(self, out: torch.Tensor, ready: Any, attention: TextAttention) -> None:
        """Write the bias over all of `out`, [B, 1, tokens, text tokens] in q's type: finite. ready: what `at` gave.
        attention: of this conditioning alone.
        """
        raise NotImplementedError


def attach(conditioning: list, bias: Bias) -> list:
    """A CONDITIONING that carries the bias."""
    return node_helpers.conditioning_set_values(conditioning, {KEY: bias})


def biases_of(conds: dict[str, list[dict]]) -> dict[Any, tuple[Bias, int]]:
    """{uuid: (bias, text tokens)} of the processed conditionings that carry one."""
    biased = [cond for group in conds.values() for cond in group if KEY in cond]
    return {cond["uuid"]: (cond[KEY], cond["cross_attn"].shape[1]) for cond in biased}
