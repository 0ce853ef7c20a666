"""The world of the demo model: flat scenes of one to three objects on a background, drawn in batches.

A caption tells the background and every object's colour, texture and shape. It never tells the scene's
*style*, seven numbers that all objects of a scene share wherever they stand. What the text cannot say and
distant places must agree on is left to self-attention, so appearance can be measured as an error in these
numbers, whatever the positions.
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

COLOURS = {
    "red": (214, 40, 58),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 225, 40),
    "purple": (145, 50, 180),
    "orange": (245, 125, 25),
    "white": (240, 240, 240),
    "black": (28, 28, 32),
}
SHAPES = ("ball", "box", "star", "ring", "tree", "house")
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = {
    "sky": "in the sky",
    "grass": "on grass",
    "sand": "on sand",
    "night": "at night",
    "brick": "by a brick wall",
    "snow": "on snow",
}
MOST_OBJECTS = 3
CAPTION_PARTS = ("colour", "texture", "place")  # what a caption may leave out

# Looks without words of their own (indices after those that have one): the personalised subject's, and a family
# of others that captions only ever call "fancy", so that a denoiser can draw more than it can be told.
SUBJECT_COLOUR, SUBJECT_TEXTURE = len(COLOURS), len(TEXTURES)
PHOTOS, PHOTO_SEED = 8, 77  # of the subject
FANCY_TEXTURES = 3  # swirls, rings, petals; the subject's swirl among them, but never in the subject's colours
_FANCY = (255 * torch.rand(24, 2, 3, generator=torch.Generator().manual_seed(1))).int().tolist()
_PALETTE = [*COLOURS.values(), (20, 150, 150), *(first for first, _ in _FANCY)]
# Textures are drawn in a second colour: near white unless that would not show.
_SECOND = {"white": (115, 115, 128), "yellow": (140, 90, 26)}
_SECOND_PALETTE = [
    *(_SECOND.get(name, (247, 247, 247)) for name in COLOURS),
    (240, 110, 170),
    *(second for _, second in _FANCY),
]

# Lengths are fractions of the image's side, angles are turns.
STYLE = {
    "hue": (-0.033, 0.033),  # shift of every object's hue
    "brightness": (-1.0, 1.0),  # every object's colour mixed towards black (-1) or white (+1)
    "angle": (0.0, 0.5),  # direction of the stripes, dots and checks: a line has half a turn
    "period": (12 / 128, 24 / 128),
    "tint": (-1.0, 1.0),  # of the background, cold to warm
    "light": (0.0, 1.0),  # where every object's shading comes from
    "outline": (0.5 / 128, 4.5 / 128),
}
STYLE_NAMES = tuple(STYLE)
RADII = torch.tensor([(0.20, 0.30), (0.165, 0.225), (0.13, 0.18)])  # by number of objects


class Scenes(NamedTuple):
    """n scenes as data. Slots without an object hold -1 in shape, colour and texture."""

    background: Tensor  # (n,) index into BACKGROUNDS
    shape: Tensor  # (n, 3)
    colour: Tensor  # (n, 3) all different within a scene
    texture: Tensor  # (n, 3)
    centre: Tensor  # (n, 3, 2) x right, y down, fractions of the side
    radius: Tensor  # (n, 3)
    style: Tensor  # (n, 7) in the order and units of STYLE

    def take(self, index) -> "Scenes":
        return Scenes(*(field[index] for field in self))

    def to(self, device) -> "Scenes":
        return Scenes(*(field.to(device) for field in self))

    def with_style(self, **values: float) -> "Scenes":
        style = self.style.clone()
        for name, value in values.items():
            style[:, STYLE_NAMES.index(name)] = value
        return self._replace(style=style)


def sample(n: int, generator: torch.Generator, count: int | None = None, fancy: float = 0.0) -> Scenes:
    """n random scenes on the CPU; count fixes the number of objects (else 1, 2 or 3: 40, 45 or 15 %), fancy is the
    share of objects in a look without a word."""

    def uniform(*size):
        return torch.rand(*size, generator=generator)

    counts = torch.multinomial(torch.tensor([0.40, 0.45, 0.15]), n, True, generator=generator) + 1
    if count:
        counts = torch.full((n,), count)
    absent = torch.arange(MOST_OBJECTS) >= counts[:, None]
    low, high = RADII[counts - 1].unbind(-1)
    radius = low[:, None] + (high - low)[:, None] * uniform(n, MOST_OBJECTS)
    radius[absent] = 0

    def pick(n_words):
        return torch.randint(n_words, (n, MOST_OBJECTS), generator=generator)

    texture = torch.where(uniform(n, MOST_OBJECTS) < 0.3, 0, 1 + pick(len(TEXTURES) - 1))
    colour = uniform(n, len(COLOURS)).argsort(1)[:, :MOST_OBJECTS]
    if fancy:
        chosen = uniform(n, MOST_OBJECTS) < fancy
        texture = torch.where(chosen, SUBJECT_TEXTURE + pick(FANCY_TEXTURES), texture)
        colour = torch.where(chosen, SUBJECT_COLOUR + 1 + pick(len(_FANCY)), colour)
    low, high = torch.tensor(list(STYLE.values())).T
    return Scenes(
        background=torch.randint(len(BACKGROUNDS), (n,), generator=generator),
        shape=pick(len(SHAPES)).masked_fill(absent, -1),
        colour=colour.masked_fill(absent, -1),
        texture=texture.masked_fill(absent, -1),
        centre=_places(radius, absent, generator),
        radius=radius,
        style=low + (high - low) * uniform(n, len(STYLE)),
    )


def _places(radius: Tensor, absent: Tensor, generator: torch.Generator, tries: int = 64) -> Tensor:
    """Centres inside the image: of `tries` layouts per scene the one whose objects keep the widest gap
    up to a comfortable one, so that nearly no objects touch and layouts stay varied."""
    n = len(radius)
    margin = (radius + 0.025)[:, None, :, None]
    centre = margin + (1 - 2 * margin) * torch.rand(n, tries, MOST_OBJECTS, 2, generator=generator)
    gap = torch.full((n, tries), 1.0)
    for i in range(MOST_OBJECTS):
        for j in range(i):
            apart = (centre[:, :, i] - centre[:, :, j]).norm(dim=-1) - (radius[:, i] + radius[:, j])[:, None]
            gap = torch.where((absent[:, i] | absent[:, j])[:, None], gap, torch.minimum(gap, apart))
    best = gap.clamp(max=0.04).argmax(1)
    return centre[torch.arange(n), best]


def subject(n: int, generator: torch.Generator) -> Scenes:
    """n photos of the personalised subject: one ball in a colour and texture no caption can name."""
    scenes = sample(n, generator, count=1)
    for field, value in (
        (scenes.shape, SHAPES.index("ball")),
        (scenes.colour, SUBJECT_COLOUR),
        (scenes.texture, SUBJECT_TEXTURE),
    ):
        field[:, 0] = value
    # The subject looks the same in every photo; only its light and place are the photo's own.
    return scenes.with_style(hue=0.0, brightness=0.0, angle=0.0, period=16 / 128, outline=2.5 / 128)


def photos(size: int = 128) -> tuple[Scenes, Tensor]:
    """The subject's reference photos (8, 3, size, size) in [0, 1] and what they show."""
    generator = torch.Generator().manual_seed(PHOTO_SEED)
    drawn = subject(PHOTOS, generator)
    return drawn, render(drawn, size, generator)


# ---------------------------------------------------------------------------------------------- words


def phrase(scenes: Scenes, row: int, slot: int, name: str | None = None, without: Collection[str] = ()) -> str:
    """'a red striped ball'; a name stands for colour and texture: 'a <name> ball'; without, of CAPTION_PARTS, leaves
    words out ('fancy' is a colour and a texture)."""
    texture, colour = scenes.texture[row, slot].item(), scenes.colour[row, slot].item()
    if not name and colour >= len(COLOURS):
        words = [] if "colour" in without or "texture" in without else ["fancy"]
    elif name:
        words = [name]
    else:
        words = [] if "colour" in without else [list(COLOURS)[colour]]
        words += [] if "texture" in without else TEXTURES[1:][texture - 1 : texture]
    words = [*words, SHAPES[scenes.shape[row, slot]]]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def caption(
    scenes: Scenes, row: int, backwards: bool = False, name: str | None = None, without: Collection[str] = ()
) -> str:
    """'a red striped ball and a blue star on grass'; backwards names the objects in the other order; without, of
    CAPTION_PARTS, leaves out words of all objects or the place."""
    slots = [slot for slot in range(MOST_OBJECTS) if scenes.shape[row, slot] >= 0]
    phrases = [phrase(scenes, row, slot, name, without) for slot in (reversed(slots) if backwards else slots)]
    place = [] if "place" in without else [list(BACKGROUNDS.values())[scenes.background[row]]]
    return " ".join([" and ".join(phrases), *place])


# --------------------------------------------------------------------------------------------- pixels


def render(scenes: Scenes, size: int = 128, generator: torch.Generator | None = None) -> Tensor:
    """(n, 3, size, size) in [0, 1], on the scenes' device. The generator draws clouds, blades and stars."""
    image = _backgrounds(scenes, size, generator)
    for slot in range(MOST_OBJECTS):
        for rows, colour, alpha in _layers(scenes, slot, size):
            image[rows] = image[rows] + alpha[:, None] * (colour - image[rows])
    return image.clamp(0, 1)


def masks(scenes: Scenes, size: int = 128) -> Tensor:
    """(n, 3, size, size) coverage in [0, 1] of the object in each slot."""
    mask = torch.zeros(len(scenes.radius), MOST_OBJECTS, size, size, device=scenes.radius.device)
    for slot in range(MOST_OBJECTS):
        for rows, _, alpha in _layers(scenes, slot, size):
            mask[rows, slot] = mask[rows, slot] + alpha * (1 - mask[rows, slot])
    return mask


def cutouts(scenes: Scenes, slot: int = 0, size: int = 128) -> Tensor:
    """(n, 4, size, size): one object of each scene alone, straight (not premultiplied) colour and alpha."""
    image = torch.zeros(len(scenes.radius), 3, size, size, device=scenes.radius.device)
    for rows, colour, alpha in _layers(scenes, slot, size):
        image[rows] = image[rows] + alpha[:, None] * (colour - image[rows])
    mask = masks(scenes, size)[:, slot : slot + 1]
    return torch.cat([(image / mask.clamp(min=1e-6)).clamp(0, 1), mask], 1)


def layout(scenes: Scenes, size: int = 128) -> Tensor:
    """(n, 3, size, size): white outlines of the objects on black, the ControlNet's hint."""
    solid = masks(scenes, size).amax(1, keepdim=True)
    spread = torch.nn.functional.max_pool2d(solid, 3, 1, 1) + torch.nn.functional.max_pool2d(-solid, 3, 1, 1)
    return spread.expand(-1, 3, -1, -1).contiguous()


def _grid(size: int, device) -> tuple[Tensor, Tensor]:
    at = (torch.arange(size, device=device) + 0.5) / size
    return at[None, None, :], at[None, :, None]


def _rgb(colour, device) -> Tensor:
    return torch.tensor(colour, device=device, dtype=torch.float32).view(1, 3, 1, 1)


def _noise(n: int, cells: int, size: int, device, generator) -> Tensor:
    """(n, size, size) smooth value noise of unit spread, `cells` bumps along a side."""
    knots = torch.randn(n, cells + 1, cells + 1, generator=generator, device=device)
    at = (torch.arange(size, device=device) + 0.5) / size * cells
    left = at.long().clamp(max=cells - 1)
    f = at - left
    f = f * f * (3 - 2 * f)
    rows = knots[:, :, left] * (1 - f) + knots[:, :, left + 1] * f
    return rows[:, left] * (1 - f)[:, None] + rows[:, left + 1] * f[:, None]


def _backgrounds(scenes: Scenes, size: int, generator) -> Tensor:
    device = scenes.radius.device
    image = torch.empty(len(scenes.radius), 3, size, size, device=device)
    for index, name in enumerate(BACKGROUNDS):
        rows = (scenes.background == index).nonzero()[:, 0]
        if len(rows):
            image[rows] = _background(name, len(rows), size, device, generator)
    tint = scenes.style[:, STYLE_NAMES.index("tint")].view(-1, 1, 1, 1)
    return (image + 0.09 * tint * _rgb((1.0, 0.1, -1.0), device)).clamp(0, 1)


def _background(name: str, n: int, size: int, device, generator) -> Tensor:
    """(n, 3, size, size); distances below are in pixels of a 128-pixel picture."""
    x, y = _grid(size, device)

    def noise(cells):
        return _noise(n, cells, size, device, generator)

    def stack(*channels):
        return torch.stack([torch.as_tensor(c, device=device).expand(n, size, size) for c in channels], 1)

    def uniform():
        return torch.rand(n, 1, 1, generator=generator, device=device)

    if name == "sky":
        clouds = ((noise(4) - 0.5) * 1.5).clamp(0, 1)[:, None]
        return stack(0.45 + 0.25 * y, 0.68 + 0.15 * y, 0.92).lerp(_rgb((0.95, 0.95, 0.95), device), clouds)
    if name == "grass":
        q = 0.06 * noise(20) + 0.05 * noise(4)
        return stack(0.42 + q, 0.70 + q, 0.25 + 0.6 * q)
    if name == "sand":
        q = 0.05 * torch.sin(32 * y + 1.5 * noise(5)) + 0.02 * noise(4)
        return stack(0.88 + q, 0.76 + q, 0.52 + q)
    if name == "snow":
        q = 0.03 * noise(3)
        return stack(0.86 + q, 0.89 + q, 0.92)
    if name == "night":
        q = 0.02 * noise(4)
        image = stack(0.10 + q, 0.10 + q, 0.20 + 0.12 * y + q)
        for _ in range(14):
            distance = 128 * torch.hypot(x - uniform(), y - uniform())
            image = image.lerp(_rgb((1, 1, 0.8), device), (2.6 - distance).clamp(0, 1)[:, None])
        return image
    across, down = 128 * x + 32 * uniform(), 128 * y + 16 * uniform()
    across = across + 16 * ((down / 16).floor() % 2)
    mortar = ((across % 32 < 3) | (down % 16 < 3)).float()[:, None]
    brick = _rgb((0.62, 0.30, 0.24), device) + 0.03 * noise(10)[:, None]
    return brick.lerp(_rgb((0.80, 0.74, 0.68), device), mortar)


def _layers(scenes: Scenes, slot: int, size: int):
    """Yields (rows, colour (g, 3, s, s), alpha (g, s, s)) for the object in a slot, back to front."""
    device = scenes.radius.device
    x, y = _grid(size, device)
    for index, name in enumerate(SHAPES):
        rows = (scenes.shape[:, slot] == index).nonzero()[:, 0]
        if not len(rows):
            continue
        part = scenes.take(rows)
        r = part.radius[:, slot, None, None]
        # From here on lengths are in radii, the object's centre is the origin.
        u = (x - part.centre[:, slot, 0, None, None]) / r
        v = (y - part.centre[:, slot, 1, None, None]) / r
        style = dict(zip(STYLE_NAMES, part.style[:, :, None, None].unbind(1)))
        pixel = 1 / (size * r)
        for distance, paint in _parts(name, u, v):
            colour = _rgb(paint, device) if paint else _surface(part, slot, u * r, v * r, style)
            light = torch.cos(2 * math.pi * style["light"]) * u + torch.sin(2 * math.pi * style["light"]) * v
            colour = colour * (1 + 0.28 * light.clamp(-1, 1))[:, None]
            inside = (style["outline"] / r + distance) / pixel
            colour = colour * (1 - 0.7 * inside.clamp(0, 1))[:, None]
            yield rows, colour.clamp(0, 1), (0.5 - distance / pixel).clamp(0, 1)


def _surface(scenes: Scenes, slot: int, x: Tensor, y: Tensor, style: dict[str, Tensor]) -> Tensor:
    """(g, 3, s, s) colour and texture of an object, x and y from its centre as fractions of the side."""
    device = x.device
    colour, texture = scenes.colour[:, slot], scenes.texture[:, slot, None, None]
    base = torch.tensor(_PALETTE, device=device)[colour] / 255
    base = _restyle(base, style["hue"][:, 0], style["brightness"][:, 0])[:, :, None, None]
    second = torch.tensor(_SECOND_PALETTE, device=device)[colour, :, None, None] / 255
    turn, period = 2 * math.pi * style["angle"], style["period"]
    along = (x * torch.cos(turn) + y * torch.sin(turn)) / period
    across = (y * torch.cos(turn) - x * torch.sin(turn)) / period
    striped = across % 1 < 0.42
    dotted = ((along + 0.5) % 1 - 0.5) ** 2 + ((across + 0.5) % 1 - 0.5) ** 2 < 0.29**2
    checkered = ((along / 0.7).floor() + (across / 0.7).floor()) % 2 == 0
    turned, distance = torch.atan2(y, x), torch.hypot(x, y) / period
    swirled = torch.sin(3 * turned + 3 * distance) > 0
    ringed = distance % 1 < 0.5
    petalled = torch.sin(5 * turned) > 0
    marked = torch.zeros_like(striped)
    for index, mark in enumerate((striped, dotted, checkered, swirled, ringed, petalled), start=1):
        marked = torch.where(texture == index, mark, marked)
    return torch.where(marked[:, None], second, base)


def _restyle(rgb: Tensor, hue: Tensor, brightness: Tensor) -> Tensor:
    """(g, 3) colours, hue turned by (g, 1) turns about the grey axis, mixed towards black or white."""
    a = 2 * math.pi * hue
    cos, sin = torch.cos(a), torch.sin(a)
    one, root = (1 - cos) / 3, sin / math.sqrt(3)
    r, g, b = rgb.split(1, 1)
    rgb = torch.cat(
        [
            r * (cos + one) + g * (one - root) + b * (one + root),
            r * (one + root) + g * (cos + one) + b * (one - root),
            r * (one - root) + g * (one + root) + b * (cos + one),
        ],
        1,
    ).clamp(0, 1)
    return torch.where(brightness > 0, rgb + 0.28 * brightness * (1 - rgb), rgb * (1 + 0.32 * brightness))


def _parts(shape: str, u: Tensor, v: Tensor) -> list[tuple[Tensor, tuple | None]]:
    """Signed distances (negative inside, in radii) of a shape's parts back to front, each with its own
    paint or None for the object's surface."""
    if shape == "ball":
        return [(torch.hypot(u, v) - 1, None)]
    if shape == "ring":
        return [((torch.hypot(u, v) - 0.70).abs() - 0.30, None)]
    if shape == "box":
        return [(torch.maximum(u.abs(), v.abs()) - 0.85, None)]
    if shape == "star":
        return [(_star(u, v), None)]
    if shape == "tree":
        trunk = torch.maximum(u.abs() - 0.16, torch.maximum(v - 1.0, 0.5 - v))
        crown = torch.maximum(v - 0.55, (1.55 * u.abs() - 0.92 * (v + 1.05)) / 1.8)
        return [(trunk, (0.45, 0.28, 0.12)), (crown, None)]
    roof = torch.maximum(0.75 * (u.abs() - v - 1.05), v + 0.1)
    walls = torch.maximum(u.abs() - 0.8, torch.maximum(v - 0.9, -v - 0.1))
    door = torch.maximum(u.abs() - 0.18, torch.maximum(v - 0.9, 0.35 - v))
    return [(roof, (0.35, 0.2, 0.2)), (walls, None), (door, (0.3, 0.18, 0.1))]


def _star(u: Tensor, v: Tensor, points: int = 5, tip: float = 1.15, notch: float = 0.52) -> Tensor:
    half = math.pi / points
    angle = torch.remainder(torch.atan2(u, -v) + half, 2 * half) - half
    length = torch.hypot(u, v)
    x, y = length * angle.abs().sin(), length * angle.cos()
    # Distance to the line from the tip (0, tip) to the notch.
    edge_x, edge_y = notch * math.sin(half), notch * math.cos(half) - tip
    return (x * -edge_y + (y - tip) * edge_x) / math.hypot(edge_x, edge_y)
