"""Pictures to feed the pack with: scenes, cut-outs with alpha, the subject's photos, a ControlNet layout.
`python demo/inputs.py FOLDER` writes them as PNG; the same files every time."""

import sys
from pathlib import Path

if not __package__:  # started as a script: find the rest as the package that this folder is
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    __package__ = "demo"

import torch
from torch import Tensor

from . import scenes, subject

SEED = 2026
# One style for all, so that pieces of different pictures could belong together.
STYLE = {
    "hue": 0.0,
    "brightness": 0.1,
    "angle": 0.12,
    "period": 14 / 128,
    "tint": 0.0,
    "light": 0.62,
    "outline": 2 / 128,
}


def objects() -> scenes.Scenes:
    """Six scenes of one object each, a shape and a background of its own in each."""
    drawn = scenes.sample(6, torch.Generator().manual_seed(SEED), count=1)
    drawn.background[:] = torch.arange(6)
    drawn.shape[:, 0] = torch.arange(6)
    drawn.colour[:, 0] = torch.tensor([0, 2, 3, 5, 1, 4])
    drawn.texture[:, 0] = torch.tensor([1, 3, 0, 2, 0, 1])
    return drawn.with_style(**STYLE)


def pictures(size: int = 128) -> dict[str, Tensor]:
    """Name -> (3 or 4, size, size) in [0, 1]; four channels are straight colour and alpha."""
    drawn = objects()
    rendered = scenes.render(drawn, size, torch.Generator().manual_seed(SEED))
    cut, layouts = scenes.cutouts(drawn, 0, size), scenes.layout(drawn, size)
    named = {}
    for i, name in enumerate(scenes.SHAPES):
        named |= {f"scene-{name}": rendered[i], f"cutout-{name}": cut[i], f"layout-{name}": layouts[i]}
    photos, shown = subject.photos(size)
    named |= {f"subject-{i}": photo for i, photo in enumerate(shown)}
    return named | {"cutout-subject": scenes.cutouts(photos.take(slice(1)), 0, size)[0]}


def write(folder: Path, size: int = 128) -> list[Path]:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, picture in pictures(size).items():
        paths.append(folder / f"{name}.png")
        Image.fromarray((picture.movedim(0, -1) * 255 + 0.5).byte().numpy()).save(paths[-1])
    return paths


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])), sep="\n")
