"""What the methods cost on a diffusion transformer, as ratios to plain sampling taken in one run: composing, the
collage's bias, swaps and retouches.

python dev.py benchmark transformers
    Flux.1's structure at half its width with random weights, a few of its blocks: the ratios do not depend on how many
python dev.py benchmark transformers --size 128 --blocks 19 38 --width 3072 --steps 4
    Flux.1 at its full size and 1024x1024 pixels, on a GPU
"""

import argparse
from collections.abc import Callable

import torch

from ...methods.collage import CollageBias
from ...nodes.layout_retouch import MultiSourceSwap
from ...nodes.mca_ctrl import CollaborativeAttention
from ...patching.bias import attach
from ...patching.install import install
from ...patching.models import sites_of
from ...patching.schedule import Window
from ...workshop.collages import RED, THINGS, canvas, layer, plain
from ...workshop.random_transformers import FLUX, build_transformer, prompt
from ...workshop.sampling import inject, masks_of, recorder, sample
from . import bench
from .collage import SIDE, places

LAYERS = [2, 9, 20]  # of a collage
HEAD = 128  # channels of one head, as in Flux.1


class FluxBench(bench.Bench):
    """Flux.1's structure with random weights, sampled as it is used: a guidance embedding, and no CFG."""

    def __init__(self, size: int, steps: int, width: int, blocks: tuple[int, int], dtype: torch.dtype) -> None:
        """size: side of the latent. width: channels. blocks: (double, single)."""
        self.name, self.size, self.steps = f"Flux.1, width {width}, {blocks[0]} + {blocks[1]} blocks", size, steps
        self.settings = f"without CFG, {'GPU' if bench.CUDA else 'CPU'} {str(dtype).removeprefix('torch.')}"
        shape = {"hidden_size": width, "num_heads": width // HEAD, "axes_dim": [16, 56, 56]}
        depth = dict(zip(("depth", "depth_single_blocks"), blocks))
        self.model = build_transformer("Flux.1", dtype=dtype, **{**FLUX, **shape, **depth})
        self.positive, self.negative = prompt("Flux.1", 1, tokens=256), prompt("Flux.1", 2, tokens=256)

    @property
    def empty(self) -> dict[str, torch.Tensor]:
        return {"samples": torch.zeros(1, 16, self.size, self.size)}

    def sample(self, model, latent, positive=None, seed=1):
        return sample(model, latent, seed, positive or self.positive, self.negative, "euler", "simple", self.steps, 1.0)


def biased(on: FluxBench, count: int) -> Callable:
    """A case with the bias of so many layers, of one word each, at all blocks."""
    last: tuple = ()
    for thing, (x, y) in zip(THINGS, places(count)):
        last = layer(plain(RED), thing, x=x, y=y, scale=SIDE, behind=last)
    collage = canvas(last, width=8 * on.size, height=8 * on.size)[0]
    window = Window(0.0, 1.0, sites_of(on.model))
    owned = {2 * number: (number,) for number in range(count)}
    positive = attach(on.positive, CollageBias(window, collage, owned, 1.0, "log log"))
    model = install(on.model, heed_bias=True)
    return lambda: on.sample(model, on.empty, positive)


def subject_cases(on: FluxBench, subject: dict, condition: dict) -> dict[str, Callable]:
    """Swaps in which subject and edited area take half a picture each, and retouches, all over the whole schedule."""
    found: dict[str, Callable] = {}
    left = torch.zeros(1, 8 * on.size, 8 * on.size)
    left[:, :, : 4 * on.size] = 1
    windows = {"sagi_sites": "all", "salq_sites": "last half"}
    for name, sagi, salq in (("swap, SAGI", (0.0, 1.0), (1.0, 1.0)), ("swap, SALQ", (1.0, 1.0), (0.0, 1.0))):
        times = dict(zip(("sagi_start", "sagi_end", "salq_start", "salq_end"), (*sagi, *salq)))
        preset = {"preset": "custom", **windows, **times}
        patched = CollaborativeAttention.execute(
            on.model, subject, left, preset, 0, True, False, "SAGI first", 0.3, "soft", condition, 1 - left
        ).args
        found[name] = lambda patched=patched: on.sample(*patched)
    for name, mask in (("retouch, no mask", {}), ("retouch", {"mask": left})):
        patched = MultiSourceSwap.execute(on.model, condition, subject, 0.0, 0.0, 1.0, "last half", **mask).args
        found[name] = lambda patched=patched: on.sample(*patched)
    return found


def cases(on: FluxBench, images: list[int], layers: list[int]) -> dict[str, Callable]:
    """What is measured, by name."""
    stack = [on.sample(*recorder(on.model, on.empty, 0), seed=seed) for seed in range(max([2, *images]))]
    found: dict[str, Callable] = {"plain": on.plain, "record": lambda: on.sample(*recorder(on.model, on.empty, 0))}
    three = {"samples": on.empty["samples"].expand(3, -1, -1, -1)}
    found["plain, batch of 3"] = lambda: on.sample(on.model, three)
    found |= {f"collage, {count} layers": biased(on, count) for count in layers}
    found |= subject_cases(on, *stack[:2])
    for n in images:
        stripes = torch.arange(on.size).mul(n).div(on.size, rounding_mode="floor").long().expand(on.size, on.size)
        for how, exact in (("lockstep", False), ("replay", True)):
            patched = inject(stack[:n], masks_of(stripes, n), model=on.model, exact=exact)
            found[f"compose {n}, {how}"] = lambda patched=patched: on.sample(*patched)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="side of the latent")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 4], help="double and single")
    parser.add_argument("--images", type=int, nargs="*", default=[2, 4], help="of the composites")
    parser.add_argument("--layers", type=int, nargs="*", default=LAYERS, help="of the collages, at most 20")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    with torch.inference_mode():
        on = FluxBench(options.size, options.steps, options.width, options.blocks, getattr(torch, options.dtype))
        on.report(cases(on, options.images, options.layers), options.repeats)
