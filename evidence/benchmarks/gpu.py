"""Everything that this pack costs on a GPU, and whether its identities hold in half precision, in under eight minutes.

python tests/benchmarks/gpu.py
    the structures of SD1.5, SDXL and Flux with random weights, in fp16 and bf16, at 512x512 and 1024x1024 pixels. Needs
    a ComfyUI (COMFYUI_PATH) and its Python, and no network
python dev.py benchmark gpu --small
    the same cases on small structures: runs anywhere

Prints a table for each model: milliseconds a step, ratio to plain sampling, peak memory, and GB of features moved a
step. --out writes the figures as JSON too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import torch

from ...patching import transfers
from ...workshop.random_models import random_model, text_encoder
from ...workshop.sampling import inject, masks_of, recorder, words
from . import bench, collage, layout_retouch, mca_ctrl, photomontage, transformers

Case = Callable[[], Any]
TARGETS = {
    "record": 1.05,
    "record and cache": 1.05,
    "compose 2, cache": 1.10,
    "compose 4, cache": 1.10,
    **{f"compose {n}, {how}": n + 1.05 for n in (2, 4) for how in ("replay", "lockstep")},
    **{f"{collage}{count} layers": 1.05 for collage in ("", "collage, ") for count in transformers.LAYERS},
}
CACHE_MB = 1 << 20


class Setting(NamedTuple):
    """name: of the structure ("flux": the transformer's). dtype: of the weights. size: side of the latent."""

    name: str
    dtype: torch.dtype
    size: int


FULL = [
    Setting("sd15", torch.float16, 64),
    Setting("sdxl", torch.float16, 128),
    Setting("flux", torch.bfloat16, 64),
    Setting("sd15", torch.bfloat16, 64),
    Setting("sd15", torch.float16, 128),
    Setting("sdxl", torch.bfloat16, 64),
    Setting("flux", torch.bfloat16, 128),
]  # the most telling first: what no time is left for is left out
SMALL = [Setting("sd15-small", torch.float32, 8), Setting("flux", torch.float32, 8)]


class Moved:
    """Bytes of features that were sent to the model's device or put away, while it is entered."""

    def __enter__(self) -> "Moved":
        self.bytes, self.original = 0, (transfers.send, transfers.put_away)
        send, put_away = self.original

        def counted_send(parts: list[torch.Tensor], like: torch.Tensor) -> transfers.Arriving:
            self.bytes += sum(part.nbytes for part in parts)
            return send(parts, like)

        def counted_put_away(rows: torch.Tensor) -> torch.Tensor:
            self.bytes += rows.nbytes
            return put_away(rows)

        transfers.send, transfers.put_away = counted_send, counted_put_away
        return self

    def __exit__(self, *_: object) -> None:
        transfers.send, transfers.put_away = self.original


class Structure(bench.Bench):
    """A UNet of SD1.5's or SDXL's structure."""

    def __init__(self, setting: Setting, steps: int) -> None:
        self.name, self.size, self.steps, self.vae = setting.name, setting.size, steps, None
        if setting.name.endswith("-small"):
            self.model = random_model(setting.name)
        else:
            self.model = bench.build(setting.name)
            self.model.model.to(setting.dtype).diffusion_model.dtype = setting.dtype
        self.clip = text_encoder(setting.name)
        self.positive, self.negative = (words(seed, name=setting.name) for seed in (1, 2))


def unet_cases(on: bench.Bench) -> dict[str, Case]:
    retouch, edit = layout_retouch.cases(on), mca_ctrl.cases(on)
    return {
        **photomontage.cases(on),
        **{f"{count} layers": collage.biased(on, count) for count in (2, 9, 20)},
        "token map": retouch["token map"],
        "retouch": retouch["retouch"],
        "swap (SAGI)": edit["SAGI"],
        "swap (SALQ)": edit["SALQ"],
    }


def bench_of(setting: Setting, steps: int, small: bool) -> tuple[bench.Bench, dict[str, Case]]:
    """A model to measure with, and its cases."""
    if setting.name != "flux":
        on = Structure(setting, steps)
        return on, unet_cases(on)
    width, blocks = (256, (1, 1)) if small else (3072, (10, 20))  # the ratios do not depend on how many
    flux = transformers.FluxBench(setting.size, steps, width, blocks, setting.dtype)
    return flux, transformers.cases(flux, *(([2], [2]) if small else ([2, 4], transformers.LAYERS)))


def identity(on: bench.Bench) -> float:
    """How far a composite of base tokens alone is from the base image, at most: 0 where it is equal to the bit. The
    images are replayed.
    """
    stack = [on.sample(*recorder(on.model, on.empty, 0), seed=seed) for seed in (1, 2)]
    labels = masks_of(torch.zeros(on.size, on.size, dtype=torch.long), 2)
    found = on.sample(*inject(stack, labels, model=on.model))
    return float((found["samples"] - stack[0]["samples"]).abs().max())


def figures(on: bench.Bench, cases: dict[str, Case], repeats: int, deadline: float) -> Iterator[dict[str, Any]]:
    """The figures of each case, as long as there is time."""
    plain = None
    for name, act in cases.items():
        if time.monotonic() > deadline:
            return
        act()  # warms up, and keeps what a second composite reads
        with Moved() as moved:
            act()
        taken = statistics.median(bench.seconds(act)[0] for _ in range(repeats)) / on.steps
        plain = taken if plain is None else plain
        yield {
            "case": name,
            "ms": 1000 * taken,
            "ratio": taken / plain,
            "target": TARGETS.get(name),
            "peak MB": bench.peak(act),
            "GB a step": moved.bytes / on.steps / 2**30,
        }


def printed(row: dict[str, Any]) -> str:
    target = "" if row["target"] is None else f"{row['target']:.2f}"
    peak = "" if row["peak MB"] is None else f"{row['peak MB']:.0f}"
    return f"| {row['case']} | {row['ms']:.2f} | {row['ratio']:.3f} | {target} | {peak} | {row['GB a step']:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small structures, few steps")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.5, help="nothing is begun after them")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    steps, repeats = options.steps or (2 if options.small else 8), 1 if options.small else options.repeats
    deadline, found = time.monotonic() + 60 * options.minutes, []
    device = torch.cuda.get_device_name() if bench.CUDA else "CPU"
    print(f"{device}, torch {torch.__version__}, {steps} steps, median of {repeats}")
    for setting in SMALL if options.small else FULL:
        if time.monotonic() > deadline:
            print(f"\n{setting}: no time is left")
            continue
        name = f"{setting.name} {str(setting.dtype).removeprefix('torch.')}, latent {setting.size}x{setting.size}"
        on, cases = bench_of(setting, steps, options.small)
        print(f"\n{name}\n\n| case | ms a step | ratio | target | peak MB | GB a step |\n|---|---|---|---|---|---|")
        for row in figures(on, cases, repeats, deadline):
            print(printed(row), flush=True)
            found.append({"model": name, **row})
        difference = identity(on)
        print(f"\nall labels base: {difference:g} from the base image", flush=True)
        found.append({"model": name, "case": "identity", "difference": difference})
        if options.out:
            options.out.write_text(json.dumps({"device": device, "figures": found}, indent=1))
        comfy.model_management.unload_all_models()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
