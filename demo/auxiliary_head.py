"""A lesson on the side: what the denoiser's features should know about each place of the picture.

While it trains, a small head reads from the decoder's features which object covers a place, in which shape, colour,
texture and style. The renderer knows all of that exactly, so words are bound to objects, and style enters the features
that self-attention carries, after far fewer pictures than the noise alone would teach (the idea is REPA's, Yu et al.
2024, with the renderer in the place of an encoder). The head is thrown away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .detector import encode_style, shown
from .diffusion import WIDTH
from .scenes import BACKGROUNDS, COLOURS, FANCY_TEXTURES, SHAPES, TEXTURES, Scenes, masks

_TEXTURES = len(TEXTURES) + FANCY_TEXTURES
_OUTPUTS = {"what": len(SHAPES) + len(BACKGROUNDS), "colour": len(COLOURS), "texture": _TEXTURES, "style": 9}
_TINT = 5  # its place in encode_style's code: one place a variable, two for the angle before it


class Heads(nn.Module):
    def __init__(self, channels: int = WIDTH):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(32, channels),
            nn.Conv2d(channels, channels, 1),
            nn.SiLU(),
            nn.Conv2d(channels, sum(_OUTPUTS.values()), 1),
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(n, 64, h, w) -> by output (n, h, w, c)."""
        maps = self.net(features).float().movedim(1, -1).split(list(_OUTPUTS.values()), -1)
        return dict(zip(_OUTPUTS, maps))


def owners(scenes: Scenes, side: int) -> Tensor:
    """(n, side, side) uint8: the slot of the object that covers a place, 3 for the background."""
    cover = masks(scenes, side)
    return torch.cat([cover, torch.full_like(cover[:, :1], 0.5)], 1).argmax(1).byte()


def loss(maps: dict[str, Tensor], scenes: Scenes, owner: Tensor) -> Tensor:
    """Scalar: cross entropies of what, colour and texture, squared error of the style that a place shows."""

    def at(field: Tensor) -> Tensor:
        return field.gather(1, slot.flatten(1)).view_as(owner)

    owner = owner.long()
    slot, covered = owner.clamp(max=2), owner < 3
    behind = (len(SHAPES) + scenes.background)[:, None, None]
    colour, texture = at(scenes.colour), at(scenes.texture)
    named = covered & (colour < len(COLOURS))
    total = F.cross_entropy(maps["what"].flatten(0, 2), torch.where(covered, at(scenes.shape), behind).flatten())
    total = total + 0.3 * F.cross_entropy(maps["colour"][named], colour[named])
    total = total + 0.3 * F.cross_entropy(maps["texture"][covered], texture[covered])
    visible = torch.zeros_like(maps["style"])
    visible[named] = shown(texture[named], colour[named])
    visible[..., _TINT] = (~covered).float()
    error = (maps["style"] - encode_style(scenes.style)[:, None, None]) ** 2
    return total + (visible * error).sum((0, 1, 2)).div(visible.sum((0, 1, 2)).clamp(min=1)).mean()
