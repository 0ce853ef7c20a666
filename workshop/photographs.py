"""Real photographs for tests and evidence: scikit-image's, in the public domain or CC0 (its data/README.txt).

The demo autoencoder has seen drawn scenes alone: what it makes of them says nothing about photographs.
"""

import functools

import numpy as np
import torch
from PIL import Image

NAMES = ("astronaut", "chelsea", "coffee", "rocket")  # they lie in the package: nothing is downloaded


@functools.cache
def photograph(name: str, side: int = 128) -> torch.Tensor:
    """The middle square of a photograph, [side, side, 3] in [0, 1]."""
    from skimage import data

    picture = Image.fromarray(getattr(data, name)())
    least = min(picture.size)
    left, top = ((length - least) // 2 for length in picture.size)
    square = picture.crop((left, top, left + least, top + least)).resize((side, side), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)
