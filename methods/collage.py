"""Collage Diffusion (arXiv 2303.00262): layers on a canvas, and the bias that binds each layer's words to where it is
seen.
"""

from typing import NamedTuple

import torch
from comfy.sd import CLIP

from ..kernels import collage as kernel
from ..kernels import token_bias
from ..patching.bias import Bias
from ..patching.models import TextAttention
from ..patching.schedule import Window
from ..patching.tokens import token_runs

Tensor = torch.Tensor


class Layer(NamedTuple):
    """One layer, before it lies on a canvas."""

    node: str  # unique id of the node that made it
    picture: torch.Tensor  # [4, h, w], premultiplied RGBA
    text: str
    x: float  # centre, in fractions of the canvas
    y: float
    scale: float  # 1: as large as the canvas contains it
    rotation: float  # degrees, clockwise
    depth: int
    w_pos: float
    w_neg: float
    noise: float
    control: float
    flip: bool = False  # the picture is mirrored already


class Collage(NamedTuple):
    """Layers on a canvas, back to front."""

    layers: tuple[Layer, ...]
    masks: torch.Tensor  # visible masks [N, H, W]
    noise: torch.Tensor  # noise map [H, W]
    prompt: str
    background: torch.Tensor  # [3, H, W]

    def place(self, number: int) -> Tensor:
        """A layer where it lies on the canvas, [4, H, W], premultiplied."""
        _, height, width = self.masks.shape
        return placed(self.layers[number], (height, width))


def placed(layer: Layer, size: tuple[int, int]) -> Tensor:
    """The layer on a canvas, [4, H, W], premultiplied."""
    return kernel.place(layer.picture, size, layer.x, layer.y, layer.scale, layer.rotation)


Owned = dict[int, tuple[int, ...]]  # token position -> the layers whose word it is


class CollageBias(Bias):
    """S_pj += strength g(sigma) M_j (w_pos A_pos - w_neg A_neg)_pj on the layers' own tokens (paper, section 3.2)."""

    node = "Collage Cross Attention"

    def __init__(self, window: Window, collage: Collage, owned: Owned, strength: float, growth: str) -> None:
        """growth: of kernels.token_bias.GROWTH."""
        _, height, width = collage.masks.shape
        super().__init__(window, (height, width))
        self.collage, self.owned, self.strength, self.growth = collage, owned, strength, token_bias.GROWTH[growth]

    def prepare(self, grid: tuple[int, int], tokens: int, copies: int, like: Tensor) -> Tensor:
        """What each token of the text is drawn to, [h w, text tokens]: 0 for those that are no layer's."""
        w_pos, w_neg = zip(*((layer.w_pos, layer.w_neg) for layer in self.collage.layers))
        weights = token_bias.spatial_weights(self.collage.masks, w_pos, w_neg, self.owned.values(), grid)
        drawn = weights.new_zeros(weights.shape[1], tokens)
        drawn[:, list(self.owned)] = weights.T
        return drawn.repeat(1, copies).to(like)

    def at(self, prepared: Tensor, sigma: float, attention: TextAttention) -> Tensor:
        gain = self.strength * self.growth(sigma)
        return prepared * (gain * token_bias.logit_scale(attention.k, attention.heads))

    def write(self, out: Tensor, ready: Tensor, attention: TextAttention) -> None:
        token_bias.attention_bias(attention.q, attention.k, attention.heads, ready, out)


def owned_tokens(node: str, clip: CLIP, collage: Collage) -> Owned:
    """Which layers' words the tokens of the prompt are. node: display name for the error that names a layer whose words
    are not there.
    """
    runs = {}
    for number, layer in enumerate(collage.layers):
        if layer.text:
            try:
                runs[number] = token_runs(clip, collage.prompt, layer.text)
            except ValueError as error:
                raise ValueError(
                    f"{node}: layer {number} (counted from the back; node {layer.node}): {error} Or clear the prompt of"
                    " Collage Canvas, which is then built from the layers, or this layer's text."
                ) from None
    return token_bias.owners(runs)
