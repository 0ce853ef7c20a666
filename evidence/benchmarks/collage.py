"""What Collage Diffusion costs, as ratios to plain sampling taken in one run, beside ComfyUI's own area conditioning.

python dev.py benchmark collage
    the demo model and the full-size SD1.5 structure
python dev.py benchmark collage --models sd15 --size 64 --steps 10 --layers 2 9 20
    512x512 pixels; in fp16 where there is a GPU
"""

import torch

from nodes import ConditioningCombine, ConditioningSetArea

from ...nodes.collage import CollageCrossAttn, CollageNoise
from ...workshop.collages import RED, THINGS, canvas, layer, plain
from . import bench

SIDE = 0.3  # of a layer and of an area, in parts of the canvas


def places(count):
    """Centres of so many layers, in fractions of the canvas."""
    across = next(side for side in range(1, count + 1) if side * side >= count)
    return [((number % across + 0.5) / across, (number // across + 0.5) / across) for number in range(count)]


def collage_of(on, count):
    last = ()
    for thing, (x, y) in zip(THINGS, places(count)):
        last = layer(plain(RED), thing, x=x, y=y, scale=SIDE, behind=last)
    return canvas(last, width=8 * on.size, height=8 * on.size, blur=3.0)[0]


def steered(on, collage):
    """(MODEL, CONDITIONING) with the bias of a collage's layers, in its own prompt."""
    node = (1.0, "log log", 0.0, 1.0, "all")
    model, positive = CollageCrossAttn.execute(on.model, on.clip, collage, *node).args
    return model, on.with_features(positive)


def biased(on, count):
    """Cross-attention with the bias of so many layers."""
    model, positive = steered(on, collage_of(on, count))
    return lambda: on.sample(model, on.empty, positive)


def harmonised(on, count):
    """And a noise for each layer."""
    collage = collage_of(on, count)
    model, positive = steered(on, collage)
    model, _ = CollageNoise.execute(model, collage, 4.0).args
    return lambda: on.sample(model, {"samples": torch.ones_like(on.empty["samples"])}, positive)


def areas(on, count):
    """ComfyUI's own way: a prompt for the whole, and one for each area."""
    positive, side, whole = on.positive, max(8, round(on.size * SIDE)), 8 * on.size
    for x, y in places(count):
        left, top = (int(min(max(0, whole * centre - 4 * side), whole - 8 * side)) // 8 * 8 for centre in (x, y))
        one = ConditioningSetArea().append(on.positive, 8 * side, 8 * side, left, top, 1.0)[0]
        positive = ConditioningCombine().combine(positive, one)[0]
    return lambda: on.sample(on.model, on.empty, positive)


def cases(on, layers=(2, 9, 20)):
    """What is measured, by name."""
    found = {"plain": on.plain}
    for count in layers:
        found[f"{count} layers"] = biased(on, count)
    found[f"{layers[-1]} layers and noise"] = harmonised(on, layers[-1])
    for count in layers:
        found[f"{count} areas of ComfyUI"] = areas(on, count)
    return found


if __name__ == "__main__":
    parser = bench.arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 9, 20], help="at most 20")
    options = parser.parse_args()
    with torch.inference_mode():
        for on in bench.benches(options):
            on.report(cases(on, options.layers), options.repeats)
