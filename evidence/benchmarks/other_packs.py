"""What two methods cost beside what the field does for the same wish, as ratios to plain sampling taken in one run:
ComfyUI's own areas, and the packs attention-couple-ComfyUI (laksjdjf) and style_aligned_comfy (brianfitzgerald).

python dev.py benchmark other_packs --packs FOLDER
    FOLDER: where both are cloned (default: custom_nodes of the ComfyUI that is used). Without one, its rows are missing
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch

from nodes import ConditioningCombine, ConditioningSetMask

from . import bench, collage, photomontage

COUPLE, STYLE_ALIGNED = "attention-couple-ComfyUI", "style_aligned_comfy"
CACHE_MB = 1 << 20
REGIONS, IMAGES = (2, 9), 2


def default_folder() -> Path:
    return Path(folder_paths.get_folder_paths("custom_nodes")[0])


def nodes_of(folder: Path, pack: str) -> dict[str, Any] | None:
    """The node classes of a pack in a folder, loaded as ComfyUI does; None where it is not there."""
    path, name = folder / pack / "__init__.py", f"other_{pack}".replace("-", "_")
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].NODE_CLASS_MAPPINGS


def coupled(on: bench.Bench, nodes: dict[str, Any], count: int) -> Callable[[], Any]:
    """Attention couple with so many regions, stripes that cover the canvas."""
    stripes = torch.arange(8 * on.size).mul(count).div(8 * on.size, rounding_mode="floor").expand(8 * on.size, -1)
    positive = []
    for number in range(count):
        region = ConditioningSetMask().append(on.positive, (stripes == number).float()[None], "default", 1.0)[0]
        positive = ConditioningCombine().combine(positive, region)[0]
    model, positive, _ = nodes["Attention couple"]().attention_couple(on.model, positive, on.negative, "Attention")
    return lambda: on.sample(model, on.empty, positive)


def style_aligned(on: bench.Bench, nodes: dict[str, Any], count: int) -> Callable[[], Any]:
    """A batch of so many images in the style of the first. The node puts functions into the model's own norms, which
    are taken out again.
    """

    def sample() -> Any:
        (model,) = nodes["StyleAlignedBatchAlign"]().patch(on.model, "both", "q+k", 1.0)
        try:
            return on.sample(model, {"samples": on.empty["samples"].repeat(count, 1, 1, 1)})
        finally:
            for module in on.model.model.modules():
                module.__dict__.pop("forward", None)
                module.__dict__.pop("orig_forward", None)

    return sample


def cases(on: bench.Bench, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    rows = IMAGES + 1
    batch = {"samples": on.empty["samples"].repeat(rows, 1, 1, 1)}
    found = {"plain": on.plain, f"plain, batch of {rows}": lambda: on.sample(on.model, batch)}
    couple, aligned = nodes_of(folder, COUPLE), nodes_of(folder, STYLE_ALIGNED)
    for count in REGIONS:
        found[f"collage of {count} layers"] = collage.biased(on, count)
        found[f"{count} areas of ComfyUI"] = collage.areas(on, count)
        if couple:
            found[f"{count} regions of attention couple"] = coupled(on, couple, count)
    found[f"composite of {IMAGES} images, cached"] = photomontage.composing(on, IMAGES, CACHE_MB)
    found[f"composite of {IMAGES} images, replayed"] = photomontage.composing(on, IMAGES, 0)
    if aligned:
        found[f"style aligned, batch of {rows}"] = style_aligned(on, aligned, rows)
    return found


if __name__ == "__main__":
    parser = bench.arguments(__doc__)
    parser.add_argument("--packs", type=Path, default=default_folder())
    options = parser.parse_args()
    with torch.inference_mode():
        for on in bench.benches(options):
            on.report(cases(on, options.packs), options.repeats)
