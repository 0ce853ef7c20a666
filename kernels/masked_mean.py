"""The loss of Collage Diffusion's textual inversion (arXiv 2303.00262, section 3.3)."""

import torch


def masked_mean(errors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over a mask: what is outside has no weight, and a small layer has as much as a large one.

    errors: [B, C, h, w]. mask: [B, 1, h, w] in [0, 1], not 0 everywhere. Returns [B].
    """
    return (errors * mask).sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * errors.shape[1])
