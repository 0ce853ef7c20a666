"""Reads a picture back: which objects, where, in which colour, texture, shape and style, on which background.

A small convolutional network (a CenterNet) trained on renders. It is the judge of everything the demo model
draws, so it never sees the demo model's samples in training; metrics.py uses it, evaluate.py validates it.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLOURS, MOST_OBJECTS, SHAPES, STYLE, STYLE_NAMES, TEXTURES, Scenes

WEIGHTS = Path(__file__).parent / "weights" / "demo-reader.safetensors"
# Style as the network sees it: an angle is a point on the unit circle, where 0 and a full turn meet.
_CIRCULAR = {"angle": 0.5, "light": 1.0}  # style variable -> its period in turns
_OUTPUTS = {
    "centre": 1,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "style": sum(2 if name in _CIRCULAR else 1 for name in STYLE),
}


class Found(NamedTuple):
    """One object that the reader sees. Centre (x, y) as fractions of the side, style in STYLE's units."""

    score: float
    centre: tuple[float, float]
    shape: int
    colour: int
    texture: int
    style: dict[str, float]


class Reader(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()

        def layer(n_in, n_out, stride=1):
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1), nn.GroupNorm(8, n_out), nn.SiLU())

        self.fine = nn.Sequential(
            layer(3, width, 2),
            layer(width, 2 * width, 2),
            layer(2 * width, 2 * width),
            layer(2 * width, 3 * width, 2),
            layer(3 * width, 3 * width),
        )
        self.coarse = nn.Sequential(
            layer(3 * width, 4 * width, 2), layer(4 * width, 4 * width), layer(4 * width, 4 * width)
        )
        self.merge = nn.Sequential(nn.Conv2d(7 * width, 4 * width, 1), layer(4 * width, 4 * width))
        # Normalised layers lose how much of a colour there is: hue and brightness come from the pixels directly.
        self.paint = nn.Sequential(
            nn.Conv2d(9, 2 * width, 3, padding=1), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.SiLU()
        )
        self.head = nn.Sequential(
            nn.Conv2d(6 * width, 4 * width, 1), nn.SiLU(), nn.Conv2d(4 * width, sum(_OUTPUTS.values()), 1)
        )
        self.whole = nn.Linear(4 * width, len(BACKGROUNDS) + 1)

    def forward(self, image: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """(n, 3, h, w) in [0, 1] -> maps (n, c, h/8, w/8) by output, background logits (n, 6), tint (n,)."""
        fine = self.fine(image - 0.5)
        coarse = self.coarse(fine)
        up = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")
        mean, most, least = F.avg_pool2d(image, 8), F.max_pool2d(image, 8), -F.max_pool2d(-image, 8)
        paint = self.paint(torch.cat([mean, most, least], 1) - 0.5)
        maps = self.head(torch.cat([self.merge(torch.cat([fine, up], 1)), paint], 1))
        whole = self.whole(coarse.mean((2, 3)))
        return dict(zip(_OUTPUTS, maps.split(list(_OUTPUTS.values()), 1))), whole[:, :-1], whole[:, -1]


def encode_style(style: Tensor) -> Tensor:
    """(..., 7) in STYLE's units -> (..., 9) about [-1, 1], angles as cosine and sine."""
    parts = []
    for i, (name, (low, high)) in enumerate(STYLE.items()):
        value = style[..., i]
        if name in _CIRCULAR:
            turn = 2 * math.pi * value / _CIRCULAR[name]
            parts += [turn.cos(), turn.sin()]
        else:
            parts.append((2 * value - low - high) / (high - low))
    return torch.stack(parts, -1)


def decode_style(code: Tensor) -> dict[str, float]:
    """The inverse of encode_style for one object, (9,) -> values in STYLE's units."""
    values, rest = {}, code.tolist()
    for name, (low, high) in STYLE.items():
        if name in _CIRCULAR:
            cos, sin = rest.pop(0), rest.pop(0)
            values[name] = math.atan2(sin, cos) / (2 * math.pi) % 1 * _CIRCULAR[name]
        else:
            values[name] = (rest.pop(0) * (high - low) + low + high) / 2
    return values


def style_error(name: str, a: float, b: float) -> float:
    """Distance of two values of a style variable as a fraction of the largest possible: 0 equal, 1 opposite."""
    if name in _CIRCULAR:
        period = _CIRCULAR[name]
        apart = abs(a - b) % period
        return min(apart, period - apart) / (period / 2)
    low, high = STYLE[name]
    return min(abs(a - b) / (high - low), 1.0)


def shows(name: str, texture: int, colour: int) -> bool:
    """Whether an object of this texture and colour (indices) shows the style variable at all."""
    if name == "angle":
        return TEXTURES[texture] == "striped"  # dots and checks look the same after a quarter turn
    if name == "period":
        return TEXTURES[texture] != "plain"
    if name == "hue":
        return list(COLOURS)[colour] not in ("white", "black")
    return name != "tint"


def loss(reader: Reader, image: Tensor, scenes: Scenes) -> Tensor:
    """Scalar. Centres by cross entropy on a Gaussian bump, attributes at the cells about each centre."""
    maps, background, tint = reader(image)
    n, _, h, w = maps["centre"].shape
    present = scenes.shape >= 0
    y, x = torch.meshgrid(torch.arange(h, device=image.device), torch.arange(w, device=image.device), indexing="ij")
    cell = scenes.centre * w - 0.5
    apart2 = (x - cell[..., 0, None, None]) ** 2 + (y - cell[..., 1, None, None]) ** 2  # (n, 3, h, w)
    apart2 = apart2.masked_fill(~present[..., None, None], 1e9)
    bump = torch.exp(-apart2 / (2 * 0.9**2)).amax(1)
    weight = 1 + 20 * bump
    total = (weight * F.binary_cross_entropy_with_logits(maps["centre"][:, 0], bump, reduction="none")).mean()

    nearest, owner = apart2.min(1)
    row, at_y, at_x = (nearest < 1.5**2).nonzero().unbind(1)
    slot = owner[row, at_y, at_x]
    total = total + F.cross_entropy(maps["shape"][row, :, at_y, at_x], scenes.shape[row, slot])
    # The look of a fancy object has no words and no style to learn from.
    named = scenes.colour[row, slot] < len(COLOURS)
    row, slot, at_y, at_x = row[named], slot[named], at_y[named], at_x[named]
    texture, colour = scenes.texture[row, slot], scenes.colour[row, slot]
    total = (
        total
        + F.cross_entropy(maps["colour"][row, :, at_y, at_x], colour)
        + F.cross_entropy(maps["texture"][row, :, at_y, at_x], texture)
    )
    target, style = encode_style(scenes.style)[row], maps["style"][row, :, at_y, at_x]
    total = total + 8 * (shown(texture, colour) * (style - target) ** 2).mean()
    tint_target = scenes.style[:, STYLE_NAMES.index("tint")]
    return total + F.cross_entropy(background, scenes.background) + F.mse_loss(tint, tint_target)


def shown(texture: Tensor, colour: Tensor) -> Tensor:
    """(n, 9) in encode_style's order: 1 where an object of this texture and colour shows the style variable."""
    table = torch.tensor(
        [
            [
                [shows(name, t, c) for name in STYLE for _ in range(2 if name in _CIRCULAR else 1)]
                for c in range(len(COLOURS))
            ]
            for t in range(len(TEXTURES))
        ],
        device=texture.device,
    )
    return table[texture, colour].float()


@torch.no_grad()
def read(reader: Reader, image: Tensor, threshold: float = 0.3) -> list[tuple[int, float, list[Found]]]:
    """(n, 3, h, w) in [0, 1] -> per picture the background's index, its tint, and its objects by score."""
    maps, background, tint = reader(image)
    heat = maps["centre"].sigmoid()
    peak = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
    result = []
    for i in range(len(image)):
        objects = []
        scores, cells = peak[i, 0].flatten().topk(MOST_OBJECTS + 2)
        for score, cell in zip(scores.tolist(), cells.tolist()):
            if score < threshold:
                break
            y, x = divmod(cell, heat.shape[3])
            at = {name: maps[name][i, :, y, x] for name in _OUTPUTS}
            objects.append(
                Found(
                    score,
                    ((x + 0.5) / heat.shape[3], (y + 0.5) / heat.shape[2]),
                    *(at[name].argmax().item() for name in ("shape", "colour", "texture")),
                    decode_style(at["style"]),
                )
            )
        result.append((background[i].argmax().item(), tint[i].item(), objects))
    return result


def load(path: Path = WEIGHTS) -> Reader:
    from safetensors.torch import load_file

    reader = Reader()
    reader.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return reader.eval()
