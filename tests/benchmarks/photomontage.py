"""What Generative Photomontage costs, as ratios to plain sampling taken in one run.

    python tests/benchmarks/photomontage.py                       the demo model and the full-size SD1.5 structure, and the graph cut
    python tests/benchmarks/photomontage.py --models sd15 --size 64 --steps 10      512x512 pixels; in fp16 where there is a GPU

Needs COMFYUI_PATH and the Python of that ComfyUI. Prints, and asserts nothing.
"""
import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import conftest  # noqa: E402, F401  puts ComfyUI and the pack in place

import comfy.model_management  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from montage.kernels import graphcut  # noqa: E402
from montage.patching.streams import streams_of  # noqa: E402
from sampling import inject, masks_of, recorder, sample, words  # noqa: E402
from structures import STRUCTURES, build, demo_model  # noqa: E402

CUDA = torch.cuda.is_available()


def seconds(function):
    """(seconds, result) of a call: of the clock on a GPU; of processor time on a CPU, which other processes disturb less."""
    if not CUDA:
        began = time.process_time()
        result = function()
        return time.process_time() - began, result
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return time.perf_counter() - began, result


def peak(function):
    """Peak GPU memory of a call in MB, or None."""
    if not CUDA:
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**20


def model_of(name):
    if name == "demo":
        model, clip, _ = demo_model()
        return model, clip.encode_from_tokens_scheduled(clip.tokenize("a red ball on grass")), clip.encode_from_tokens_scheduled(clip.tokenize(""))
    model = build(name)
    if CUDA:
        model.model.half()
        model.model.manual_cast_dtype = None
    return model, words(1, name=name), words(2, name=name)


def measure(name, size, steps, repeats, images):
    model, positive, negative = model_of(name)
    empty = {"samples": torch.zeros(1, 4, size, size)}
    settings = dict(positive=positive, negative=negative, steps=steps)

    def record(cache_mb, seed=1):
        return sample(*recorder(model, empty, cache_mb), seed=seed, **settings)

    stripes = {n: masks_of(torch.arange(size).mul(n).div(size, rounding_mode="floor").long().expand(size, size), n) for n in images}
    cached = [record(1 << 20, seed) for seed in range(max(images))]
    replayed = [record(0, seed) for seed in range(max(images))]
    cases = {"plain": lambda: sample(model, empty, **settings), "record": lambda: record(0), "record and cache": lambda: record(1 << 20)}
    for n in images:
        for kind, stack in (("cache", cached), ("replay", replayed)):
            composing = inject(stack[:n], stripes[n], model=model)
            cases[f"compose {n}, {kind}"] = lambda composing=composing: sample(*composing, **settings)
    times = {case: [] for case in cases}
    for repeat in range(repeats + 1):
        for case, function in cases.items():
            taken, _ = seconds(function)
            if repeat:  # the first round warms up
                times[case].append(taken / steps)
    print(f"\n{name}, latent {size}x{size}, {steps} steps with CFG, {'GPU fp16' if CUDA else 'CPU fp32'}, median of {repeats} rounds")
    plain = times["plain"]
    for case, taken in times.items():
        ratios = [a / b for a, b in zip(taken, plain)]
        memory = peak(cases[case])
        ratio = statistics.median(taken) / statistics.median(plain)
        print(f"  {case:<20} {statistics.median(taken) * 1000:9.1f} ms a step   {ratio:5.2f} of plain"
              f"   (round by round {min(ratios):.2f} to {max(ratios):.2f})" + (f"   peak {memory:.0f} MB" if memory else ""))
    run = streams_of("benchmark", cached[:1])[0].run
    kept, seen = run.evaluation_bytes, {}
    watched = model.clone()
    watched.set_model_attn1_patch(lambda n, k, v, extra: (seen.setdefault((extra["block"], extra["block_index"]), 3 * n.nbytes), (n, k, v))[1])
    sample(watched, empty, **{**settings, "steps": 1})
    print(f"  cached for an image and step: {kept / 2**20:.2f} MB; Q, K and V of all layers: {sum(seen.values()) / 2**20:.2f} MB ({kept / sum(seen.values()):.3f})")


def measure_cut(images=4, grid=64, repeats=5):
    rng = np.random.default_rng(0)
    blur = torch.nn.AvgPool2d(7, 1, 3)
    keys = [[blur(torch.randn(320, grid, grid)).flatten(1).T.contiguous() * 30 for _ in range(2)] for _ in range(images)]
    strokes = np.full((grid, grid), -1)
    for label in range(images):
        y, x = rng.integers(4, grid - 12, 2)
        strokes[y:y + 6, x:x + 8] = label
    times = {"components": [], "scipy": [], "gco": []}
    for _ in range(repeats):
        taken, distances = seconds(lambda: [graphcut.image_distances(k, (grid, grid), 10) for k in keys])
        times["components"].append(taken)
        edges = graphcut.edge_weights(distances, 100, graphcut.median_distance(distances))
        costs = graphcut.stroke_costs(strokes, images)
        energies = set()
        for solver in ("scipy", "gco"):
            try:
                taken, labels = seconds(lambda solver=solver: graphcut.cut(costs, edges, solver))
            except ImportError:
                continue
            times[solver].append(taken)
            energies.add(graphcut.energy(labels, costs, edges))
    median = {what: statistics.median(taken) for what, taken in times.items() if taken}
    print(f"\ngraph cut, {grid}x{grid}, {images} labels: components {median['components']:.3f} s, scipy {median['scipy']:.3f} s, "
          f"together {median['components'] + median['scipy']:.3f} s")
    if "gco" in median:
        print(f"  gco {median['gco']:.3f} s (scipy takes {median['scipy'] / median['gco']:.1f} times as long); energies {energies}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "sd15"], choices=["demo", *STRUCTURES])
    parser.add_argument("--size", type=int, default=16, help="side of the latent")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    with torch.inference_mode():
        measure_cut()
        for model_name in options.models:
            measure(model_name, options.size, options.steps, options.repeats, options.images)
            comfy.model_management.unload_all_models()
