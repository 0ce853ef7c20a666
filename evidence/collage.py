"""Collage Diffusion (arXiv 2303.00262): are the objects where their layers are, do they look like them, and does noise
trade the two?
"""

import functools
import tempfile
from pathlib import Path

import torch

from nodes import ConditioningSetArea

from ..demo import detector, metrics, scenes
from ..nodes.collage import CollageCrossAttn, CollageNoise
from ..nodes.textual_inversion import LearnLayerToken
from ..patching import textual_inversion
from ..workshop.collages import canvas, layer
from ..workshop.random_models import demo_model
from ..workshop.sampling import sample
from . import measurements

SIZE, STEPS, CFG, FIRST = 128, 12, 3.0, 920_000
PLACED, TRADED = 100, 30  # samples of the studies of places and of noise
CROWD, CELLS = 192, 3  # pixels of the canvas of many layers along a side, and the cells in which they stand
LEARNED, LEARNING_STEPS, LEARNING_RATE = 24, 60, 0.03  # samples of the study of tokens, and how each is learned
FREE = (
    0.9  # noise of what may change freely: an object's place is then given by words and bias more than by the picture
)
PLAIN, BIASED, DRAWN, KEPT_AWAY = (
    "img2img (GH)",
    "+ cross-attention (GH+CA)",
    "CA, w_pos alone",
    "CA, w_neg alone",
)
AREAS, PASTED = "GH + ComfyUI's areas", "the layers themselves"
LEVELS = (0.0, 0.3, 0.6, 0.9)
WORDS, TOKEN, OTHERS = "prompt only (GH+CA)", "+ embedding (GH+CA+TI)", "+ another layer's embedding"


class Example:
    """A collage of a scene's own objects, each a layer where it stands in the scene."""

    size = SIZE
    SETTINGS = ("euler_ancestral", "normal", STEPS)  # sampler, scheduler, steps

    def __init__(self, number, count):
        self.model, self.clip, self.vae = self.models()
        self.count, self.seed = count, FIRST + number
        self.draw(torch.Generator().manual_seed(self.seed))

    @staticmethod
    def models():
        return demo_model()

    def draw(self, generator):
        self.scene = scenes.sample(1, generator, count=self.count)
        self.prompt = scenes.caption(self.scene, 0)

    def layer(self, slot):
        """(its picture [size, size, 4], its words)."""
        return scenes.cutouts(self.scene, slot, SIZE).movedim(1, -1), scenes.phrase(self.scene, 0, slot)

    def collage(self, noises=None, w_pos=0.4, w_neg=0.7):
        """(Collage, the composite). noises: of each layer."""
        last = ()
        for slot in range(self.count):
            picture, words = self.layer(slot)
            last = layer(
                picture,
                words,
                trim=False,
                w_pos=w_pos,
                w_neg=w_neg,
                noise=(noises or [FREE] * self.count)[slot],
                behind=last,
                node=str(slot),
            )
        return canvas(last, self.size, self.size, self.prompt, background_noise=FREE, blur=3.0)[:2]

    def encoded(self, image):
        return {"samples": self.vae.encode(image)}

    def areas(self, collage, positive):
        """ComfyUI's own way to say what is where: beside the whole prompt, each layer's words in an area around it."""
        for one, mask in zip(collage.layers, collage.masks):
            if (mask > 0.5).any():
                rows, columns = ((mask > 0.5).any(dim).nonzero().flatten() // 8 * 8 for dim in (1, 0))
                y, x, height, width = (
                    rows[0].item(),
                    columns[0].item(),
                    (rows[-1] - rows[0]).item() + 8,
                    (columns[-1] - columns[0]).item() + 8,
                )
                words = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(one.text))
                positive = positive + ConditioningSetArea().append(words, width, height, x, y, 1.0)[0]
        return positive

    def sampled(self, collage, image, bias=True, clip=None, areas=False):
        """(latent, picture) of the collage."""
        clip = clip or self.clip
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        model, positive = CollageCrossAttn.execute(
            self.model, clip, collage, float(bias), "log log", 0.0, 1.0, "all"
        ).args
        positive = self.areas(collage, positive) if areas else positive
        model, denoise = CollageNoise.execute(model, collage, 1.0).args
        latent = sample(model, self.encoded(image), self.seed, positive, negative, *self.SETTINGS, CFG, denoise)[
            "samples"
        ]
        return latent, self.vae.decode(latent)[0].clamp(0, 1)


class Nameless(Example):
    """A collage whose words name shapes and place alone: how a layer looks can come from its embedding only."""

    UNNAMED = ("colour", "texture")

    def draw(self, generator):
        super().draw(generator)
        self.prompt = scenes.caption(self.scene, 0, without=self.UNNAMED)

    def layer(self, slot):
        picture, _ = super().layer(slot)
        return picture, scenes.phrase(self.scene, 0, slot, without=self.UNNAMED)


class Crowd(Example):
    """A collage of 4 to 9 objects of one style, each in a cell of its own: more than any scene of the model's training
    holds.
    """

    size = CROWD

    def __init__(self, number):
        super().__init__(number, 4 + number % 6)

    def draw(self, generator):
        drawn = scenes.sample(self.count, generator, count=1)
        drawn.style[:] = drawn.style[:1]
        drawn.centre[:, 0] = 0.5
        drawn.radius[:, 0] = 0.14 + 0.03 * torch.rand(self.count, generator=generator)
        cells = torch.randperm(CELLS**2, generator=generator)[: self.count]
        cell = self.size // CELLS
        corners = (
            torch.stack([cells % CELLS, cells // CELLS], 1) * cell
            + cell // 2
            + torch.randint(-6, 7, (self.count, 2), generator=generator)
        )
        self.scene, self.places = drawn, corners.tolist()
        background = list(scenes.BACKGROUNDS.values())[drawn.background[0]]
        self.prompt = f"{' and '.join(self.layer(slot)[1] for slot in range(self.count))} {background}"

    def layer(self, slot):
        x, y = (place - SIZE // 2 for place in self.places[slot])
        drawn = scenes.cutouts(self.scene.take(slice(slot, slot + 1)), 0, SIZE)
        whole = torch.nn.functional.pad(
            drawn, (x, self.size - SIZE - x, y, self.size - SIZE - y)
        )  # what is negative is cut off
        return whole.movedim(1, -1), scenes.phrase(self.scene, slot, 0)

    def found(self, collage, picture):
        """Shares of the layers whose object the reader finds where the layer is: in its colour, and in its shape
        too.
        """
        placed = shaped = 0
        for slot, mask in enumerate(collage.masks):
            left, top = (min(max(place - SIZE // 2, 0), self.size - SIZE) for place in self.places[slot])
            part = (slice(top, top + SIZE), slice(left, left + SIZE))  # of the size that the reader knows
            _, _, objects = metrics.look(judge(), picture[part])
            right = [
                one for one in objects if one.colour == self.scene.colour[slot, 0] and metrics.placed(one, mask[part])
            ]
            placed += bool(right)
            shaped += any(one.shape == self.scene.shape[slot, 0] for one in right)
        return {"placed": placed / self.count, "shaped": shaped / self.count}


def places(number):
    """The objects of 4 to 9 layers, with and without the bias and its two halves."""
    return {name: Crowd(number).found(*variant) for name, variant in placements(number).items()}


@functools.cache  # the pictures that are measured are shown
def placements(number):
    """{variant: (Collage, picture)}."""
    example = Crowd(number)
    collage, image = example.collage()
    found = {PASTED: (collage, image[0])}
    for name, weights in ((PLAIN, {}), (BIASED, {}), (DRAWN, {"w_neg": 0.0}), (KEPT_AWAY, {"w_pos": 0.0}), (AREAS, {})):
        collage, image = example.collage(**weights)
        found[name] = collage, example.sampled(collage, image, bias=name not in (PLAIN, AREAS), areas=name == AREAS)[1]
    return found


@functools.cache
def judge():
    return detector.load()


def noise_levels(number: int, kind: type[Example] = Example) -> dict[str, dict]:
    """One layer's noise from 0 up, while the other's stays: how far it is from its input."""
    return {
        f"denoise {level}": distance(kind(number, 2), *variant) for level, variant in zip(LEVELS, levels(number, kind))
    }


@functools.cache
def levels(number: int, kind: type[Example] = Example) -> list[tuple]:
    """(Collage, composite, latent, picture) at each of LEVELS."""
    example, variants = kind(number, 2), []
    for level in LEVELS:
        collage, image = example.collage((level, FREE))
        variants.append((collage, image, *example.sampled(collage, image)))
    return variants


def distance(example, collage, image, latent, picture):
    """RMS error of the first layer's pixels, and the largest change of its latent where the noise map is 0."""
    mask = collage.masks[0]
    error = ((picture - image[0]) ** 2).mean(-1)
    locked = (
        torch.nn.functional.interpolate(collage.noise[None, None], size=latent.shape[-2:], mode="nearest-exact")[0, 0]
        == 0
    )
    change = (latent - example.encoded(image)["samples"]).abs().amax(1)[0][locked]
    return {
        "error": ((error * mask).sum() / mask.sum()).sqrt().item(),
        "locked": change.max().item() if len(change) else None,
    }


def looks(number):
    """The first of two layers with its words alone, with a token learned from it, and with one learned from another
    picture.
    """
    return {name: likeness(*variant) for name, variant in learned(number).items()}


@functools.cache
def learned(number):
    """{variant: (Collage, composite, picture)}."""
    example = Nameless(number, 2)
    with tempfile.TemporaryDirectory() as folder:
        clip = example.clip.clone()
        clip.tokenizer = type(clip.tokenizer)(embedding_directory=folder)
        collage, image = example.collage()
        stranger = Nameless(number + 500, 2)
        stranger.scene.shape[:, 0] = example.scene.shape[:, 0]  # of the same words, with another look
        found = {WORDS: (collage, image, example.sampled(collage, image)[1])}
        for name, source in ((TOKEN, example), (OTHERS, stranger)):
            embedding = "own" if name == TOKEN else "other"
            learn(source, clip, Path(folder) / f"{embedding}.safetensors")
            worded = LearnLayerToken.with_token(clip, collage, 0, embedding)
            found[name] = collage, image, example.sampled(worded, image, clip=clip)[1]
        return found


def learn(example, clip, path):
    collage, _ = example.collage()
    picture, mask = LearnLayerToken.target(collage, 0)
    latent = example.model.model.process_latent_in(example.vae.encode(picture.movedim(0, -1)[None]))
    text = f"embedding:{path.stem} {collage.layers[0].text}"
    texts = [text, *(f"{text} {place}" for place in scenes.BACKGROUNDS.values())]
    task = textual_inversion.Task(
        latent,
        torch.nn.functional.interpolate(mask[None, None], size=latent.shape[-2:], mode="area"),
        texts,
        example.seed,
    )
    token = textual_inversion.Token.new(clip, "a", 1, "")
    textual_inversion.learn(token, path, example.model, clip, task, LEARNING_STEPS, LEARNING_RATE, 1, lambda: None)


def likeness(collage, image, picture):
    """How like its input the first layer is: pixel by pixel, in colours, and in texture."""
    mask = collage.masks[0]
    if not (mask > 0.5).any():
        return {}
    error = ((picture - image[0]) ** 2).mean(-1)
    return {
        "error": ((error * mask).sum() / mask.sum()).sqrt().item(),
        "colour": metrics.colour_distance(picture, mask, image[0], mask),
        "texture": metrics.texture_similarity(picture, mask, image[0], mask),
    }


def sections(options):
    if "unet" not in measurements.models(options):
        return
    tenth = 10 if options.quick else 1
    yield placing(options, PLACED // tenth)
    yield trading(options, TRADED // tenth)
    yield looking(options, max(1, LEARNED // tenth))


def placing(options, count):
    found = measurements.Study("collage-places", options.folder).run(range(count), places, options.address)
    claims = [
        measurements.claim(what, found.difference(a, b, figure), 1, "(pictures only)")
        for what, a, b, figure in (
            ("regional prompting (CA) puts more objects in place than img2img", BIASED, PLAIN, "placed"),
            ("regional prompting (CA) puts more objects in place and shape than img2img", BIASED, PLAIN, "shaped"),
            ("w_pos alone puts more objects in place than img2img", DRAWN, PLAIN, "placed"),
            ("w_neg alone puts more objects in place than img2img", KEPT_AWAY, PLAIN, "placed"),
            (
                (
                    "CA puts more objects where their layers are than ComfyUI's areas (at a cost that does not grow"
                    " with the layers)"
                ),
                BIASED,
                AREAS,
                "placed",
            ),
        )
    ]

    def shown(number: int) -> list:
        return [picture for _, picture in placements(number).values()]

    best = found.best(BIASED, "shaped", over=PLAIN)
    return measurements.Section(
        "Collage Diffusion: objects in their places",
        "\n\n".join(
            [
                (
                    f"{count} collages of 4 to 9 layers on a grey canvas of {CROWD}x{CROWD} pixels (the demo model"
                    f" was trained on scenes of one to three objects at {SIZE}x{SIZE}), with a prompt of all their"
                    f" words, and denoise {FREE} everywhere, so that little of the input remains. *in place*: the"
                    " share of layers whose object the detector finds in the right colour, with its centre inside"
                    " the layer; *in place and shape*: in the right shape too. *the layers themselves*: what it"
                    " finds in the input. The paper shows pictures and gives no numbers."
                ),
                found.table(placed="in place", shaped="in place and shape"),
                measurements.markdown(measurements.CLAIMS, claims),
                measurements.grid(
                    "collage-places",
                    [shown(number) for number in range(min(measurements.FIRST, count))],
                    ["layers", "GH", "GH+CA", "w_pos alone", "w_neg alone", "areas"],
                    chosen=(shown(best), f"of {count} samples, the first where GH+CA gains most over GH"),
                ),
            ]
        ),
    )


def trading(options, count):
    found = measurements.Study("collage-noise", options.folder).run(range(count), noise_levels, options.address)
    return measurements.Section("Collage Diffusion: denoise per layer", traded(found, "collage-noise", Example))


def traded(found: measurements.Study, name: str, kind: type[Example]) -> str:
    """What noise_levels() found, with a grid of pictures of that name."""
    names = [f"denoise {level}" for level in LEVELS]
    claims = [
        measurements.claim(
            f"a layer with {high} is further from its input than one with {low}",
            found.difference(high, low, "error"),
            1,
            "(pictures only)",
        )
        for low, high in zip(names, names[1:])
    ]
    variants = [levels(number, kind) for number in list(found.samples)[:3]]
    shown = [[variant[0][1][0], *(picture for *_, picture in variant)] for variant in variants]
    return "\n\n".join(
        [
            (
                f"{len(found.samples)} collages of two layers: the denoise of the first is raised while everything else"
                f" stays at {FREE}. *error*: RMS error of its pixels against the input (at 0, the autoencoder's own);"
                " *change where locked*: the largest change of the latent where the noise map is 0, which must be none."
            ),
            found.table(error="error", locked="change where locked"),
            measurements.markdown(measurements.CLAIMS, claims),
            measurements.grid(name, shown, ["layers", *names]),
        ]
    )


def looking(options, count):
    found = measurements.Study("collage-looks-nameless", options.folder).run(range(count), looks, options.address)
    claims = [
        measurements.claim(what, found.difference(TOKEN, other, figure), sign, "(pictures only)")
        for what, other, figure, sign in (
            ("with the embedding, a layer is closer to its input (pixels)", WORDS, "error", -1),
            ("with the embedding, a layer is closer to its input (colours)", WORDS, "colour", -1),
            ("with the embedding, a layer is closer to its input (texture)", WORDS, "texture", 1),
            (
                "with its own embedding, a layer is closer to its input than with another layer's (pixels)",
                OTHERS,
                "error",
                -1,
            ),
            (
                "with its own embedding, a layer is closer to its input than with another layer's (colours)",
                OTHERS,
                "colour",
                -1,
            ),
        )
    ]
    shown = []
    for number in range(min(3, count)):
        variants = learned(number)
        shown.append([variants[WORDS][1][0], *(picture for _, _, picture in variants.values())])
    return measurements.Section(
        "Collage Diffusion: textual inversion of a layer",
        "\n\n".join(
            [
                (
                    f"{count} collages of two layers at denoise {FREE}, whose words name shapes and place, and leave"
                    f" colours and textures to the embedding. One of the first layer is trained in {LEARNING_STEPS}"
                    f" steps (learning rate {LEARNING_RATE}). *error*: RMS error of the layer's"
                    " pixels; *colour distance*: earth mover's distance in CIE Lab (smaller is closer); *texture"
                    " similarity*: 1 is identical."
                ),
                found.table(error="error", colour="colour distance", texture="texture similarity"),
                measurements.markdown(measurements.CLAIMS, claims),
                measurements.grid(
                    "collage-looks", shown, ["layers", "prompt only", "embedding", "another's embedding"]
                ),
            ]
        ),
    )
