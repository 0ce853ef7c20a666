"""Generative Photomontage (arXiv 2408.07116): is each region kept, and can its seams be seen? On the demo UNet, and on
the demo transformer.
"""

import functools

import cv2
import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt

from nodes import ControlNetApplyAdvanced

from ..demo import detector, metrics, scenes
from ..kernels import graphcut, labels
from ..workshop.random_models import demo_control_net, demo_model, demo_transformer
from ..workshop.sampling import cut, inject, recorder, sample
from . import measurements

SIZE, CFG, FIRST = 128, 3.0, 910_000
SAMPLES = {"own": 40, "one": 12}  # stacks, by their prompts
BASE, COUNT, GRID = 0, 3, (SIZE // 8, SIZE // 8)
MARGIN = 4  # pixels between a region's edge and what is measured in it (the paper's 512 pixels: 16)
OURS = "composite (ours)"


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
        """ "one": the same words for all; "own": a different prompt for every image, an empty one for the base."""
        if prompts == "one":
            return [scenes.caption(scene, 0)] * COUNT
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
    inside = np.any([binary_erosion(mask > 0.5, iterations=MARGIN, border_value=1) for mask in masks.numpy()], axis=0)
    psnr = metrics.masked_psnr(picture, paste, inside)
    seam = metrics.seam_gradient(picture, labels.from_masks(masks, BASE), images)
    return {
        "psnr": None if psnr == float("inf") else psnr,
        "ssim": metrics.masked_ssim(picture, paste, inside),
        "seam": seam.score,
        "in range": float(seam.in_range),
    }


def variants(example):
    """{name: (picture, masks, paste)} of every method on one stack."""
    masks, paste = example.cut_in_features()
    other_masks, other_paste = example.cut_in_pixels()
    pictures = {
        OURS: example.composed(masks),
        "pixel paste": paste,
        "Poisson blending": example.poisson(masks),
        "latent blending": example.latent_blend(masks),
        "K, V of all images together": example.composed(masks, kv="concat"),
        "K, V of the running model": example.composed(masks, kv="model"),
        "Q of the recorded base": example.composed(masks, base_q="stored"),
    }
    found = {name: (picture, masks, paste) for name, picture in pictures.items()}
    found["cut in pixels, paste"] = other_paste, other_masks, other_paste
    found["cut in pixels, composite"] = example.composed(other_masks), other_masks, other_paste
    return found


def measure(stack, prompts):
    def one(number):
        example = stack(number, prompts)
        if len(np.unique(labels.from_masks(example.cut_in_features()[0], BASE))) < 2:
            return {}
        return {name: figures(*result, example.images) for name, result in variants(example).items()}

    return one


CLAIMS = (  # what, first, second, figure, sign, the paper's numbers
    (
        "keeps regions better than K, V of all images together",
        OURS,
        "K, V of all images together",
        "psnr",
        1,
        "PSNR 22.46 / 18.37",
    ),
    (
        "keeps regions better than K, V of the running model",
        OURS,
        "K, V of the running model",
        "psnr",
        1,
        "PSNR 22.46 / 18.85",
    ),
    ("keeps regions better than blended latent diffusion", OURS, "latent blending", "psnr", 1, "PSNR 22.46 / 20.27"),
    ("the same in SSIM", OURS, "latent blending", "ssim", 1, "SSIM .815 / .772"),
    ("keeps regions better than gradient-domain blending", OURS, "Poisson blending", "psnr", 1, "PSNR 22.46 / 20.13"),
    ("gradient-domain blending keeps more structure", "Poisson blending", OURS, "ssim", 1, "SSIM .888 / .815"),
    ("seams weaker than pasted ones", OURS, "pixel paste", "seam", -1, "(figures only)"),
    ("seams more often in the sources' range than pasted ones", OURS, "pixel paste", "in range", 1, "(figures only)"),
    (
        "a cut in feature space leaves weaker seams in the paste than one in pixels",
        "pixel paste",
        "cut in pixels, paste",
        "seam",
        -1,
        "(figures only)",
    ),
    ("and in the composite", OURS, "cut in pixels, composite", "seam", -1, "(figures only)"),
)


STUDIES = (  # name, stack, prompts, title, how its images came about
    (
        "photomontage-own",
        Stack,
        "own",
        "a different prompt for every image, an empty one for the base",
        "three images each from one ControlNet outline",
    ),
    (
        "photomontage-one",
        Stack,
        "one",
        "the same prompt for all images",
        "three images each from one ControlNet outline",
    ),
    (
        "photomontage-transformer-own",
        TransformerStack,
        "own",
        "on the transformer, a different prompt for every image",
        "three images each, without a ControlNet",
    ),
    (
        "photomontage-transformer-one",
        TransformerStack,
        "one",
        "on the transformer, the same prompt for all images",
        "three images each, without a ControlNet",
    ),
)


def sections(options):
    for name, stack, prompts, title, made in STUDIES:
        count = SAMPLES[prompts] // (10 if options.quick else 1)
        found = measurements.Study(name, options.folder).run(range(count), measure(stack, prompts), options.address)
        claims = [
            measurements.claim(what, found.difference(a, b, figure), sign, paper)
            for what, a, b, figure, sign, paper in CLAIMS
        ]
        shown = []
        for number in range(4):
            example = stack(number, prompts)
            shown.append([*example.images, *(picture for picture, _, _ in list(variants(example).values())[:6])])
        text = "\n\n".join(
            [
                (
                    f"{count} scenes of two objects, {made} ({title}); strokes"
                    " keep one object from each of two images and the background from the base. PSNR (dB) and SSIM"
                    f" are against the image that the pixel comes from, {MARGIN} pixels and more from its region's"
                    " edge; *seam* is the mean Sobel magnitude on the seams, *in range* the share of samples in which"
                    " it lies between the sources' own. LPIPS and the user study of the paper are not checkable without"
                    " pretrained networks and people."
                ),
                found.table(psnr="PSNR", ssim="SSIM", seam="seam", **{"in range": "in range"}),
                measurements.markdown(measurements.CLAIMS, claims),
                measurements.grid(
                    name,
                    shown,
                    ["base", "image 1", "image 2", *list(variants(stack(0, prompts)))[:6]],
                ),
            ]
        )
        yield measurements.Section(f"Generative Photomontage, {title}", text)
