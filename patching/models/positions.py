"""Where a transformer's keys say that they stand: RoPE, by the model's own axes and frequencies."""

from typing import Any, NamedTuple

import torch

from ...kernels.rotary import turned


class Positions(NamedTuple):
    """How a network turns the pairs of channels of Q and K by the place of their token.

    down, right: radians of each pair for one token down and to the right, float64 [d / 2]. interleaved: as in
    kernels.rotary.
    """

    down: torch.Tensor
    right: torch.Tensor
    interleaved: bool

    def moved(self, keys: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
        """Keys [1 or B, tokens, heads x d] as if their tokens stood elsewhere. shifts: (down, right) in tokens, [1 or
        B, 2].
        """
        down, right = shifts.to("cpu", torch.float64).unbind(1)
        return turned(keys, torch.outer(down, self.down) + torch.outer(right, self.right), self.interleaved)


def of_axes(embedder: Any) -> Positions:
    """Of ComfyUI's EmbedND: pairs that lie next to each other, axis after axis. The places are (time, down, right, ...)
    or (down, right).
    """
    axes = embedder.axes_dim
    first = 0 if len(axes) == 2 else 1
    parts = [1 / embedder.theta ** (torch.arange(0, size, 2, dtype=torch.float64) / size) for size in axes]

    def of(axis: int) -> torch.Tensor:
        return torch.cat([part if number == axis else 0 * part for number, part in enumerate(parts)])

    return Positions(of(first), of(first + 1), True)


def of_halves(embedder: Any) -> Positions:
    """Of Cosmos' VideoRopePosition3DEmb: channel i goes with i + d / 2, over time, down, right."""
    space = embedder.dim_spatial_range.to("cpu", torch.float64)
    time = torch.zeros(len(embedder.dim_temporal_range), dtype=torch.float64)
    down, right = (1 / (10000 * factor) ** space for factor in (embedder.h_ntk_factor, embedder.w_ntk_factor))
    none = torch.zeros_like(space)
    return Positions(torch.cat([time, down, none]), torch.cat([time, none, right]), False)
