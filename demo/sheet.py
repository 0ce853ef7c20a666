"""The demo's contact sheet: each workflow's pictures, in the order of their names.

python sheet.py OUT.png < {"workflow name": ["picture.png", ...], ...}
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, MARGIN, CAPTION, COLUMNS = 256, 12, 18, 8


def caption(path):
    """photomontage-4-labels_00001_.png -> labels"""
    return " ".join(Path(path).stem.rstrip("_").rsplit("_", 1)[0].split("-")[2:]) or Path(path).stem


def sheet(rows):
    """rows: {title: [picture paths]} -> one RGB image."""
    lines = [
        (title if not start else "", sorted(paths)[start : start + COLUMNS])
        for title, paths in rows.items()
        for start in range(0, len(paths), COLUMNS)
    ]
    width = max((len(paths) for _, paths in lines), default=1)
    canvas = Image.new(
        "RGB", (MARGIN + width * (SIZE + MARGIN), MARGIN + len(lines) * (SIZE + 2 * CAPTION + MARGIN)), "white"
    )
    pen, y = ImageDraw.Draw(canvas), MARGIN
    for title, paths in lines:
        pen.text((MARGIN, y), title, fill="black")
        for column, path in enumerate(paths):
            x = MARGIN + column * (SIZE + MARGIN)
            canvas.paste(
                Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), (x, y + CAPTION)
            )
            pen.text((x, y + CAPTION + SIZE + 2), caption(path), fill="black")
        y += SIZE + 2 * CAPTION + MARGIN
    return canvas


if __name__ == "__main__":
    sheet(json.load(sys.stdin)).save(sys.argv[1])
