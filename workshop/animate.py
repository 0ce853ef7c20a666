"""Joins the frames of workshop/painting.mjs, and pictures to end with, into one animation.

python workshop/animate.py FRAMES OUT.webp [PICTURE.png ...]
"""

import argparse
from pathlib import Path

from PIL import Image, ImageOps

WIDTH = 480  # pixels
LAST = 2600  # milliseconds that each picture at the end is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frames", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path, nargs="*")
    chosen = parser.parse_args()
    frames, durations = [], []
    for path in sorted(chosen.frames.glob("*.png")):
        picture = Image.open(path).convert("RGB")
        frames.append(picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS))
        durations.append(int(path.stem.partition("-")[2]))
    for path in chosen.pictures:
        picture = Image.open(path).convert("RGB")
        frames.append(ImageOps.pad(picture, frames[0].size, Image.Resampling.LANCZOS, color="#202020"))
        durations.append(LAST)
    frames[0].save(
        chosen.out, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80, method=6
    )
    print(f"{chosen.out}: {len(frames)} frames, {chosen.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
