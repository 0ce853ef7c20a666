"""What a second phrase on the same picture costs, with full-size models of random weights.

    python dev.py benchmark localize [--detector swint|swinb|none] [--segmenter vit_b|none] [--width 1066 --height 800]

CPU-seconds, which other programs on the machine do not change much; on a GPU the clock, after synchronising.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from ...localize import files, grounding_dino, pipeline, segment_anything
from ...localize.managed import ManagedModel
from ...workshop import localize_reference as reference

DATA = Path(__file__).resolve().parents[2] / "tests" / "data"


def seeded(name: str) -> dict[str, torch.Tensor]:
    with safe_open(DATA / f"localize_{name}.safetensors", "pt") as file:
        return reference.seeded(json.loads(file.metadata()["shapes"]))


def seconds(work) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def compare(name: str, first, second) -> None:
    """first: the run that computes the features; second: one that finds them. Twice, the better one counts."""
    slow, fast = seconds(first), min(seconds(second), seconds(second))
    print(f"{name}: first phrase {slow:.2f} s, second phrase {fast:.2f} s, ratio {slow / fast:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="swint", choices=["swint", "swinb", "none"])
    parser.add_argument("--segmenter", default="vit_b", choices=["vit_b", "none"])
    parser.add_argument("--width", type=int, default=1066)
    parser.add_argument("--height", type=int, default=800)
    options = parser.parse_args()
    picture = np.random.default_rng(0).integers(0, 256, (options.height, options.width, 3), dtype=np.uint8)

    def nothing():
        pass

    if options.detector != "none":
        detector = ManagedModel(
            grounding_dino.build_detector(seeded(options.detector), reference.vocabulary()), files.DETECTOR_MEMORY
        )
        detector.load()
        compare(
            f"{options.detector} at {options.width}x{options.height}",
            lambda: pipeline.find(detector, [picture], ["a red cat"], 800, nothing),
            lambda: pipeline.find(detector, [picture], ["a blue dog"], 800, nothing),
        )
    if options.segmenter != "none":
        segmenter = ManagedModel(segment_anything.build_segmenter(seeded(options.segmenter)), files.SEGMENTER_MEMORY)
        segmenter.load()
        box = [[pipeline.Prompt((100.0, 100.0, 500.0, 400.0))]]
        other = [[pipeline.Prompt((600.0, 200.0, 900.0, 700.0))]]
        compare(
            options.segmenter,
            lambda: pipeline.cut(segmenter, [picture], box, nothing),
            lambda: pipeline.cut(segmenter, [picture], other, nothing),
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
