"""Studies: the numbers of many samples, kept as they come, and the tables, verdicts and picture grids made of them.

A module of this folder holds one method's studies: `sections(options)`, which yields Sections for docs/evidence.md.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import comfy.utils
import torch
from PIL import Image, ImageDraw, ImageFont

comfy.utils.set_progress_bar_enabled(False)

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "demo" / "weights"
PICTURES = ROOT / "docs" / "evidence"
MODELS = ("unet", "dit")
FIRST = 4  # samples that are shown as they come


class Section(NamedTuple):
    """A part of the page: a title and its Markdown."""

    title: str
    text: str


class Interval(NamedTuple):
    """A mean and the half width of its 95 % interval (normal approximation)."""

    mean: float
    half: float
    n: int

    def __str__(self):
        if self.n < 2:
            return f"{self.mean:.3f}" if self.n else "-"
        return f"{self.mean:.3f} ± {self.half:.3f}"

    @classmethod
    def of(cls, values):
        values = [float(value) for value in values if value is not None and math.isfinite(value)]
        n = len(values)
        mean = sum(values) / n if n else math.nan
        variance = sum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
        return cls(mean, 1.96 * math.sqrt(variance / n) if n else math.nan, n)


class Study:
    """Figures by sample and variant. Each sample is appended to a file as soon as it is measured, so that a killed run
    goes on where it was; the file belongs to the weights of its demo model and is begun anew with others."""

    def __init__(self, name, folder, model="unet"):
        """model: which of MODELS these samples are of."""
        files = [
            path
            for path in sorted(WEIGHTS.glob("*.safetensors"))
            if path.stem == "demo-reader" or ("dit" if "demo-dit" in path.stem else "unet") == model
        ]
        weights = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
        self.name, self.path = name, Path(folder) / f"{name}-{weights}.jsonl"
        self.samples = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                sample, found = json.loads(line)
                self.samples[sample] = found

    def run(self, samples, measure, address=None):
        """Measure what is missing. samples: of numbers; measure(sample) -> {variant: {figure: number or None}}.
        address: of a Ray cluster whose machines share the work.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        missing = [sample for sample in samples if sample not in self.samples]
        for sample, found in measured(missing, measure, address):
            self.samples[sample] = found
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([sample, found]) + "\n")
            print(f"{self.name}: {len(self.samples)}", flush=True)
        self.samples = {sample: self.samples[sample] for sample in samples}
        return self

    @property
    def variants(self):
        return list(dict.fromkeys(variant for found in self.samples.values() for variant in found))

    def of(self, variant, figure):
        """Every sample's value, None where there is none."""
        return [found.get(variant, {}).get(figure) for found in self.samples.values()]

    def mean(self, variant, figure):
        return Interval.of(self.of(variant, figure))

    def best(self, variant: str, figure: str, sign: int = 1, over: str = "") -> Any:
        """The sample in which a figure, or what it gains over another variant, is largest (sign 1) or smallest (-1),
        of those that are not shown anyway: the first few.
        """
        values = self.gains(variant, over, figure) if over else self.of(variant, figure)
        known = {n: value for n, value in zip(self.samples, values) if value is not None}
        others = [sample for sample in list(self.samples)[FIRST:] if sample in known]
        return max(others or known, key=lambda sample: sign * known[sample])

    def gains(self, variant: str, other: str, figure: str) -> list[float | None]:
        """Every sample's variant - other, None where one of them is missing."""
        pairs = zip(self.of(variant, figure), self.of(other, figure))
        return [None if a is None or b is None else a - b for a, b in pairs]

    def difference(self, variant: str, other: str, figure: str) -> "Interval":
        """Interval of the paired difference variant - other, over the samples that have both."""
        return Interval.of(gain for gain in self.gains(variant, other, figure) if gain is not None)

    def table(self, **figures):
        """Markdown: a row for each variant, a column for each figure. figures: key=title."""
        head = ["", *figures.values(), "n"]
        rows = [
            [
                variant,
                *(str(self.mean(variant, key)) for key in figures),
                str(max(self.mean(variant, key).n for key in figures)),
            ]
            for variant in self.variants
        ]
        return markdown(head, rows)


def measured(samples: list, measure: Callable, address: str | None) -> Iterator[tuple]:
    """Yield (sample, measure(sample)): in order, or as they come from the machines of the Ray cluster at `address`."""
    if address is None:
        return ((sample, measure(sample)) for sample in samples)
    from ..farm import map as farm_map

    here = partial(in_inference_mode, measure)
    return farm_map(here, samples, address, gpus=int(torch.cuda.is_available()), prepare=prepare_worker)


def in_inference_mode(measure: Callable, sample: Any) -> Any:
    """What main() does around the measuring in this process, on a worker."""
    with torch.inference_mode():
        return measure(sample)


def prepare_worker() -> None:
    """Put ComfyUI and the pack in place on a worker, whose current folder is a copy of this checkout."""
    import os
    import sys

    sys.path.insert(0, os.path.abspath("workshop"))
    import bootstrap

    bootstrap.start()


def models(options: argparse.Namespace) -> tuple[str, ...]:
    """The demo models that a study is to be made on."""
    return (options.model,) if options.model else MODELS


def markdown(head, rows):
    """A Markdown table of strings."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def verdict(difference, sign=1):
    """What a paired difference says of an ordering: sign 1 where the first should be larger, -1 where smaller."""
    if difference.n < 2 or abs(difference.mean) <= difference.half:
        return "not decided"
    return "reproduced" if difference.mean * sign > 0 else "not reproduced"


def claim(text, difference, sign=1, paper=""):
    """A row of a table of claims: what the paper says, its number, the paired difference here, the verdict."""
    return [text, paper, f"{difference} (n {difference.n})", verdict(difference, sign)]


CLAIMS = ["claim", "the paper's number", "paired difference here, 95 %", "verdict"]


def grid(
    name: str, rows: Sequence[Sequence], titles: Sequence[str], side: int = 176, chosen: tuple | None = None
) -> str:
    """Write docs/evidence/NAME.jpg: rows of pictures [h, w, 3] in [0, 1] under column titles, the first samples as they
    come. Returns its Markdown.

    chosen: (a row of pictures, how it was chosen), which stands apart below the others.
    """
    bar = 18
    canvas = Image.new(
        "RGB", (len(titles) * side, bar + len(rows) * side + (chosen is not None) * (bar + side)), "white"
    )
    pen = ImageDraw.Draw(canvas)
    pen.font = ImageFont.load_default(13)
    for column, title in enumerate(titles):
        pen.text((column * side + 3, 1), title, fill="black")
    for number, row in enumerate(rows):
        _paste_row(canvas, row, bar + number * side, side)
    note = f"The first {len(rows)} samples, unselected"
    if chosen is not None:
        row, why = chosen
        below = bar + len(rows) * side
        pen.text((3, below + 1), f"chosen: {why}", fill="black")
        _paste_row(canvas, row, below + bar, side)
        note += f"; the row below was chosen: {why}"
    PICTURES.mkdir(parents=True, exist_ok=True)
    canvas.save(PICTURES / f"{name}.jpg", quality=85)
    return f"![{name}](evidence/{name}.jpg)\n\n*{note}.*"


def _paste_row(canvas: Image.Image, row: Sequence, top: int, side: int) -> None:
    for column, picture in enumerate(row):
        tile = Image.fromarray((torch.as_tensor(picture).float().clamp(0, 1) * 255).round().byte().cpu().numpy())
        canvas.paste(tile.resize((side, side), Image.Resampling.LANCZOS), (column * side, top))
