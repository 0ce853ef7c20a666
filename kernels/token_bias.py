"""The bias on cross-attention that draws a layer's words to where the layer is seen (Collage Diffusion, arXiv
2303.00262, section 3.2).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

GROWTH: dict[
    str, Callable[[float], float]
] = {  # g(sigma): the bias is strong while the layout is made and fades with the noise
    "log log": lambda sigma: math.log(math.log(sigma + 1.01) + 1),  # the authors' default
    "log": lambda sigma: math.log(sigma + 1.01),  # their other; eDiff-I's is log(sigma + 1)
    "constant": lambda sigma: 1.0,
}


def owners(runs: Mapping[int, Sequence[Sequence[int]]]) -> dict[int, tuple[int, ...]]:
    """The layers that each token belongs to: {position: (layer, ...)}.

    runs: {layer: [run, ...]}, where a layer's words stand in the prompt (patching.tokens.token_runs). A token belongs
    to the longest phrase around it: of "cat" and "red cat" the latter owns both words of a red cat, and the former
    other cats only, if there are any. Layers of the same words own them one each, in order, if they stand there as
    often; else together.
    """

    def length(position: int) -> int:
        return max(len(run) for found in runs.values() for run in found if position in run)

    owned = {}
    for layer, found in runs.items():
        alike = [other for other in runs if runs[other] == found]
        if len(alike) == len(found):
            found = [found[alike.index(layer)]]
        own = [run for run in found if all(length(position) == len(run) for position in run)]
        for position in {position for run in own or found for position in run}:
            owned[position] = (*owned.get(position, ()), layer)
    return dict(sorted(owned.items()))


def spatial_weights(
    masks: torch.Tensor,
    w_pos: Sequence[float],
    w_neg: Sequence[float],
    owned: Iterable[Sequence[int]],
    grid: Sequence[int],
) -> torch.Tensor:
    """w_pos A_pos - w_neg A_neg of the layers' own tokens (paper, eq. 3 and 4), [tokens, h w].

    masks: visible masks [N, H, W]. w_pos, w_neg: of each layer, [N]. owned: the layers that each token belongs to,
    [(layer, ...)]. grid: (h, w) of the attention. Where several layers own a token it is drawn to each and kept away
    from where none is seen.
    """
    masks = F.interpolate(masks[None], size=tuple(grid), mode="area")[0].flatten(1)
    rows = []
    for layers in owned:
        seen = masks[list(layers)]
        drawn = (seen * torch.tensor([w_pos[layer] for layer in layers]).to(seen)[:, None]).sum(0)
        rows.append(drawn - max(w_neg[layer] for layer in layers) * (1 - seen.sum(0)))
    return torch.stack(rows)


def logit_scale(k: torch.Tensor, heads: int) -> float:
    """1 / sqrt(d): what an attention's logits are of q k^T. k: [B, tokens, heads x d]."""
    return (k.shape[-1] // heads) ** -0.5


def maxima(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """M_j / scale, where M_j is the largest logit that each token has with any pixel in any head, for each sample:
    finite, and never below 0, where it would turn attraction into repulsion.

    q: [B, pixels, C], k: [B, tokens, C], C = heads * d; logits are q k^T times logit_scale. Returns [B, tokens].
    """
    q, k = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k))
    return (q @ k.transpose(2, 3)).amax((1, 2)).clamp_(0, torch.finfo(q.dtype).max)


def attention_bias(
    q: torch.Tensor, k: torch.Tensor, heads: int, weights: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What is added to the cross-attention's logits: S_pj += g(sigma) M_j (w_pos A_pos - w_neg A_neg)_pj (paper,
    section 3.2).

    q: [B, pixels, C], k: [B, K, C]. weights: g(sigma) logit_scale (w_pos A_pos - w_neg A_neg), [pixels, K], 0 for
    tokens that are no layer's, of all copies of the prompt (ComfyUI repeats prompts of unequal length). Returns [B, 1,
    pixels, K] in q's type (out: where to).
    """
    return torch.mul(maxima(q, k, heads)[:, None, None], weights, out=out)
