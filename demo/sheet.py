"""The demo's contact sheet: one row for each workflow, its pictures in the order of their names.

    python sheet.py OUT.png < {"workflow name": ["picture.png", ...], ...}
"""
import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, MARGIN, CAPTION = 256, 12, 18


def caption(path):
    """photomontage-4-labels_00001_.png -> labels"""
    return " ".join(Path(path).stem.rstrip("_").rsplit("_", 1)[0].split("-")[2:]) or Path(path).stem


def sheet(rows):
    """rows: {title: [picture paths]} -> one RGB image."""
    rows = {title: sorted(paths) for title, paths in rows.items() if paths}
    height = MARGIN + len(rows) * (SIZE + 2 * CAPTION + MARGIN)
    canvas = Image.new("RGB", (MARGIN + max(map(len, rows.values()), default=1) * (SIZE + MARGIN), height), "white")
    pen, y = ImageDraw.Draw(canvas), MARGIN
    for title, paths in rows.items():
        pen.text((MARGIN, y), title, fill="black")
        for column, path in enumerate(paths):
            x = MARGIN + column * (SIZE + MARGIN)
            canvas.paste(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS), (x, y + CAPTION))
            pen.text((x, y + CAPTION + SIZE + 2), caption(path), fill="black")
        y += SIZE + 2 * CAPTION + MARGIN
    return canvas


if __name__ == "__main__":
    sheet(json.load(sys.stdin)).save(sys.argv[1])
