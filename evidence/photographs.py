"""Real photographs through the methods: does everything run, and does what must stay stay? The demo autoencoder and
models have seen drawn scenes alone, so nothing here says how a photograph would look on a large model.
"""

import argparse
from collections.abc import Callable, Iterator

import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler

from ..demo import metrics
from ..methods.collage import Collage
from ..nodes.record import InvertImage
from ..workshop.collages import canvas, layer
from ..workshop.photographs import NAMES, photograph
from ..workshop.random_models import demo_model, demo_transformer
from ..workshop.sampling import inject, masks_of, sample
from . import measurements
from .collage import Example

SIZE = 128
SETTINGS = {"unet": ("ddim", "normal", 12), "dit": ("euler", "simple", 16)}  # sampler, scheduler, steps
TITLES = {"unet": "Real photographs: smoke test", "dit": "Real photographs, on the transformer: smoke test"}


class Photographs:
    """All photographs, encoded and inverted together."""

    def __init__(self, model: str) -> None:
        self.model, self.clip, self.vae = demo_model() if model == "unet" else demo_transformer()
        self.settings = SETTINGS[model]
        self.pictures = torch.stack([photograph(name, SIZE) for name in NAMES])
        self.empty = self.encode("")
        self.encoded = self.vae.encode(self.pictures)
        sigmas = BasicScheduler.execute(self.model, *self.settings[1:], 1.0).args[0]
        self.history = InvertImage.execute(self.model, {"samples": self.encoded}, sigmas, self.empty).args[0]

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def composed(self, number: int, masks: torch.Tensor) -> torch.Tensor:
        """A latent of this photograph and the next one, by masks [2, H, W], out of this one's noise."""
        rows = [
            {**self.history, "samples": self.history["samples"][row : row + 1]}
            for row in (number, (number + 1) % len(NAMES))
        ]
        return sample(*inject(rows, masks, 0, self.model), 1, self.empty, self.empty, *self.settings, 1.0)["samples"]

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(samples)[0].clamp(0, 1)


def ellipse(side: int = SIZE) -> torch.Tensor:
    """A mask [side, side] for a cut-out."""
    at = (torch.arange(side) + 0.5) / side * 2 - 1
    return ((at[None] ** 2 + (at[:, None] / 0.8) ** 2) < 0.5).float()


def collage_of(number: int) -> tuple[Collage, torch.Tensor]:
    """(Collage, its picture [1, H, W, 3]) of an oval cut out of a photograph, locked, on another one that is free."""
    behind, picture = (photograph(NAMES[(number + k) % len(NAMES)], SIZE) for k in (1, 0))
    last = layer(
        torch.cat([behind, torch.ones(SIZE, SIZE, 1)], -1)[None], "a ball on grass", trim=False, noise=0.9, node="0"
    )
    last = layer(
        torch.cat([picture, ellipse()[..., None]], -1)[None], "a ball", trim=False, noise=0.0, behind=last, node="1"
    )
    return canvas(last, SIZE, SIZE, "a ball on grass", background_noise=0.9, blur=3.0)[:2]


def measure(model: str) -> Callable[[int], dict[str, dict]]:
    """measure(number) -> figures of one photograph."""

    def one(number: int) -> dict[str, dict]:
        photos = Photographs(model)
        halves = masks_of(torch.arange(SIZE).ge(SIZE // 2).long().expand(SIZE, SIZE), 2)
        nothing = masks_of(torch.zeros(SIZE, SIZE, dtype=torch.long), 2)
        round_trip = photos.decode(photos.encoded[number : number + 1])
        other = photos.decode(photos.encoded[[(number + 1) % len(NAMES)]])
        paste = torch.where(halves[0][..., None] > 0.5, round_trip, other)
        own, composed = photos.composed(number, nothing), photos.composed(number, halves)
        figures = {
            "round trip": metrics.masked_psnr(round_trip, photos.pictures[number], torch.ones(SIZE, SIZE)),
            "inverted": metrics.masked_psnr(photos.decode(own), round_trip, torch.ones(SIZE, SIZE)),
            "composed": metrics.masked_psnr(photos.decode(composed), paste, torch.ones(SIZE, SIZE)),
            "finite": float(bool(composed.isfinite().all())),
        }
        if model == "unet":
            figures["locked"] = locked(number)
        return {NAMES[number]: figures}

    return one


def locked(number: int) -> float:
    """The largest change of the latent where a locked cut-out of a photograph lies in a collage."""
    example = Example(0, 2)
    collage, image = collage_of(number)
    latent, _ = example.sampled(collage, image)
    still = torch.nn.functional.interpolate(collage.noise[None, None], size=latent.shape[-2:], mode="nearest-exact")
    return (latent - example.encoded(image)["samples"]).abs().amax(1)[0][still[0, 0] == 0].max().item()


def sections(options: argparse.Namespace) -> Iterator[measurements.Section]:
    for model in measurements.models(options):
        found = measurements.Study(f"photographs-{model}", options.folder, model).run(
            range(len(NAMES)), measure(model), options.address
        )
        text = (
            f"Four photographs from scikit-image ({', '.join(NAMES)}; public domain or CC0), {SIZE}x{SIZE} pixels,"
            " without a prompt. PSNR (dB): of the autoencoder's *round trip*; of the photograph *inverted* and"
            " sampled back, as a composite of itself alone; of two photographs *composed* half and half, both"
            " against their round trips. *finite*: the share of latents without NaN."
        )
        if model == "unet":
            text += (
                " *locked*: the largest change of the latent under an oval cut-out of the photograph with denoise 0"
                " in a collage."
            )
        text += (
            " The demo's autoencoder and denoisers were trained on drawn scenes only: this shows that photographs"
            " pass through inversion, masks, cut-outs and composite, and says nothing about how they would look."
        )
        figures = ["round trip", "inverted", "composed", "finite", *(["locked"] if model == "unet" else [])]
        columns = {name: name for name in figures}
        yield measurements.Section(TITLES[model], f"{text}\n\n{found.table(**columns)}")
