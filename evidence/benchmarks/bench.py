"""What the benchmarks share: models to measure with, and how to measure."""

import argparse
import ctypes
import gc
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.utils
import torch

from ...workshop.random_models import STRUCTURES, build, demo_model, half, text_encoder
from ...workshop.sampling import sample, words

comfy.utils.set_progress_bar_enabled(False)

CUDA = torch.cuda.is_available()
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


def seconds(function):
    """(seconds, result) of a call: of the clock on a GPU; of processor time on a CPU, which other processes disturb
    less.
    """
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
    """MB that a call takes at its peak above what is there before it: of the GPU, or of main memory; None where neither
    tells.
    """
    gc.collect()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not RESET.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # memory that was given back, but not yet to the system
    RESET.write_text("5")
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def _status(field):
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1])


class Cost(NamedTuple):
    """Of one call: the rounds' seconds, rows that the UNet evaluated (a CFG step of one image: 2), MB at its peak or
    None.
    """

    seconds: list
    rows: int
    peak: float | None


class Bench:
    """A model to measure with, and its conditioning: the demo model, or a structure with random weights."""

    settings = f"with CFG, {'GPU fp16' if CUDA else 'CPU fp32'}"

    def __init__(self, name, size=16, steps=6):
        """name: "demo" or of STRUCTURES. size: side of the latent."""
        self.name, self.size, self.steps = name, size, steps
        if name == "demo":
            self.model, self.clip, self.vae = demo_model()
            self.positive, self.negative = self.encode("a red ball on grass"), self.encode("")
        else:
            self.model, self.clip, self.vae = (
                build(name),
                text_encoder(name),
                None,
            )  # the encoder's widths are small: for its tokens alone
            if CUDA:
                half(self.model)
            self.positive, self.negative = words(1, name=name), words(2, name=name)

    @property
    def empty(self):
        return {"samples": torch.zeros(1, 4, self.size, self.size)}

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def with_features(self, conditioning):
        """A CONDITIONING of the encoder, with random features where the encoder's are too narrow: the positions of its
        words alone count.
        """
        if self.name == "demo":
            return conditioning
        features, settings = self.positive[0]
        return [[features, {**conditioning[0][1], **settings}]]

    def sample(self, model, latent, positive=None, seed=1):
        return sample(model, latent, seed, positive or self.positive, self.negative, "ddim", "normal", self.steps, 3.0)

    def plain(self):
        return self.sample(self.model, self.empty)

    def rows(self, function):
        """Rows that the UNet evaluates in a call."""
        counted = []
        hook = self.model.model.diffusion_model.register_forward_pre_hook(
            lambda module, inputs: counted.append(len(inputs[0]))
        )
        try:
            function()
        finally:
            hook.remove()
        return sum(counted)

    def measure(self, cases, repeats=3):
        """{case: Cost} of {case: function}, round by round, so that a machine's moods fall on all alike."""
        rows = {case: self.rows(function) for case, function in cases.items()}  # and warms up
        times = {case: [] for case in cases}
        for _ in range(repeats):
            for case, function in cases.items():
                times[case].append(seconds(function)[0])
        return {case: Cost(times[case], rows[case], peak(function)) for case, function in cases.items()}

    def report(self, cases, repeats=3, plain="plain"):
        """Measures, and prints each case beside the plain one."""
        costs = self.measure(cases, repeats)
        print(
            f"\n{self.name}, latent {self.size}x{self.size}, {self.steps} steps {self.settings},"
            f" median of {repeats} rounds"
        )
        for case, cost in costs.items():
            ratios = [a / b for a, b in zip(cost.seconds, costs[plain].seconds)]
            ratio = statistics.median(cost.seconds) / statistics.median(costs[plain].seconds)
            memory = "" if cost.peak is None else f"   peak {cost.peak:.0f} MB"
            print(
                f"  {case:<28} {statistics.median(cost.seconds) / self.steps * 1000:9.1f} ms a step   {ratio:5.2f} of"
                f" {plain}   (round by round {min(ratios):.2f} to {max(ratios):.2f})   {cost.rows / self.steps:.1f}"
                f" rows a step{memory}"
            )
        return costs


def arguments(description):
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", "sd15"], choices=["demo", *STRUCTURES])
    parser.add_argument("--size", type=int, default=16, help="side of the latent")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    return parser


def benches(options):
    """A Bench for each model of the command line, the last one's memory given back before the next."""
    for name in options.models:
        yield Bench(name, options.size, options.steps)
        comfy.model_management.unload_all_models()
