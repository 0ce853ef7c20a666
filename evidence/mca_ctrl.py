"""MCA-Ctrl (arXiv 2505.01428): does the subject arrive where it should, and does the rest stay?"""

import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler

from ..demo import detector, metrics, scenes
from ..kernels import grid_masks
from ..nodes.layout_retouch import MultiSourceSwap, TokenAttentionMap
from ..nodes.mca_ctrl import PRESETS, CollaborativeAttention
from ..nodes.record import InvertImage
from ..workshop.random_models import demo_model
from ..workshop.sampling import sample
from . import measurements, perceptual

SIZE, STEPS, CFG, FIRST = 128, 12, 3.0, 920_000
SWAPS, LOCKS, ADDITIONS, GENERATIONS = 140, 10, 40, 64  # samples
DILATION = 5  # pixels
PROMPT = "neither: the prompt alone"
OURS, NOTEBOOK, MASA = "MCA-Ctrl", "with the notebook's windows", "mutual self-attention (as MasaCtrl)"
GIVEN = "subject, its place given"
INVERTED, FRESH = "the picture's noise (paper)", "fresh noise"
NEVER = (1.0, 1.0)
UNIFORM = PRESETS["paper swap"]  # "Uniform", of which the paper's ablation is


class Pair:
    """One sample: a picture of a subject, one of another object, and both inverted together."""

    SETTINGS = ("ddim", "normal", STEPS)  # sampler, scheduler, steps
    ITERATIONS = 0  # of the inversion's steps
    SITES = "u2-"  # of SALQ, where the edited area is given

    def __init__(self, number):
        self.model, self.clip, self.vae = self.models()
        self.seed, generator = FIRST + number, torch.Generator().manual_seed(FIRST + number)
        self.drawn = self.draw(generator)
        self.drawn.shape[1, 0] = self.drawn.shape[0, 0]  # as in DreamEditBench, of one kind
        if self.drawn.colour[0, 0] == self.drawn.colour[1, 0]:  # but not of one look
            self.drawn.colour[1, 0] = (self.drawn.colour[1, 0] + 1) % len(scenes.COLOURS)
        self.pictures = scenes.render(self.drawn, SIZE, generator).movedim(1, -1)
        self.subject_mask, self.object_mask = scenes.masks(self.drawn, SIZE)[:, 0] > 0.5
        self.words = scenes.phrase(self.drawn, 0, 0)
        self.prompt = f"{self.words} {list(scenes.BACKGROUNDS.values())[self.drawn.background[1]]}"
        self.empty = self.encode("")
        sigmas = BasicScheduler.execute(self.model, *self.SETTINGS[1:], 1.0).args[0]
        self.encoded = self.vae.encode(self.pictures)
        self.history, self.noise = InvertImage.execute(
            self.model, {"samples": self.encoded}, sigmas, self.empty, self.ITERATIONS
        ).args

    @staticmethod
    def models():
        return demo_model()

    def draw(self, generator):
        """The scenes of subject and picture."""
        return scenes.sample(2, generator, count=1)

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def decode(self, samples):
        return self.vae.decode(samples)[0].clamp(0, 1)

    def latent(self, row):
        """One of the two inverted pictures, 0 the subject's."""
        return {**self.history, "samples": self.history["samples"][row : row + 1]}

    def sampled(self, model, latent, positive=None, cfg=CFG):
        return sample(model, latent, self.seed, positive or self.encode(self.prompt), self.empty, *self.SETTINGS, cfg)[
            "samples"
        ]

    def collaborating(
        self,
        model,
        sagi=(0.0, 0.1),
        salq=(0.1, 1.0),
        dilation=DILATION,
        lock=False,
        fresh=False,
        order="SAGI first",
        form="soft",
        sites=None,
        **inputs,
    ):
        preset = {
            "preset": "custom",
            "sagi_start": sagi[0],
            "sagi_end": sagi[1],
            "sagi_sites": "all",
            "salq_start": salq[0],
            "salq_end": salq[1],
            "salq_sites": sites or (self.SITES if "edit_mask" in inputs else "all"),
        }
        return CollaborativeAttention.execute(
            model, self.latent(0), self.subject_mask.float(), preset, dilation, lock, fresh, order, 0.3, form, **inputs
        ).args

    def edited(self, mask=None, **settings):
        """The picture with the subject in place of the object."""
        mask = self.object_mask if mask is None else mask
        return self.decode(
            self.sampled(*self.collaborating(self.model, edit_mask=mask.float(), condition=self.latent(1), **settings))
        )

    def mutual(self):
        """A picture of the prompt that takes keys and values of the subject in the decoder, from a tenth of the
        schedule on, as in MasaCtrl.
        """
        return self.decode(
            self.sampled(*MultiSourceSwap.execute(self.model, self.latent(1), self.latent(0), 0.1, 0.1, 1.0, "u").args)
        )

    def reconstructed(self):
        """The condition's picture out of its noise, at CFG 1 with the prompt that it was inverted with."""
        return self.sampled(self.model, {"samples": self.noise["samples"][1:]}, self.empty, 1.0)

    def generated(self, form=None, **inputs):
        """A new picture of the prompt: with the subject where its words draw or in an edit_mask, or without it."""
        empty = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
        model, latent, positive = TokenAttentionMap.execute(
            self.model, empty, self.clip, self.prompt, self.words, "d@2-4,u@2-4"
        ).args
        if form:
            model, _ = self.collaborating(model, sagi=(0.02, 0.1), form=form, **inputs)
        return self.decode(self.sampled(model, latent, positive))


class Apart(Pair):
    """A subject whose place is empty in the other picture: the two stand on opposite sides."""

    def draw(self, generator):
        drawn = super().draw(generator)
        drawn.radius[:, 0] = 0.15 + 0.04 * torch.rand(2, generator=generator)
        x, (y, other_y) = (
            torch.randint(2, (), generator=generator) / 2 + 0.25,
            0.25 + torch.rand(2, generator=generator) / 2,
        )
        drawn.centre[:, 0] = torch.stack([torch.stack([x, y]), torch.stack([1 - x, other_y])])
        return drawn


def swaps(pair):
    """{name: picture} of the method, its ablations, and what the prompt alone does."""
    windows = {"sagi": UNIFORM.sagi, "salq": UNIFORM.salq}
    return {
        OURS: pair.edited(**windows),
        "without SALQ": pair.edited(**windows | {"salq": NEVER}),
        "without SAGI": pair.edited(**windows | {"sagi": NEVER}),
        "without dilation": pair.edited(**windows, dilation=0),
        "SALQ first": pair.edited(**windows, order="SALQ first"),
        NOTEBOOK: pair.edited(),
        MASA: pair.mutual(),
        PROMPT: pair.decode(pair.sampled(pair.model, {"samples": pair.noise["samples"][1:]})),
    }


def generations(pair):
    """{name: picture} of the prompt alone, and with the subject."""
    return {
        "the prompt alone": pair.generated(),
        "subject, soft map": pair.generated("soft"),
        "subject, hard map": pair.generated("hard"),
        GIVEN: pair.generated("hard", edit_mask=pair.subject_mask.float()),
    }


def likeness(pair, picture, seen, inside):
    """How like the subject an object of a picture is: of its words, and of what no word says. seen: by the reader.
    inside: where the object must be."""
    there = [found for found in seen if metrics.placed(found, inside)]
    best = max(there, key=lambda found: found.score, default=None)
    truth = metrics.truth(pair.drawn, 0, 0)
    errors = metrics.style_errors(best, truth).values() if best else []
    return {
        "present": float(any((found.colour, found.shape) == (truth.colour, truth.shape) for found in there)),
        "colour": metrics.colour_distance(picture, inside, pair.pictures[0], pair.subject_mask),
        "texture": metrics.texture_similarity(picture, inside, pair.pictures[0], pair.subject_mask),
        "subject": perceptual.embedding_cosine(picture, pair.pictures[0], inside, pair.subject_mask),
        "style": sum(errors) / len(errors) if errors else None,
    }


def measure_swap(number):
    pair, reading = Pair(number), detector.load()
    inside = grid_masks.dilate(pair.object_mask, DILATION)
    found = {}
    for name, picture in swaps(pair).items():
        found[name] = likeness(pair, picture, metrics.look(reading, picture)[2], pair.object_mask)
        found[name]["psnr"] = metrics.background_psnr(picture, pair.pictures[1], inside)
        found[name]["around"] = perceptual.embedding_cosine(picture, pair.pictures[1], ~inside, ~inside)
    return found


def measure_addition(number: int, kind: type[Apart] = Apart) -> dict[str, dict]:
    """The subject in an empty place, which is its own in its picture."""
    pair, reading = kind(number), detector.load()
    found = {}
    for name, fresh in ((INVERTED, False), (FRESH, True)):
        picture = pair.edited(mask=pair.subject_mask, lock=True, fresh=fresh)
        found[name] = likeness(pair, picture, metrics.look(reading, picture)[2], pair.subject_mask)
    return found


def measure_generation(number: int, kind: type[Pair] = Pair) -> dict[str, dict]:
    pair, reading = kind(number), detector.load()
    return {
        name: likeness(pair, picture, metrics.look(reading, picture)[2], torch.ones(SIZE, SIZE))
        for name, picture in generations(pair).items()
    }


def measure_reconstruction(number):
    pair = Pair(number)
    inside, round_trip = grid_masks.dilate(pair.object_mask, DILATION), pair.decode(pair.encoded[1:])
    nothing = pair.edited(mask=torch.zeros(SIZE, SIZE), lock=True)
    pictures = {
        "the autoencoder's round trip": round_trip,
        "inverted and sampled back": pair.decode(pair.reconstructed()),
        "nothing edited, locked": nothing,
        "subject swapped, locked": pair.edited(lock=True),
        "subject swapped": pair.edited(),
    }
    return {
        name: {
            "psnr": metrics.background_psnr(picture, pair.pictures[1], inside),
            "near": metrics.background_psnr(picture, round_trip, inside),
            "equal": float(torch.equal(picture, round_trip)),
        }
        for name, picture in pictures.items()
    }


CLAIMS = (  # what, first, second, figure, sign, the paper's numbers
    ("without SALQ, the subject's colours are further off", "without SALQ", OURS, "colour", 1, "DINOsub .424 / .633"),
    ("without SALQ, the style error is larger", "without SALQ", OURS, "style", 1, "CLIP-Isub .742 / .779"),
    ("without SALQ, it looks less like the subject", "without SALQ", OURS, "subject", -1, "DINOsub .424 / .633"),
    ("without SALQ, the background is preserved better", "without SALQ", OURS, "psnr", 1, "DINOback .749 / .668"),
    (
        "without SALQ, the background looks more like the original",
        "without SALQ",
        OURS,
        "around",
        1,
        "DINOback .749 / .668",
    ),
    ("without SAGI, the subject's colours are further off", "without SAGI", OURS, "colour", 1, "DINOsub .590 / .633"),
    ("without SAGI, the style error is larger", "without SAGI", OURS, "style", 1, "CLIP-Isub .775 / .779"),
    ("without SAGI, it looks less like the subject", "without SAGI", OURS, "subject", -1, "DINOsub .590 / .633"),
    ("without SAGI, the background is preserved better", "without SAGI", OURS, "psnr", 1, "DINOback .685 / .668"),
    (
        "without SAGI, the background looks more like the original",
        "without SAGI",
        OURS,
        "around",
        1,
        "DINOback .685 / .668",
    ),
    (
        "without dilation, the subject's colours are further off",
        "without dilation",
        OURS,
        "colour",
        1,
        "DINOsub .561 / .633",
    ),
    (
        "without dilation, the background is preserved better",
        "without dilation",
        OURS,
        "psnr",
        1,
        "DINOback .732 / .668",
    ),
    ("with SALQ first, the subject's colours are further off", "SALQ first", OURS, "colour", 1, "DINOsub .459 / .633"),
    ("with SALQ first, the style error is larger", "SALQ first", OURS, "style", 1, "CLIP-Isub .723 / .779"),
    ("with SALQ first, the background is preserved worse", "SALQ first", OURS, "psnr", -1, "DINOback .555 / .668"),
    (
        "the style error is smaller than with mutual self-attention",
        OURS,
        MASA,
        "style",
        -1,
        "(pictures only)",
    ),
    ("the background is preserved better than with mutual self-attention", OURS, MASA, "psnr", 1, "(pictures only)"),
    (
        "the style error is smaller than with the prompt alone",
        OURS,
        PROMPT,
        "style",
        -1,
        "(DiffEdit DINOsub .510 / .633)",
    ),
    (
        "the subject's colours are closer than with the prompt alone",
        OURS,
        PROMPT,
        "colour",
        -1,
        "(DiffEdit CLIP-Isub .755 / .779)",
    ),
    (
        "the right object is present more often than with the prompt alone",
        OURS,
        PROMPT,
        "present",
        1,
        "",
    ),
)
FIGURES = {
    "present": "right object",
    "colour": "colour distance",
    "texture": "texture similarity",
    "style": "style error",
    "subject": "embedding cosine",
}


def sections(options):
    if "unet" not in measurements.models(options):
        return

    def size(count):
        return range(count // 10 if options.quick else count)

    found = measurements.Study("collaborate-swap", options.folder).run(size(SWAPS), measure_swap, options.address)

    def shown(number: int) -> list:
        pair = Pair(number)
        return [*pair.pictures, *swaps(pair).values()]

    best = found.best(OURS, "subject", over=PROMPT)
    yield measurements.Section(
        "MCA-Ctrl: swapping a subject",
        "\n\n".join(
            [
                (
                    f"{len(found.samples)} pairs of rendered scenes with one object each, of the same shape and of"
                    f" two colours, both inverted over {STEPS} steps; the subject of the one replaces the object of"
                    " the other, with the paper's uniform settings (SAGI up to 0.4 of the steps, SALQ up to 0.96)"
                    " and exact masks; one row has those of the released notebook (SAGI up to 0.1). *right object*:"
                    " the share of pictures in which an object of the subject's colour and shape lies inside the"
                    " edit mask. *colour distance* (CIE Lab, smaller is closer) and *texture similarity* compare the"
                    " edited area with the subject, *style error* what prompts do not describe (shade, light,"
                    " outline, the texture's direction and size; 0 is equal, 1/3 unrelated). *background* is the"
                    " PSNR (dB) against the original picture, outside the dilated edit mask and without the"
                    " background lock, as printed in the paper. *embedding cosine*: of the edited area with the"
                    " subject, both cut out, and of the backgrounds, where the paper has DINO and CLIP-I;"
                    " ImageReward is left out."
                ),
                found.table(**FIGURES, psnr="background", around="its embedding cosine"),
                measurements.markdown(
                    measurements.CLAIMS,
                    [
                        measurements.claim(what, found.difference(a, b, figure), sign, paper)
                        for what, a, b, figure, sign, paper in CLAIMS
                    ],
                ),
                (
                    "The paper's order of the backgrounds is not found, neither by PSNR nor by an embedding: SAGI and"
                    " SALQ both feed the background from the picture that is edited, and here each preserves it."
                ),
                measurements.grid(
                    "collaborate-swap",
                    [shown(number) for number in range(measurements.FIRST)],
                    ["subject", "picture", *found.variants],
                    chosen=(shown(best), f"of {len(found.samples)} pairs, the one where ours gains most likeness"),
                ),
            ]
        ),
    )

    found = measurements.Study("collaborate-lock", options.folder).run(
        size(LOCKS), measure_reconstruction, options.address
    )
    yield measurements.Section(
        "MCA-Ctrl: what is preserved",
        "\n\n".join(
            [
                (
                    f"PSNR (dB) outside the dilated edit mask, {len(found.samples)} pairs: against the picture"
                    " itself, and against its round trip through the autoencoder (-: all are identical to it there)."
                    " *equal*: the share of pictures that equal the round trip everywhere, bit for bit."
                ),
                found.table(psnr="the picture", near="its round trip", equal="equal"),
            ]
        ),
    )

    found = measurements.Study("collaborate-addition", options.folder).run(
        size(ADDITIONS), measure_addition, options.address
    )
    yield measurements.Section(
        "MCA-Ctrl: inserting a subject",
        "\n\n".join(
            [
                (
                    f"{len(found.samples)} subjects inserted into an empty place of the other picture, at the"
                    " position that they have in their own. The inverted noise of an empty place leads back to the"
                    " empty place; *fresh noise*, which the paper does not have, starts the edited area from the"
                    " sampler's own noise. Columns as above."
                ),
                added(found),
            ]
        ),
    )

    found = measurements.Study("collaborate-generation", options.folder).run(
        size(GENERATIONS), measure_generation, options.address
    )
    yield measurements.Section(
        "MCA-Ctrl: generating with a subject",
        "\n\n".join(
            [
                (
                    f"{len(found.samples)} new pictures of the subject on another background, from its words; the"
                    " edited area is taken during sampling from the cross-attention map of those words (the"
                    " strongest 30 %; *soft*: weighted by the map elsewhere). *right object* and *style error* as"
                    " above, wherever the object is. *its place given*: the subject's own mask instead of the map."
                    " What falls short is the outline: a subject fills its area, and the strongest 30 % of a map are"
                    " larger and rounder than most objects here (third row of the pictures). Its own place is often"
                    " not where the words act: there, the method changes less."
                ),
                generated(found, "collaborate-generation", Pair),
            ]
        ),
    )


def added(found: measurements.Study) -> str:
    """What measure_addition() found."""
    claim = measurements.claim(
        "with fresh noise, the right object is present more often",
        found.difference(FRESH, INVERTED, "present"),
        1,
        "(our claim)",
    )
    return "\n\n".join([found.table(**FIGURES), measurements.markdown(measurements.CLAIMS, [claim])])


def generated(found: measurements.Study, name: str, kind: type[Pair]) -> str:
    """What measure_generation() found, with a grid of pictures of that name."""
    claims = [
        measurements.claim(
            f"{form} map: {what}", found.difference(f"subject, {form} map", "the prompt alone", figure), sign, paper
        )
        for form in ("soft", "hard")
        for what, figure, sign, paper in (
            (
                "the style error is smaller than with the prompt alone",
                "style",
                -1,
                "DINO .661 (IP-Adapter .650)",
            ),
            ("the right object is still present", "present", 1, "CLIP-T .302 (IP-Adapter .265)"),
        )
    ]
    claims.append(
        measurements.claim(
            "the right object is present more often with its place given than with the soft map",
            found.difference(GIVEN, "subject, soft map", "present"),
            1,
            "(our claim)",
        )
    )
    pairs = [kind(number) for number in list(found.samples)[:4]]
    return "\n\n".join(
        [
            found.table(**{figure: FIGURES[figure] for figure in ("present", "style", "subject")}),
            measurements.markdown(measurements.CLAIMS, claims),
            measurements.grid(
                name,
                [[pair.pictures[0], *generations(pair).values()] for pair in pairs],
                ["subject", "the prompt alone", "soft", "hard", "place given"],
            ),
        ]
    )
