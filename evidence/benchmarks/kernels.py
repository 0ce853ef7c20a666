"""What the kernels cost by themselves: no model is needed.

python dev.py benchmark kernels        on one thread of a CPU; prints, and asserts nothing
"""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ...kernels import collage, graphcut, grid_masks, labels, noise_map, strokes
from . import bench

SIDE = 1024


def timed(what: str, function: Callable[[], Any], repeats: int = 3) -> None:
    times = [bench.seconds(function)[0] for _ in range(repeats)]
    print(f"  {what}: {statistics.median(times):.3f} s")


def memory(what: str, function: Callable[[], Any]) -> None:
    taken = bench.peak(function)
    print(f"  {what}: {'unknown' if taken is None else f'{taken:.0f} MB'} at the peak")


def cut(images: int, grid: int, channels: int = 320) -> None:
    """Smooth random keys and one stroke for each image, as photomontage.py has them, on any grid."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    blur = torch.nn.AvgPool2d(7, 1, 3)
    keys = [
        [blur(torch.randn(channels, grid, grid)).flatten(1).T.contiguous() * 30 for _ in range(2)]
        for _ in range(images)
    ]
    painted, scale = np.full((grid, grid), -1), grid / 64
    for label in range(images):
        y, x = rng.integers(4 * scale, grid - 12 * scale, 2)
        painted[y : y + int(6 * scale), x : x + int(8 * scale)] = label

    def whole() -> np.ndarray:
        distances = [graphcut.image_distances(halves, (grid, grid), 10) for halves in keys]
        edges = graphcut.edge_weights(distances, 100, graphcut.median_distance(distances))
        return graphcut.cut(graphcut.stroke_costs(painted, images), edges, "scipy")

    timed(f"components, weights and cut of {grid}x{grid} with {images} labels", whole)


def many_strokes(count: int = 200, points: int = 45) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    paths = [np.cumsum(rng.normal(0, 150, (points, 2)), 0) + rng.integers(1000, 9000, 2) for _ in range(count)]
    return [{"k": i % 4, "r": 250, "p": path.clip(-1000, 11000).ravel().tolist()} for i, path in enumerate(paths)]


def canvas(layers: int, side: int) -> Callable[[], Any]:
    picture = torch.rand(4, 256, 256)

    def layer(number: int) -> torch.Tensor:
        return collage.place(picture, (side, side), 0.3 + 0.4 * number / layers, 0.5, 0.4, 10.0 * number)

    def whole() -> torch.Tensor:
        _, masks = collage.over(layer, layers, torch.zeros(3, side, side))
        return noise_map.noise_map(masks, [0.5] * layers, 0.8, 10)

    return whole


def main() -> None:
    torch.set_num_threads(1)
    print(f"graph cut\n  (without gco-wrapper; {torch.get_num_threads()} thread)")
    cut(4, 64)
    cut(9, 128)
    print(f"masks of {SIDE}x{SIDE}")
    mask = (torch.rand(SIDE, SIDE) > 0.9999).float()
    for radius in (5, 64, 256):
        timed(f"dilation by {radius}", lambda radius=radius: grid_masks.dilate(mask, radius))
    for sigma in (10, 64, 65, 500):
        timed(f"blur of the noise map, sigma {sigma}", lambda sigma=sigma: noise_map.gaussian(mask, sigma))
    document = many_strokes()
    timed("drawing 200 strokes of 45 points", lambda: strokes.draw(document, 4, SIDE, SIDE))
    print("canvas")
    for layers, side in ((20, 1024), (200, 512)):
        timed(f"{layers} layers of {side}x{side}", canvas(layers, side), 1)
        memory(f"{layers} layers of {side}x{side}", canvas(layers, side))
    pictures, owner = torch.rand(32, SIDE, SIDE, 3), torch.randint(32, (SIDE, SIDE))
    memory(f"paste of 32 images of {SIDE}x{SIDE}", lambda: labels.paste(pictures, owner))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
