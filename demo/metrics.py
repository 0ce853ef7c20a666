"""The yardsticks: what the tests and the evidence of this pack measure pictures with.

A picture is (h, w, 3) in [0, 1], one row of a ComfyUI IMAGE, as tensor or array; a mask is (h, w) in [0, 1]
and counts where it is above one half. Every function takes any size.
"""

from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch

from .detector import Found, Reader, read, shows, style_error
from .scenes import MOST_OBJECTS, STYLE_NAMES, Scenes

LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def _picture(picture) -> np.ndarray:
    return np.asarray(picture, dtype=np.float64)


def _inside(mask) -> np.ndarray:
    inside = np.asarray(mask) > 0.5
    if not inside.any():
        raise ValueError("the mask is empty: there is nothing to measure")
    return inside


# ----------------------------------------------------------------------------------- picture to picture


def masked_psnr(picture, reference, mask) -> float:
    """Peak signal-to-noise ratio in dB over the masked pixels; infinite when they are equal."""
    inside = _inside(mask)
    error = np.mean((_picture(picture)[inside] - _picture(reference)[inside]) ** 2)
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def background_psnr(picture, reference, mask) -> float:
    """PSNR in dB over what the mask leaves out: how well an edit kept its surroundings."""
    return masked_psnr(picture, reference, 1 - np.asarray(mask, dtype=np.float64))


def masked_ssim(picture, reference, mask) -> float:
    """Structural similarity (scikit-image's, 7x7 windows), its map averaged over the masked pixels; 1 = equal."""
    from skimage.metrics import structural_similarity

    _, similarity = structural_similarity(
        _picture(picture), _picture(reference), data_range=1.0, channel_axis=-1, full=True
    )
    return float(similarity[_inside(mask)].mean())


class SeamGradient(NamedTuple):
    score: float  # mean Sobel magnitude of luminance on the seam
    low: float  # the smallest and
    high: float  # the largest the sources have at the same pixels

    @property
    def in_range(self) -> bool:
        return self.low <= self.score <= self.high


def seam_gradient(picture, labels, sources) -> SeamGradient:
    """How visible the seams between the labels are, against the sources' own gradients at the same pixels.

    labels (h, w) integers, at the picture's size. Mean Sobel magnitude of luminance on label-boundary pixels,
    in range if between the sources' least and largest; the generative photomontage paper reports this score
    without defining its range, this definition is a reconstruction.
    """
    seam = _boundary(np.asarray(labels))
    if not seam.any():
        raise ValueError("the label map has one label only: there is no seam to measure")
    own = [_gradient(source)[seam].mean() for source in sources]
    return SeamGradient(float(_gradient(picture)[seam].mean()), float(min(own)), float(max(own)))


def _boundary(labels: np.ndarray) -> np.ndarray:
    """Pixels with another label above, below, left or right of them."""
    edge = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _gradient(picture) -> np.ndarray:
    from skimage.filters import sobel

    return sobel(_picture(picture) @ LUMINANCE)


# ------------------------------------------------------------------------------------- region to region


def colour_distance(picture, mask, reference, reference_mask) -> float:
    """How far apart the colours of two regions are, whatever their place and shape, in units of CIE Lab (2 is
    about the least one sees): the earth mover's distance of each channel's distribution, as one length."""
    from scipy.stats import wasserstein_distance
    from skimage.color import rgb2lab

    ours = rgb2lab(_picture(picture))[_inside(mask)]
    theirs = rgb2lab(_picture(reference))[_inside(reference_mask)]
    return float(np.linalg.norm([wasserstein_distance(ours[:, c], theirs[:, c]) for c in range(3)]))


def texture_similarity(picture, mask, reference, reference_mask) -> float:
    """How alike the textures of two regions are, whatever their colour, place and rotation: the overlap of the
    histograms of edge directions (the best over all rotations) times the ratio of edge densities; 1 = equal."""
    (ours, our_density), (theirs, their_density) = _edges(picture, mask), _edges(reference, reference_mask)
    overlap = max(np.minimum(ours, np.roll(theirs, shift)).sum() for shift in range(len(ours)))
    return float(overlap * min(our_density, their_density) / max(our_density, their_density))


def _edges(picture, mask, directions: int = 36, flat: float = 0.02) -> tuple[np.ndarray, float]:
    """Histogram of edge directions and mean edge strength inside the region, at unit contrast."""
    from scipy.ndimage import binary_erosion
    from skimage.filters import sobel_h, sobel_v

    inside = _inside(mask)
    # The region's own outline is no texture. Contrast below `flat` is noise and not blown up.
    core = binary_erosion(inside, iterations=4)
    core = core if core.any() else inside
    grey = _picture(picture) @ LUMINANCE
    grey = grey / max(grey[core].std(), flat)
    down, across = sobel_h(grey)[core], sobel_v(grey)[core]
    strength = np.hypot(down, across)
    bins = (np.arctan2(down, across) % np.pi / np.pi * directions).astype(int) % directions
    histogram = np.bincount(bins, strength, directions)
    return histogram / max(histogram.sum(), 1e-9), float(strength.mean()) + 1e-9


# --------------------------------------------------------------------------------------- what it shows


class Wanted(NamedTuple):
    """An object that a prompt asks for, by index into COLOURS, TEXTURES and SHAPES."""

    colour: int
    texture: int
    shape: int


class Verdict(NamedTuple):
    """A picture against what its prompt asked for; lists are in the prompt's order."""

    background: bool
    objects: list[Found | None]  # what stands for each wanted object, None where nothing does
    colour: list[bool]
    texture: list[bool]
    shape: list[bool]
    spare: int  # objects nobody asked for

    @property
    def present(self) -> bool:
        """Every wanted object is there: its own object of its colour."""
        return all(self.colour)


def wanted(scenes: Scenes, row: int) -> list[Wanted]:
    """What the caption of a scene asks for."""
    return [
        Wanted(*(field[row, slot].item() for field in (scenes.colour, scenes.texture, scenes.shape)))
        for slot in range(MOST_OBJECTS)
        if scenes.shape[row, slot] >= 0
    ]


def look(reader: Reader, picture) -> tuple[int, float, list[Found]]:
    """What the reader sees in one picture: index into BACKGROUNDS, tint, objects."""
    image = torch.as_tensor(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    return read(reader, image)[0]


def judge(seen: tuple[int, float, list[Found]], background: int, objects: list[Wanted]) -> Verdict:
    """Compares what was seen with what was wanted. Each wanted object is matched with a seen object of its own
    so that most colours, then shapes, then textures are right."""
    where, _, found = seen
    slots = [*found, *[None] * len(objects)]

    def agreement(chosen):
        pairs = [(f, w) for f, w in zip(chosen, objects) if f is not None]
        return sum(
            100 * (f.colour == w.colour) + 10 * (f.shape == w.shape) + (f.texture == w.texture) + 0.1 for f, w in pairs
        )

    best = max(permutations(slots, len(objects)), key=agreement)

    def right(field):
        return [f is not None and getattr(f, field) == getattr(w, field) for f, w in zip(best, objects)]

    spare = len(found) - sum(f is not None for f in best)
    return Verdict(where == background, list(best), right("colour"), right("texture"), right("shape"), spare)


def placed(found: Found | None, mask) -> bool:
    """Whether an object stands in a region: its centre is inside the mask, or in a hole of it (a ring's is)."""
    from scipy.ndimage import binary_fill_holes

    if found is None:
        return False
    inside = binary_fill_holes(_inside(mask))
    h, w = inside.shape
    return bool(inside[min(int(found.centre[1] * h), h - 1), min(int(found.centre[0] * w), w - 1)])


def truth(scenes: Scenes, row: int, slot: int) -> Found:
    """An object of a scene as a perfect reader would see it."""
    return Found(
        1.0,
        tuple(scenes.centre[row, slot].tolist()),
        *(field[row, slot].item() for field in (scenes.shape, scenes.colour, scenes.texture)),
        dict(zip(STYLE_NAMES, scenes.style[row].tolist())),
    )


def style_errors(found: Found, source: Found) -> dict[str, float]:
    """Error of each unnamed style variable that both objects show: 0 = the same, 1 = as far as can be; two
    unrelated objects are 1/3 apart on average, 1/2 in angle and light."""
    return {
        name: style_error(name, found.style[name], source.style[name])
        for name in STYLE_NAMES
        if all(shows(name, object.texture, object.colour) for object in (found, source))
    }


def style_agreement(found: list[Found]) -> list[dict[str, float]]:
    """Style errors of every two objects of one picture: small when they share their style."""
    return [style_errors(a, b) for i, a in enumerate(found) for b in found[:i]]
