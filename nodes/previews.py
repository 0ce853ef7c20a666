"""Small copies of pictures for the stroke editor, in ComfyUI's temp folder.

A file is named by the hash of its content: its address never changes meaning, an unchanged picture is written and
downloaded once, and the names tell the editor whether its strokes were painted on these pictures.
"""
import hashlib
import io
import os
import uuid
from pathlib import Path

import folder_paths
import numpy as np
from PIL import Image

FOLDER = "montage"  # inside the temp folder
LONG_SIDE = 1024
THUMBNAIL = 128


def photograph(picture):
    """Write a picture [H, W, 3] in [0, 1] as JPEG, and its thumbnail beside it; return its name."""
    image = shrunk(picture, Image.Resampling.LANCZOS)
    data = encoded(image, "JPEG", quality=90)
    name = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:20]
    write(f"{name}.jpg", data)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    write(f"{name}-small.jpg", encoded(image, "JPEG", quality=85))
    return name


def diagram(picture):
    """Write a picture of flat colours [H, W, 3] in [0, 1] as PNG; return its name."""
    data = encoded(shrunk(picture, Image.Resampling.NEAREST), "PNG")
    name = hashlib.sha1(data, usedforsecurity=False).hexdigest()[:20]
    write(f"{name}.png", data)
    return name


def shrunk(picture, resampling):
    image = Image.fromarray((picture.clamp(0, 1) * 255).round().numpy().astype(np.uint8))
    image.thumbnail((LONG_SIDE, LONG_SIDE), resampling)
    return image


def encoded(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write(name, data):
    """Under a passing name first, so that nobody is ever served half a file."""
    folder = Path(folder_paths.get_temp_directory()) / FOLDER
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        passing = folder / f"{uuid.uuid4().hex}.part"
        passing.write_bytes(data)
        os.replace(passing, folder / name)
