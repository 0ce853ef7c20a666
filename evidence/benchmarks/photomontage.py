"""What Generative Photomontage costs, as ratios to plain sampling taken in one run.

python dev.py benchmark photomontage
    the demo model and the full-size SD1.5 structure, and the graph cut
python dev.py benchmark photomontage --models sd15 --size 64 --steps 10
    512x512 pixels; in fp16 where there is a GPU
"""

import statistics
from functools import partial

import numpy as np
import torch

from ...kernels import graphcut
from ...patching.streams import streams_of
from ...workshop.sampling import inject, masks_of, recorder, sample
from . import bench


def recorded(on, cache_mb, seed=1):
    return on.sample(*recorder(on.model, on.empty, cache_mb), seed=seed)


def composing(on, images, cache_mb):
    """The composite of a stack of images, whose features are cached, or replayed (cache_mb 0)."""
    stripes = torch.arange(on.size).mul(images).div(on.size, rounding_mode="floor").long().expand(on.size, on.size)
    patched = inject(
        [recorded(on, cache_mb, seed) for seed in range(images)], masks_of(stripes, images), model=on.model
    )
    return lambda: on.sample(*patched)


def cases(on, images=(2, 4)):
    """What is measured, by name."""
    found = {"plain": on.plain, "record": lambda: recorded(on, 0), "record and cache": lambda: recorded(on, 1 << 20)}
    for n in images:
        found[f"compose {n}, cache"] = composing(on, n, 1 << 20)
        found[f"compose {n}, replay"] = composing(on, n, 0)
    return found


def stored(on):
    """Bytes of one image and step: of the latent, of the cached features, and of Q, K and V of all self-attention
    layers.
    """
    run = streams_of("benchmark", [recorded(on, 1 << 20)])[0].run
    seen, watched = {}, on.model.clone()
    watched.set_model_attn1_patch(
        lambda n, k, v, extra: (seen.setdefault((extra["block"], extra["block_index"]), 3 * n.nbytes), (n, k, v))[1]
    )
    sample(watched, on.empty, positive=on.positive, negative=on.negative, steps=1)
    return on.empty["samples"].nbytes, run.evaluation_bytes, sum(seen.values())


def measure_cut(images=4, grid=64, repeats=5):
    rng = np.random.default_rng(0)
    blur = torch.nn.AvgPool2d(7, 1, 3)
    keys = [
        [blur(torch.randn(320, grid, grid)).flatten(1).T.contiguous() * 30 for _ in range(2)] for _ in range(images)
    ]
    strokes = np.full((grid, grid), -1)
    for label in range(images):
        y, x = rng.integers(4, grid - 12, 2)
        strokes[y : y + 6, x : x + 8] = label
    times = {"components": [], "scipy": [], "gco": []}
    for _ in range(repeats):
        taken, distances = bench.seconds(lambda: [graphcut.image_distances(k, (grid, grid), 10) for k in keys])
        times["components"].append(taken)
        edges = graphcut.edge_weights(distances, 100, graphcut.median_distance(distances))
        costs = graphcut.stroke_costs(strokes, images)
        energies = set()
        for solver in ("scipy", "gco"):
            try:
                taken, labels = bench.seconds(partial(graphcut.cut, costs, edges, solver))
            except ImportError:
                continue
            times[solver].append(taken)
            energies.add(graphcut.energy(labels, costs, edges))
    median = {what: statistics.median(taken) for what, taken in times.items() if taken}
    print(
        f"\ngraph cut, {grid}x{grid}, {images} labels: components {median['components']:.3f} s, scipy"
        f" {median['scipy']:.3f} s, together {median['components'] + median['scipy']:.3f} s"
    )
    if "gco" in median:
        print(
            f"  gco {median['gco']:.3f} s (scipy takes {median['scipy'] / median['gco']:.1f} times as long); energies"
            f" {energies}"
        )


if __name__ == "__main__":
    parser = bench.arguments(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    with torch.inference_mode():
        measure_cut()
        measure_cut(9, 128)
        for on in bench.benches(options):
            on.report(cases(on, options.images), options.repeats)
            latent, kept, all_of_it = stored(on)
            print(
                f"  stored for an image and step: latent {latent / 2**10:.1f} KB, cache {kept / 2**20:.2f} MB; "
                f"Q, K and V of all layers: {all_of_it / 2**20:.2f} MB ({kept / all_of_it:.3f})"
            )
