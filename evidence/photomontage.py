"""Generative Photomontage (arXiv 2408.07116): is each region kept, and can its seams be seen? On the demo UNet, and on
the demo transformer.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from nodes import ControlNetApplyAdvanced

from ..demo import detector, metrics, scenes
from ..kernels import graphcut, labels
from ..workshop.random_models import demo_control_net, demo_model, demo_transformer
from ..workshop.sampling import cut, inject, recorder, sample
from . import measurements, peers, perceptual

SIZE, CFG, FIRST = 128, 3.0, 910_000
BASE, COUNT, GRID = 0, 3, (SIZE // 8, SIZE // 8)
MARGIN = 4  # pixels between a region's edge and what is measured in it (the paper's 512 pixels: 16)
OURS = "composite (ours)"
SHARED = "attention shared (as StyleAligned)"


class Stack:
    """One sample: a scene of two objects, three images of its layout, and strokes that keep an object from each of
    two. On the UNet, with a ControlNet that gives all three the same outlines.
    """

    SETTINGS = ("ddim", "normal", 12)  # sampler, scheduler, steps
    TOKENS = GRID  # of the graph cut's features

    def __init__(self, number, prompts):
        self.model, self.clip, self.vae = demo_model()
        generator = torch.Generator().manual_seed(FIRST + number)
        scene = scenes.sample(1, generator, count=2)
        hint = scenes.layout(scene, SIZE).movedim(1, -1)
        self.conditioning = [
            ControlNetApplyAdvanced().apply_controlnet(
                self.encode(caption), self.encode(""), demo_control_net(), hint, 1.0, 0.0, 1.0
            )
            for caption in self.captions(scene, generator, prompts)
        ]
        self.draw(number)
        objects = scenes.masks(scene, SIZE)[0]
        background = torch.from_numpy(distance_transform_edt(objects.sum(0) == 0) > 12).float()
        kept = [torch.from_numpy(binary_erosion(mask > 0.5, iterations=3)).float() for mask in objects[:2]]
        self.strokes = self.apart([background, *kept])

    def draw(self, number):
        """Record the images."""
        self.seeds = [FIRST + COUNT * number + k for k in range(COUNT)]
        empty = {"samples": torch.zeros(1, 4, *GRID)}
        self.latents = [self.sampled(*recorder(self.model, empty, 64), k) for k in range(COUNT)]
        self.images = [self.decode(latent["samples"]) for latent in self.latents]

    @staticmethod
    def apart(strokes):
        """Strokes [N, H, W] of which each belongs to one image."""
        strokes = torch.stack(strokes)
        return strokes * (strokes.sum(0) < 2)

    @staticmethod
    def captions(scene, generator, prompts):
        """ "one": the same words for all, which leave colours and textures open; "own": a different prompt for every
        image, an empty one for the base.
        """
        if prompts == "one":
            return [scenes.caption(scene, 0, without=("colour", "texture"))] * COUNT
        others = scenes.sample(COUNT, generator, count=2)._replace(shape=scene.shape.expand(COUNT, -1))
        return ["", *(scenes.caption(others, row) for row in range(1, COUNT))]

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def decode(self, samples):
        return self.vae.decode(samples)[0].clamp(0, 1)

    def sampled(self, model, latent, image):
        positive, negative = self.conditioning[image]
        return sample(model, latent, self.seeds[image], positive, negative, *self.SETTINGS, CFG)

    def cut_in_features(self):
        """(masks [N, H, W], paste) of the node."""
        masks, _, paste = cut(
            self.latents, [image[None] for image in self.images], stroke_masks=self.strokes, base=BASE, sigma=0.0
        )[:3]
        return masks, paste[0]

    def cut_in_pixels(self):
        """The same energy over the images' colours instead of their keys."""
        cells = [
            torch.nn.functional.adaptive_avg_pool2d(image.movedim(-1, 0), self.TOKENS).movedim(0, -1)
            for image in self.images
        ]
        distances = [tuple(d.double().numpy() for d in graphcut.neighbour_distances(cell)) for cell in cells]
        edges = graphcut.edge_weights(distances, 100.0, graphcut.median_distance(distances))
        owner = graphcut.alpha_expansion(
            graphcut.stroke_costs(labels.pool(self.strokes, self.TOKENS).numpy(), COUNT), edges
        )
        masks = labels.to_masks(labels.at_grid(torch.from_numpy(owner), (SIZE, SIZE)), COUNT)
        return masks, (masks[..., None] * torch.stack(self.images)).sum(0)

    def composed(self, masks, **ablation):
        return self.decode(self.sampled(*inject(self.latents, masks, BASE, self.model, **ablation), BASE)["samples"])

    def shared(self, masks: torch.Tensor) -> torch.Tensor:
        """The base's noise with attention shared as in StyleAligned: each region with the image it is kept from."""
        return self.decode(self.sampled(*peers.share(self.latents, masks, BASE, self.model), BASE)["samples"])

    def poisson(self, masks):
        """Gradient-domain blending of the paste (OpenCV's seamlessClone), region by region into the base."""
        result = _bytes(self.images[BASE])
        for image, mask in zip(self.images[1:], masks[1:]):
            inside = np.pad((mask.numpy() * 255).astype(np.uint8), 8)
            if inside.any():
                y, x = (range_.min() + (range_.max() - range_.min()) // 2 for range_ in inside.nonzero())
                frame = np.pad(result, ((8, 8), (8, 8), (0, 0)), mode="edge")
                source = np.pad(_bytes(image), ((8, 8), (8, 8), (0, 0)), mode="edge")
                result = cv2.seamlessClone(source, frame, inside, (int(x), int(y)), cv2.NORMAL_CLONE)[8:-8, 8:-8]
        return torch.from_numpy(result / 255.0).float()

    def latent_blend(self, masks):
        """Blended latent diffusion as ComfyUI does it: the others' latents stay, the base's region is sampled around
        them.
        """
        owner = labels.at_grid(labels.from_masks(masks, BASE), GRID)
        pasted = sum((owner == k) * latent["samples"] for k, latent in enumerate(self.latents))
        return self.decode(
            self.sampled(self.model, {"samples": pasted, "noise_mask": masks[BASE][None]}, BASE)["samples"]
        )


class TransformerStack(Stack):
    """The same on the demo transformer, which has no ControlNet: where its objects are, the images say themselves. Kept
    are the object that the detector is surest of in each of two images, and the base where it is far from both.
    """

    SETTINGS = ("euler", "simple", 16)
    TOKENS = (SIZE // 16, SIZE // 16)
    RADIUS, FAR = 0.14, 0.3  # of an object's stroke, and of the base's distance from it: parts of the side

    def __init__(self, number, prompts):
        self.model, self.clip, self.vae = demo_transformer()
        generator = torch.Generator().manual_seed(FIRST + number)
        scene = scenes.sample(1, generator, count=2)
        captions = self.captions(scene, generator, prompts)
        captions[0] = captions[0] or scenes.caption(scene, 0)
        self.conditioning = [(self.encode(caption), self.encode("")) for caption in captions]
        self.draw(number)
        seen = [metrics.look(reader(), image)[2] for image in self.images]
        y, x = torch.meshgrid(*[(torch.arange(SIZE) + 0.5) / SIZE] * 2, indexing="ij")
        kept, far = [], torch.ones(SIZE, SIZE, dtype=torch.bool)
        for found in seen[1:]:
            centre = max(found, key=lambda one: one.score).centre if found else (-1.0, -1.0)
            distance = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2).sqrt()
            kept.append((distance < self.RADIUS).float())
            far &= distance > self.FAR
        self.strokes = self.apart([far.float(), *kept])


@functools.cache
def reader():
    return detector.load()


def _bytes(picture):
    return (picture.numpy() * 255).round().astype(np.uint8)


def figures(picture, masks, paste, images):
    """How well a picture keeps the regions, away from their edges, and how its seams compare with the images'."""
    kept = [binary_erosion(mask > 0.5, iterations=MARGIN, border_value=1) for mask in masks.numpy()]
    inside, taken = np.any(kept, axis=0), np.any(kept[:BASE] + kept[BASE + 1 :], axis=0)
    seam = metrics.seam_gradient(picture, labels.from_masks(masks, BASE), images)
    return {
        "psnr": finite_psnr(picture, paste, inside),
        "taken": finite_psnr(picture, paste, taken),
        "base": finite_psnr(picture, paste, kept[BASE]),
        "ssim": metrics.masked_ssim(picture, paste, inside),
        "distance": perceptual.feature_distance(picture, paste, torch.from_numpy(inside)),
        "seam": seam.score,
        "in range": float(seam.in_range),
    }


def finite_psnr(picture: torch.Tensor, paste: torch.Tensor, inside: np.ndarray) -> float | None:
    """None where there is nothing to measure, or no difference."""
    found = metrics.masked_psnr(picture, paste, inside) if inside.any() else float("inf")
    return None if found == float("inf") else found


def methods(example: Stack, masks: torch.Tensor, paste: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """{name: what makes its picture} of every method on one stack, by masks that were cut."""
    return {
        OURS: lambda: example.composed(masks),
        "pixel paste": lambda: paste,
        "Poisson blending": lambda: example.poisson(masks),
        "latent blending": lambda: example.latent_blend(masks),
        "K, V of all images together": lambda: example.composed(masks, kv="concat"),
        "K, V of the running model": lambda: example.composed(masks, kv="model"),
        "Q of the recorded base": lambda: example.composed(masks, base_q="stored"),
        SHARED: lambda: example.shared(masks),
    }


def variants(example):
    """{name: (picture, masks, paste)} of every method on one stack."""
    masks, paste = example.cut_in_features()
    other_masks, other_paste = example.cut_in_pixels()
    found = {name: (make(), masks, paste) for name, make in methods(example, masks, paste).items()}
    found["cut in pixels, paste"] = other_paste, other_masks, other_paste
    found["cut in pixels, composite"] = example.composed(other_masks), other_masks, other_paste
    return found


def measure(stack, prompts):
    def one(number):
        example = stack(number, prompts)
        if len(np.unique(labels.from_masks(example.cut_in_features()[0], BASE))) < 2:
            return {}
        made = variants(example)
        found = {name: figures(*result, example.images) for name, result in made.items()}
        masks, others = (made[name][1] for name in ("pixel paste", "cut in pixels, paste"))
        found["cut in pixels, paste"]["agree"] = float((masks.argmax(0) == others.argmax(0)).float().mean())
        return found

    return one


CLAIMS = (  # what, first, second, figure, sign, the paper's numbers
    (
        "preserves regions better than K, V of all images together (PSNR)",
        OURS,
        "K, V of all images together",
        "psnr",
        1,
        "PSNR 22.46 / 18.37",
    ),
    (
        "preserves regions better than K, V of all images together (feature distance)",
        OURS,
        "K, V of all images together",
        "distance",
        -1,
        "LPIPS .123 / .243",
    ),
    (
        "preserves regions better than K, V of the running model (PSNR)",
        OURS,
        "K, V of the running model",
        "psnr",
        1,
        "PSNR 22.46 / 18.85",
    ),
    (
        "preserves regions better than K, V of the running model (feature distance)",
        OURS,
        "K, V of the running model",
        "distance",
        -1,
        "LPIPS .123 / .268",
    ),
    (
        "preserves regions better than blended latent diffusion (PSNR)",
        OURS,
        "latent blending",
        "psnr",
        1,
        "PSNR 22.46 / 20.27",
    ),
    (
        "preserves regions better than blended latent diffusion (SSIM)",
        OURS,
        "latent blending",
        "ssim",
        1,
        "SSIM .815 / .772",
    ),
    (
        "preserves regions better than blended latent diffusion (feature distance)",
        OURS,
        "latent blending",
        "distance",
        -1,
        "LPIPS .123 / .222",
    ),
    ("has weaker seams than blended latent diffusion", OURS, "latent blending", "seam", -1, "SG .339 / .393"),
    (
        "preserves the base's region, which neither method copies, better than blended latent diffusion",
        OURS,
        "latent blending",
        "base",
        1,
        "(our test)",
    ),
    (
        "preserves regions better than gradient-domain blending (PSNR)",
        OURS,
        "Poisson blending",
        "psnr",
        1,
        "PSNR 22.46 / 20.13",
    ),
    (
        "gradient-domain blending preserves regions better (SSIM)",
        "Poisson blending",
        OURS,
        "ssim",
        1,
        "SSIM .888 / .815",
    ),
    (
        "gradient-domain blending preserves regions better (feature distance)",
        "Poisson blending",
        OURS,
        "distance",
        -1,
        "LPIPS .104 / .123",
    ),
    (
        "preserves regions better than attention shared as in StyleAligned (PSNR)",
        OURS,
        SHARED,
        "psnr",
        1,
        "(our comparison)",
    ),
    (
        "preserves regions better than attention shared as in StyleAligned (feature distance)",
        OURS,
        SHARED,
        "distance",
        -1,
        "(our comparison)",
    ),
    ("has weaker seams than a pixel paste", OURS, "pixel paste", "seam", -1, "(pictures only)"),
    (
        "has seams within the sources' range more often than a pixel paste",
        OURS,
        "pixel paste",
        "in range",
        1,
        "(pictures only)",
    ),
    (
        "a cut in feature space leaves weaker seams than one in pixels (paste)",
        "pixel paste",
        "cut in pixels, paste",
        "seam",
        -1,
        "(pictures only)",
    ),
    (
        "a cut in feature space leaves weaker seams than one in pixels (composite)",
        OURS,
        "cut in pixels, composite",
        "seam",
        -1,
        "(pictures only)",
    ),
)


class Setting(NamedTuple):
    """One study: on which model, with which prompts, how many stacks, and how their images came about."""

    name: str
    stack: type[Stack]
    prompts: str
    samples: int
    title: str
    made: str


OWN, ONE = "a different prompt for every image", "the same prompt for all images"
SETTINGS = {
    "unet": (
        Setting(
            "photomontage-own",
            Stack,
            "own",
            60,
            OWN,
            "three images each, from one ControlNet outline and different prompts (an empty one for the base)",
        ),
        Setting(
            "photomontage-one",
            Stack,
            "one",
            60,
            ONE,
            "three images each, from one ControlNet outline and one prompt, which leaves colours and textures open",
        ),
    ),
    "dit": (
        Setting(
            "photomontage-transformer-own",
            TransformerStack,
            "own",
            40,
            f"on the transformer, {OWN}",
            "three images each, from different prompts, without a ControlNet",
        ),
        Setting(
            "photomontage-transformer-one",
            TransformerStack,
            "one",
            40,
            f"on the transformer, {ONE}",
            "three images each, from one prompt, which leaves colours and textures open, without a ControlNet",
        ),
    ),
}
SHOWN = {  # variant: the title of its column
    OURS: OURS,
    "pixel paste": "pixel paste",
    "Poisson blending": "Poisson blending",
    "latent blending": "latent blending",
    "K, V of all images together": "K, V of all images",
    SHARED: "as StyleAligned",
}


def shown(setting: Setting, number: int) -> list[torch.Tensor]:
    """A sample's images and what the methods make of them."""
    example = setting.stack(number, setting.prompts)
    made = methods(example, *example.cut_in_features())
    return [*example.images, *(made[name]() for name in SHOWN)]


def study(options: argparse.Namespace, setting: Setting) -> measurements.Section:
    count = setting.samples // (10 if options.quick else 1)
    model = "unet" if setting.stack is Stack else "dit"
    found = measurements.Study(setting.name, options.folder, model).run(
        range(count), measure(setting.stack, setting.prompts), options.address
    )
    claims = [
        measurements.claim(what, found.difference(a, b, figure), sign, paper)
        for what, a, b, figure, sign, paper in CLAIMS
    ]
    best = found.best(OURS, "taken", over="latent blending")
    text = "\n\n".join(
        [
            (
                f"{count} scenes of two objects, {setting.made}; strokes keep one object from each of two images, and"
                " the background from the base. PSNR (dB), SSIM and *feature distance* compare with the image that"
                f" each pixel comes from, at least {MARGIN} pixels away from its region's edge; *other regions*,"
                " *base region*: PSNR in the regions of the other images, and in the base's. Feature distance"
                " (LPIPS's formula over another network; 0 is identical, above 1 unrelated) takes the place of the"
                " paper's LPIPS. *seam* is the mean Sobel magnitude along the seams, *in range* the share of samples"
                " in which it lies between those of the sources, *agreement* the share of pixels that both cuts"
                " assign to the same image. The paper's user study cannot be repeated without people."
            ),
            found.table(
                psnr="PSNR",
                taken="other regions",
                base="base region",
                ssim="SSIM",
                distance="feature distance",
                seam="seam",
                **{"in range": "in range"},
                agree="agreement",
            ),
            measurements.markdown(measurements.CLAIMS, claims),
            measurements.grid(
                setting.name,
                [shown(setting, number) for number in range(measurements.FIRST)],
                ["base", "image 1", "image 2", *SHOWN.values()],
                chosen=(
                    shown(setting, best),
                    f"of {count}, the one where ours gains most over latent blending",
                ),
            ),
        ]
    )
    return measurements.Section(f"Generative Photomontage, {setting.title}", text)


def sections(options: argparse.Namespace) -> Iterator[measurements.Section]:
    for model in measurements.models(options):
        for setting in SETTINGS[model]:
            yield study(options, setting)
