"""What the methods cost: beside plain sampling in the same run, beside the released codes' evaluations, and how it
grows.
"""

import statistics

import numpy as np

from . import measurements
from .benchmarks import bench, collage, layout_retouch, mca_ctrl, photomontage
from .methods import METHODS

BENCHMARKS = {method.title: method.benchmark for method in METHODS.values()}
SIDE = 16  # of the demo model's latent
MODELS = {
    "demo": (SIDE, 6, 3),
    "sd15": (32, 2, 2),
    "sdxl": (16, 2, 1),
}  # name: (side of the latent, steps, rounds); the structures are slow without a GPU
GROWTH = {"side of the latent": (8, 16, 32), "steps": (4, 8, 16), "images": (2, 4, 8), "layers": (2, 6, 20)}
FOLLOWED = (
    "plain",
    "compose 2, cache",
    "compose 2, replay",
    "2 layers",
    "SAGI",
    "SALQ",
    "retouch",
)  # as side and steps grow


def beside_plain(key):
    """{case: figures} of one model and method. key: "model, method"."""
    name, method = key.split(", ")
    side, steps, rounds = MODELS[name]
    on = bench.Bench(name, side, steps)
    return relative(on, BENCHMARKS[method].cases(on), rounds)


def relative(on, cases, rounds):
    """{case: figures} relative to the case "plain", of {case: function}."""
    costs = on.measure(cases, rounds)
    plain = costs["plain"]
    return {
        case: {
            "ratio": statistics.median(cost.seconds) / statistics.median(plain.seconds),
            "rows": cost.rows / on.steps,
            "peak": cost.peak and cost.peak / plain.peak,
        }
        for case, cost in costs.items()
    }


def comparison(found, method):
    """The table of one method: its cases by model."""
    models = [key.split(", ")[0] for key in found.samples if key.endswith(method)]
    first = found.samples[f"{models[0]}, {method}"]

    def cell(model, case, figure):
        value = found.samples[f"{model}, {method}"].get(case, {}).get(figure)
        return "-" if value is None else f"{value:.2f}"

    return measurements.markdown(
        [
            method,
            "UNet rows a step",
            *(f"time, {model}" for model in models),
            *(f"peak memory, {model}" for model in models),
        ],
        [
            [
                case,
                f"{figures['rows']:.1f}",
                *(cell(model, case, figure) for figure in ("ratio", "peak") for model in models),
            ]
            for case, figures in first.items()
        ],
    )


def grown(variable):
    """{case: {value of the variable: seconds}} on the demo model."""
    found = {}
    for value in GROWTH[variable]:
        on = bench.Bench(
            "demo", value if variable == "side of the latent" else SIDE, value if variable == "steps" else 4
        )
        if variable == "images":
            cases = {
                case.replace(f" {value},", ","): run
                for case, run in photomontage.cases(on, (value,)).items()
                if case.startswith("compose")
            }
        elif variable == "layers":
            cases = {
                case.replace(f"{value} ", ""): run
                for case, run in collage.cases(on, (value,)).items()
                if case != "plain"
            }
        else:
            cases = {
                case: run
                for method in BENCHMARKS.values()
                for case, run in method.cases(on).items()
                if case in FOLLOWED
            }
        for case, cost in on.measure(cases, 2).items():
            found.setdefault(case, {})[str(value)] = statistics.median(cost.seconds)
    return found


def exponent(times):
    """p of seconds ~ value ** p, by least squares of the logarithms."""
    return np.polyfit(np.log([float(value) for value in times]), np.log(list(times.values())), 1)[0]


def evaluations(_):
    """Rows that the UNet evaluates for one image, everything included, beside the released codes'."""
    three, fifty = bench.Bench("demo", 8, 20), bench.Bench("demo", 8, 50)
    forty = bench.Bench("demo", 8, 40)  # 50 steps at denoise 0.8
    composed = {cache: photomontage.composing(three, 3, cache) for cache in (1 << 20, 0)}
    histories = []
    inversions = fifty.rows(lambda: histories.extend(mca_ctrl.inverted(fifty)))
    swap = {preset: mca_ctrl.collaborating(fifty, histories, preset) for preset in ("notebook edit", "paper swap")}
    recording = 3 * three.rows(lambda: photomontage.recorded(three, 0))
    return {
        "Generative Photomontage: three images, 20 steps, cached": {
            "here": recording + three.rows(composed[1 << 20]),
            "released": 120 + 40,
        },
        "Generative Photomontage: replayed, nothing stored": {
            "here": recording + three.rows(composed[0]),
            "released": 120 + 40,
        },
        "Collage Diffusion: 9 layers, 50 steps at denoise 0.8": {
            "here": forty.rows(collage.harmonised(forty, 9)),
            "released": 80,
        },
        **{
            f"MCA-Ctrl: {preset}, 50 steps, two inversions": {
                "here": inversions + fifty.rows(lambda patched=patched: fifty.sample(*patched)),
                "released": 500,
            }
            for preset, patched in swap.items()
        },
        "Layout-and-Retouch: both stages, 50 steps, inversion": {
            "here": fifty.rows(layout_retouch.cases(fifty)["both stages, inversion"]),
            "released": "500 to 600",
        },
    }


def kept(_):
    """MB kept for one image of 512x512 and one step of SD1.5 in fp16: half of the features that fp32 has here, and the
    latents, which ComfyUI samples in fp32 all the same.
    """
    latent, cache, everything = (size / 2**20 for size in photomontage.stored(bench.Bench("sd15", 64, 1)))
    return {
        "a recorded or inverted trajectory": {"MB": latent},
        "Feature Recorder's cache": {"MB": cache / 2},
        "Q, K and V of all layers (released code)": {"MB": everything / 2},
    }


def plots(found):
    """docs/evidence/growth.png. Returns its Markdown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(GROWTH), figsize=(16, 4))
    for axis, (variable, cases) in zip(axes, found.samples.items()):
        for case, times in cases.items():
            axis.loglog([float(value) for value in times], list(times.values()), marker="o", label=case)
        axis.set(xlabel=variable, ylabel="CPU-seconds" if not bench.CUDA else "seconds")
        axis.legend(fontsize=7)
    figure.tight_layout()
    measurements.PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(measurements.PICTURES / "growth.png", dpi=60)
    pyplot.close(figure)
    return "![growth](evidence/growth.png)"


def sections(options):
    models = ["demo"] if options.quick else MODELS
    sizes = "; ".join(
        f"{model}: latent {side}x{side}, {steps} steps, median of {rounds}"
        for model, (side, steps, rounds) in MODELS.items()
    )
    device = "GPU, fp16" if bench.CUDA else "CPU, fp32, processor time"
    found = measurements.Study("cost", options.folder).run(
        [f"{model}, {method}" for model in models for method in BENCHMARKS], beside_plain
    )
    yield measurements.Section(
        "Cost: relative to plain sampling",
        "\n\n".join(
            [
                (
                    f"Time and peak memory relative to plain sampling of one image in the same run ({device}): the"
                    f" demo model, and SD1.5 and SDXL at full size with random weights ({sizes}). *UNet rows a step*:"
                    " the rows of the batch that the UNet evaluates in a step, 2 for one image with CFG. With"
                    " latents this small, the overhead of each call weighs most; `python dev.py benchmark` takes"
                    " other sizes (`--size 64`: 512 pixels)."
                ),
                *(comparison(found, method) for method in BENCHMARKS),
            ]
        ),
    )

    counted, stored = (
        measurements.Study(name, options.folder).run(["all"], measure).samples["all"]
        for name, measure in (("cost-evaluations", evaluations), ("cost-bytes", kept))
    )
    yield measurements.Section(
        "Cost: evaluations and bytes",
        "\n\n".join(
            [
                (
                    "Rows that the UNet evaluates for one finished image (2 a step with CFG), counted here, and for"
                    " the released code taken from its source."
                ),
                measurements.markdown(
                    ["", "here", "released code"],
                    [[case, row["here"], row["released"]] for case, row in counted.items()],
                ),
                "Kept for one image of 512x512 and one step, SD1.5 in fp16:",
                measurements.markdown(["", "MB"], [[what, f"{row['MB']:.2f}"] for what, row in stored.items()]),
            ]
        ),
    )

    found = measurements.Study("cost-growth", options.folder).run(GROWTH, grown)
    yield measurements.Section(
        "Cost: how it grows",
        "\n\n".join(
            [
                (
                    "Exponents p of time ~ value^p on the demo model, by least squares"
                    f" ({', '.join(f'{variable} {values}' for variable, values in GROWTH.items())})."
                ),
                measurements.markdown(
                    ["grows with", "case", "exponent"],
                    [
                        [variable, case, f"{exponent(times):.2f}"]
                        for variable, cases in found.samples.items()
                        for case, times in cases.items()
                    ],
                ),
                plots(found),
            ]
        ),
    )
