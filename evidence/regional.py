"""Collage Diffusion's cross-attention against the field's own regional prompting, attention couple."""

import argparse
import functools
from collections.abc import Iterator

import torch

from ..methods.collage import Collage
from ..nodes.collage import CollageNoise
from ..workshop.sampling import sample
from . import measurements, peers
from .collage import AREAS, BIASED, CFG, STEPS, Crowd

SAMPLES = 16
COUPLE = "GH + attention couple"


def coupled(example: Crowd, collage: Collage, image: torch.Tensor) -> torch.Tensor:
    """The picture of a collage whose layers' words reach their own places alone."""

    def encode(text: str) -> list:
        return example.clip.encode_from_tokens_scheduled(example.clip.tokenize(text))

    positive, latent = encode(collage.prompt), example.encoded(image)
    regions = [
        ((mask > 0.5).float(), encode(layer.text)[0][0])
        for layer, mask in zip(collage.layers, collage.masks)
        if (mask > 0.5).any()
    ]
    model = peers.attention_couple(example.model, regions, positive[0][0], latent["samples"].shape[-2:])
    model, denoise = CollageNoise.execute(model, collage, 1.0).args
    found = sample(model, latent, example.seed, positive, encode(""), "euler_ancestral", "normal", STEPS, CFG, denoise)[
        "samples"
    ]
    return example.vae.decode(found)[0].clamp(0, 1)


@functools.cache  # the pictures that are measured are shown
def pictures(number: int) -> tuple[Crowd, Collage, torch.Tensor, dict[str, torch.Tensor]]:
    example = Crowd(number)
    collage, image = example.collage()
    found = {
        BIASED: example.sampled(collage, image)[1],
        COUPLE: coupled(example, collage, image),
        AREAS: example.sampled(collage, image, bias=False, areas=True)[1],
    }
    return example, collage, image[0], found


def measure(number: int) -> dict[str, dict]:
    example, collage, _, found = pictures(number)
    return {name: example.found(collage, picture) for name, picture in found.items()}


def shown(number: int) -> list[torch.Tensor]:
    _, _, image, found = pictures(number)
    return [image, *found.values()]


def sections(options: argparse.Namespace) -> Iterator[measurements.Section]:
    if "unet" not in measurements.models(options):
        return
    count = SAMPLES // (10 if options.quick else 1)
    found = measurements.Study("collage-couple", options.folder).run(range(count), measure, options.address)
    claims = [
        measurements.claim(what, found.difference(BIASED, COUPLE, figure), 1, "(our comparison)")
        for what, figure in (
            ("CA puts more objects in place than attention couple", "placed"),
            ("CA puts more objects in place and shape than attention couple", "shaped"),
        )
    ]
    best = found.best(BIASED, "shaped")
    yield measurements.Section(
        "Collage Diffusion: against attention couple",
        "\n\n".join(
            [
                (
                    f"{count} of the collages above. *attention couple*, written here for this comparison: each"
                    " layer's area attends to that layer's words alone, and areas without a layer to the whole"
                    " prompt; the noise map and the starting latent are those of the collage. It does not have to"
                    " locate words in a prompt, but needs a text encoding and a cross-attention for every layer."
                ),
                found.table(placed="in place", shaped="in place and shape"),
                measurements.markdown(measurements.CLAIMS, claims),
                measurements.grid(
                    "collage-couple",
                    [shown(number) for number in range(min(measurements.FIRST, count))],
                    ["layers", "GH+CA", "attention couple", "areas"],
                    chosen=(shown(best), f"of {count} samples, the first with the most objects in shape by our method"),
                ),
            ]
        ),
    )
