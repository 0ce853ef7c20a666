"""What composing costs on a diffusion transformer, as ratios to plain sampling taken in one run.

python dev.py benchmark transformers
    Flux.1's structure at half its width with random weights, a few of its blocks: the ratios do not depend on how many
python dev.py benchmark transformers --size 128 --blocks 19 38 --width 3072 --steps 4
    Flux.1 at its full size and 1024x1024 pixels, on a GPU
"""

import argparse
from collections.abc import Callable

import torch

from ...patching.engine import Engine
from ...workshop.random_transformers import FLUX, build_transformer, prompt
from ...workshop.sampling import inject, masks_of, recorder, sample
from . import bench

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


def replayed(act: Callable) -> Callable:
    """A case in which streams are replayed instead of going in lockstep."""

    def case():
        Engine.exact = True
        try:
            return act()
        finally:
            Engine.exact = False

    return case


def cases(on: FluxBench, images: list[int]) -> dict[str, Callable]:
    """What is measured, by name."""
    stack = [on.sample(*recorder(on.model, on.empty, 0), seed=seed) for seed in range(max(images))]
    found: dict[str, Callable] = {"plain": on.plain, "record": lambda: on.sample(*recorder(on.model, on.empty, 0))}
    for n in images:
        stripes = torch.arange(on.size).mul(n).div(on.size, rounding_mode="floor").long().expand(on.size, on.size)
        patched = inject(stack[:n], masks_of(stripes, n), model=on.model)
        found[f"compose {n}, lockstep"] = lambda patched=patched: on.sample(*patched)
        found[f"compose {n}, replay"] = replayed(found[f"compose {n}, lockstep"])
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=48, help="side of the latent")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--blocks", type=int, nargs=2, default=[2, 4], help="double and single")
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    with torch.inference_mode():
        on = FluxBench(options.size, options.steps, options.width, options.blocks, getattr(torch, options.dtype))
        on.report(cases(on, options.images), options.repeats)
