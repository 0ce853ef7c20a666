"""Pictures to be drawn, as data: here, or on the machines of a Ray cluster, with the same result.

What a process has loaded it keeps, and pictures that are drawn in one batch stay together wherever that is.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import sampling

ROOT = Path(__file__).resolve().parent.parent
LEAST = 8  # pictures in a part, where each is a batch of its own: fewer would be more calls than work
LORAS = {
    "demo-model.safetensors": "demo-subject-lora.safetensors",
    "demo-dit.safetensors": "demo-dit-subject-lora.safetensors",
}
CHANGES: dict[str, Callable[[Any], Any]] = {  # of a MODEL, by name
    "none": lambda model: model,
    "kv": lambda model: sampling.swap_self_attention(model, "kv"),
    "qkv": lambda model: sampling.swap_self_attention(model, "qkv"),
    "each token alone": sampling.narrow_self_attention,
    "off": sampling.silence_self_attention,
}


class Drawing(NamedTuple):
    """Pictures of one demo model, one for each caption.

    weights: the model's file. change: what is done to its MODEL, of CHANGES or "LoRA", the subject's. batch: how many
    are drawn at once, on which their last digits depend. sources: the seeds of the runs of the same captions that feed
    these (changes "kv" and "qkv"). hints: [n, h, w, 3] for the ControlNet, with a batch of 1.
    """

    weights: Path
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    change: str = "none"
    batch: int = 16
    sources: tuple[int, ...] = ()
    hints: Tensor | None = None

    def parts(self) -> Iterator["Drawing"]:
        """The same pictures in order, a few at a time: whole batches."""
        size = self.batch * -(-LEAST // self.batch)
        for begin in range(0, len(self.captions), size):
            some = slice(begin, begin + size)
            yield self._replace(
                captions=self.captions[some],
                seeds=self.seeds[some],
                sources=self.sources[some],
                hints=None if self.hints is None else self.hints[some],
            )

    def draw(self) -> tuple[Tensor, float]:
        """(pictures [n, h, w, 3] in [0, 1], CPU seconds without loading)."""
        models = models_of(self.weights, self.change)
        net = None if self.hints is None else control_net(self.weights)
        began, pictures = time.process_time(), []
        for i in range(0, len(self.captions), self.batch):
            rows = slice(i, i + self.batch)
            captions, seeds, sources = self.captions[rows], self.seeds[rows], self.sources[rows]
            control = None if self.hints is None else (net, self.hints[rows])
            repeated = captions * 2 if sources else captions
            found = sampling.draw(
                models, repeated, [*sources, *seeds], len(repeated), steps=self.steps, control=control
            )
            pictures.append(found[len(sources) :])
        return torch.cat(pictures), time.process_time() - began


def drawn(drawing: Drawing, address: str | None = None) -> tuple[Tensor, float]:
    """(pictures, CPU seconds of all processes) of a drawing. address: of a Ray cluster whose machines share it."""
    if address is None:
        found = [part.draw() for part in drawing.parts()]
    else:
        from farm import map as farm_map  # the checkout's, which a script of this folder finds

        if drawing.weights.is_relative_to(ROOT):  # a worker's current folder is a copy of the checkout
            drawing = drawing._replace(weights=drawing.weights.relative_to(ROOT))
        parts, gpus = list(enumerate(drawing.parts())), int(torch.cuda.is_available())
        results = farm_map(draw_numbered, parts, address, gpus=gpus, prepare=sampling.start_comfyui)
        by_number = {number: result for (number, _), result in results}
        found = [by_number[number] for number, _ in parts]
    pictures, seconds = zip(*found, strict=True)
    return torch.cat(pictures), sum(seconds)


def draw_numbered(numbered: tuple[int, Drawing]) -> tuple[Tensor, float]:
    """What a worker does with (number, part)."""
    return numbered[1].draw()


@cache
def loaded(weights: Path) -> tuple:
    """(MODEL, CLIP, VAE) of a file; its text encoder knows the subject's embedding beside it."""
    model, clip, vae = sampling.load(weights)
    clip.tokenizer.clip_l.embedding_directory = str(weights.parent)
    return model, clip, vae


@cache
def models_of(weights: Path, change: str) -> tuple:
    """The same with a changed MODEL."""
    model, clip, vae = loaded(weights)
    return (with_lora(model, weights) if change == "LoRA" else CHANGES[change](model)), clip, vae


def with_lora(model: Any, weights: Path) -> Any:
    """A MODEL with its LoRA of the subject."""
    import comfy.sd
    import comfy.utils

    lora = comfy.utils.load_torch_file(str(weights.with_name(LORAS[weights.name])))
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@cache
def control_net(weights: Path) -> Any:
    """The ControlNet beside a model's file."""
    import comfy.controlnet
    import comfy.utils

    file = weights.with_name("demo-controlnet.safetensors")
    return comfy.controlnet.load_controlnet_state_dict(comfy.utils.load_torch_file(str(file)))
