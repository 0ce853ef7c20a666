"""Small copies of pictures for the editors in the nodes, in ComfyUI's temp folder.

A file is named by the hash of its content: its address never changes meaning, an unchanged picture is written and
downloaded once, and the names tell the editor whether its strokes were painted on these pictures.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch
from PIL import Image

FOLDER = "montage"  # inside the temp folder
LONG_SIDE = 1024
THUMBNAIL = 128


def photograph(picture: torch.Tensor) -> str:
    """Keep a picture [H, W, 3] in [0, 1] as JPEG, and its thumbnail beside it; return its name."""
    image = shrunk(picture, Image.Resampling.LANCZOS)
    name = name_of(image)
    keep(f"{name}.jpg", image, quality=90)
    keep(f"{name}-small.jpg", image, THUMBNAIL, quality=85)
    return name


def diagram(picture: torch.Tensor) -> str:
    """Keep a picture of flat colours [H, W, 3] in [0, 1] as PNG; return its name."""
    image = shrunk(picture, Image.Resampling.NEAREST)
    name = name_of(image)
    keep(f"{name}.png", image)
    return name


def cutout(picture: torch.Tensor) -> str:
    """Keep a picture with alpha [H, W, 4] in [0, 1] as PNG; return its name."""
    image = shrunk(picture, Image.Resampling.LANCZOS)
    name = name_of(image)
    keep(f"{name}.png", image, compress_level=1)
    return name


def numbers(data: bytes) -> str:
    """Keep numbers for the editor's own arithmetic as they are; return their name."""
    name = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:20]
    put(f"{name}.bin", lambda passing: passing.write_bytes(data))
    return name


def shrunk(picture: torch.Tensor, resampling: Image.Resampling) -> Image.Image:
    image = Image.fromarray((picture.clamp(0, 1) * 255).round_().to(torch.uint8).numpy())
    image.thumbnail((LONG_SIDE, LONG_SIDE), resampling)
    return image


def name_of(image: Image.Image) -> str:
    return hashlib.sha1(f"{image.width}x{image.height} ".encode() + image.tobytes(), usedforsecurity=False).hexdigest()[
        :20
    ]


def keep(name: str, image: Image.Image, side: int = LONG_SIDE, **options: Any) -> None:
    """Write a picture unless it is there."""

    def write(passing: Path) -> None:
        image.thumbnail((side, side))
        image.save(passing, **options)

    put(name, write)


def put(name: str, write: Callable[[Path], object]) -> None:
    """Have a file written unless it is there; to a temporary name first, so that no client reads a partial file."""
    folder = Path(folder_paths.get_temp_directory()) / FOLDER
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        passing = folder / f"{uuid.uuid4().hex}-{name}"
        write(passing)
        os.replace(passing, folder / name)
