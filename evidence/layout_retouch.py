"""Layout-and-Retouch (arXiv 2407.09779): whose layout is it, whose look, and what does the prompt keep?"""

import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler, CFGGuider

from ..demo import detector, metrics, scenes
from ..nodes.demo_model import MontageDemoSubject
from ..nodes.layout_retouch import AdaptiveMaskBlend, MultiSourceSwap, StepBlendSampler, TokenAttentionMap
from ..nodes.record import InvertImage
from ..workshop.random_models import demo_model
from ..workshop.sampling import sample, sample_custom
from . import measurements, perceptual

SIZE, STEPS, CFG, SAMPLES, FIRST = 128, 10, 3.0, 60, 930_000
SWITCHES = (
    0.0,
    0.1,
    0.2,
    0.3,
    0.5,
    1.0,
)  # lambda 1, of the schedule: at 10 steps each is whole steps, and so are the paper's lambda 2 and mask start
SITES = "d@1,u@1"  # of the map: the demo model's 16x16 tokens, as many as SD1.5 has at 1/4 of its latent
LEAST = 0.3  # threshold of the map
PLAIN, BASE, BLEND = "base model", "personalised model", "+ step blend"
REFERENCE, SOURCES, OURS = "reference swap alone", "+ multi-source swap", "+ mask blend (ours)"
ROWS = (BASE, BLEND, REFERENCE, SOURCES, OURS)
BALL = scenes.SHAPES.index("ball")
RADIUS = 0.15  # of the disc about an object's centre in which its look is measured


def named(switch):
    return {0.0: BASE, 0.1: BLEND, 1.0: PLAIN}.get(switch, f"step blend at {switch:g}")


class Example:
    """One sample: a photo of the subject, and a prompt with the subject, another object and a place."""

    SETTINGS = ("euler", "normal", STEPS)  # sampler, scheduler, steps
    ITERATIONS = 0  # of the inversion's steps
    MAP, SITES = SITES, "u@1-2"  # of the map, and of what reads the reference

    def __init__(self, number):
        self.model, self.clip, self.vae = self.models()
        photo = number % scenes.PHOTOS
        self.personal, self.photo = MontageDemoSubject.execute(self.model, photo).args
        self.inside = scenes.masks(scenes.photos()[0])[photo, 0]  # where the subject is in it
        self.scene = scenes.sample(1, torch.Generator().manual_seed(FIRST + number), count=1)
        self.place = int(self.scene.background[0])
        words = f"and {scenes.caption(self.scene, 0)}"
        self.prompts = f"a ball {words}", f"a sks ball {words}"
        self.negative, self.seed = self.encode(""), FIRST + number
        self.sigmas = BasicScheduler.execute(self.model, *self.SETTINGS[1:], 1.0).args[0]

    @staticmethod
    def models():
        return demo_model()

    def encode(self, text):
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def decode(self, latent):
        return self.vae.decode(latent["samples"])[0].clamp(0, 1)

    def blended(self, switch):
        """Stage one, carrying its history and the map of the subject's words where the personalised model took part."""
        empty = {"samples": torch.zeros(1, 4, SIZE // 8, SIZE // 8)}
        model, latent, positive = TokenAttentionMap.execute(
            self.personal, empty, self.clip, self.prompts[1], "sks ball", self.MAP
        ).args
        first = CFGGuider.execute(self.model, self.encode(self.prompts[0]), self.negative, CFG).args[0]
        then = CFGGuider.execute(model, positive, self.negative, CFG).args[0]
        return sample_custom(
            latent, StepBlendSampler.execute(first, then, switch, 0.0).args[0], self.sigmas, self.seed
        )[0]

    def reference(self):
        return InvertImage.execute(
            self.personal,
            {"samples": self.vae.encode(self.photo)},
            self.sigmas,
            self.encode("a sks ball"),
            self.ITERATIONS,
        ).args[0]

    def retouched(self, layout, reference, layout_end=0.2, sites=None, **optional):
        patched = MultiSourceSwap.execute(
            self.personal, layout, reference, layout_end, 0.6, 1.0, sites or self.SITES, **optional
        ).args
        return sample(*patched, self.seed, self.encode(self.prompts[1]), self.negative, *self.SETTINGS, CFG)


def variants(example):
    """({name: picture}, mask of the subject in the layout [H, W])"""
    latents = {named(switch): example.blended(switch) for switch in SWITCHES}
    reference, layout = example.reference(), latents[BLEND]
    mask = AdaptiveMaskBlend.execute(LEAST, 0.01, "cross", layout).args[0]
    latents[REFERENCE] = example.retouched(latents[BASE], reference, layout_end=0.0)
    latents[SOURCES] = example.retouched(layout, reference)
    latents[OURS] = example.retouched(layout, reference, mask=mask)
    return {name: example.decode(latent) for name, latent in latents.items()}, mask[0]


def disc(centre):
    at = (np.arange(SIZE) + 0.5) / SIZE
    return np.hypot(at[None] - centre[0], at[:, None] - centre[1]) < RADIUS


def figures(example, judge, picture, plain, layout, mask):
    """What one picture shows. None where there is nothing to measure."""
    *_, found = seen = metrics.look(judge, picture)
    verdict = metrics.judge(seen, example.place, metrics.wanted(example.scene, 0))
    other = (
        verdict.objects[0] if verdict.colour[0] or len(found) > 1 else None
    )  # an only object of another colour is the subject
    rest = [one for one in found if one is not other]
    shown = {
        "layout": float(np.corrcoef(np.asarray(picture).ravel(), np.asarray(plain).ravel())[0, 1]),
        "prompt": (verdict.background + verdict.colour[0] + verdict.shape[0] + verdict.texture[0] + bool(rest)) / 5,
    }
    if 0 < mask.sum() < mask.numel():
        kept = metrics.background_psnr(picture, layout, (mask > 0).float())
        shown["around"] = kept if np.isfinite(kept) else None
    if rest:
        x, y = min(rest, key=lambda one: one.shape != BALL).centre  # of those that are seen alike, the surest
        area, photo, inside = disc((x, y)), np.asarray(example.photo[0]), example.inside
        shown |= {
            "x": x,
            "y": y,
            "colour": metrics.colour_distance(picture, area, photo, inside),
            "texture": metrics.texture_similarity(picture, area, photo, inside),
            "subject": perceptual.embedding_cosine(picture, photo, area, inside),
        }
    return shown


def measure(number):
    example, judge = Example(number), detector.load()
    pictures, mask = variants(example)
    return {
        name: figures(example, judge, picture, pictures[PLAIN], pictures[BLEND], mask)
        for name, picture in pictures.items()
    }


def spread(found, variant):
    """Each sample's distance from the mean place of the subject, in sides of the picture; None where it was not
    found.
    """
    places = [(one.get(variant, {}).get("x"), one.get(variant, {}).get("y")) for one in found.samples.values()]
    known = np.array([place for place in places if None not in place])
    return [
        None if None in place or not len(known) else float(np.hypot(*(np.array(place) - known.mean(0))))
        for place in places
    ]


def spread_claim(found, text, first, second):
    pairs = [(a, b) for a, b in zip(spread(found, first), spread(found, second)) if None not in (a, b)]
    return measurements.claim(text, measurements.Interval.of(a - b for a, b in pairs), 1, "(pictures only)")


CLAIMS = (  # what, first, second, figure, sign, the paper's numbers
    ("step blending brings the layout closer to the base model's", BLEND, BASE, "layout", 1, "(pictures only)"),
    (
        "the later the switch (0.3, not 0.1), the closer the layout is to the base model's",
        "step blend at 0.3",
        BLEND,
        "layout",
        1,
        "(pictures only)",
    ),
    (
        "the later the switch (0.5, not 0.1), the less likeness there is",
        "step blend at 0.5",
        BLEND,
        "colour",
        1,
        "identity down (curve)",
    ),
    (
        "the later the switch (0.5, not 0.1), the better the prompt is followed",
        "step blend at 0.5",
        BLEND,
        "prompt",
        1,
        "fidelity up (curve)",
    ),
    (
        "step blending follows the prompt better than the personalised model",
        BLEND,
        BASE,
        "prompt",
        1,
        "T-CLIP .319 / .313",
    ),
    ("step blending costs likeness", BLEND, BASE, "colour", 1, "I-DINO .620 / .637"),
    ("the reference swap alone gains likeness", REFERENCE, BASE, "colour", -1, "I-DINO .707 / .637"),
    ("the reference swap alone looks more like the photo", REFERENCE, BASE, "subject", 1, "I-DINO .707 / .637"),
    ("the reference swap alone follows the prompt less", REFERENCE, BASE, "prompt", -1, "T-CLIP .280 / .313"),
    (
        "with the layout first, the prompt is followed better than by the reference swap alone",
        SOURCES,
        REFERENCE,
        "prompt",
        1,
        "T-CLIP .320 / .280",
    ),
    (
        "with the layout first, there is less likeness than with the reference swap alone",
        SOURCES,
        REFERENCE,
        "colour",
        1,
        "I-DINO .615 / .707",
    ),
    ("the mask blend gains likeness", OURS, SOURCES, "colour", -1, "I-DINO .655 / .615"),
    ("the mask blend preserves what is around the subject", OURS, SOURCES, "around", 1, "(pictures only)"),
    ("the full method has more likeness than its layout", OURS, BLEND, "colour", -1, "I-DINO .655 / .620"),
    ("the full method has more likeness than the personalised model", OURS, BASE, "colour", -1, "I-DINO .655 / .637"),
    (
        "the full method looks more like the photo than the personalised model",
        OURS,
        BASE,
        "subject",
        1,
        "I-DINO .655 / .637",
    ),
    (
        "the full method follows the prompt better than the personalised model",
        OURS,
        BASE,
        "prompt",
        1,
        "T-CLIP .317 / .313",
    ),
)
COLUMNS = {
    "layout": "layout like the base model's",
    "colour": "colour distance to the photo",
    "texture": "texture similarity",
    "subject": "embedding cosine",
    "prompt": "prompt",
    "around": "PSNR around the subject",
}


def table(found, names):
    rows = [
        [name, *(str(found.mean(name, key)) for key in COLUMNS), str(measurements.Interval.of(spread(found, name)))]
        for name in names
    ]
    return measurements.markdown(["", *COLUMNS.values(), "spread of places"], rows)


def sections(options):
    if "unet" not in measurements.models(options):
        return
    count = SAMPLES // 10 if options.quick else SAMPLES
    found = measurements.Study("retouch", options.folder).run(range(count), measure, options.address)
    claims = [
        measurements.claim(what, found.difference(a, b, figure), sign, paper)
        for what, a, b, figure, sign, paper in CLAIMS
    ]
    claims += [
        spread_claim(found, "the base model varies the object's place more than the personalised model", PLAIN, BASE),
        spread_claim(found, "the full method varies the object's place more than the personalised model", OURS, BASE),
    ]
    titles = ["photo", PLAIN, *ROWS]

    def shown(number: int) -> list:
        example = Example(number)
        pictures, _ = variants(example)
        return [example.photo[0], *(pictures[name] for name in titles[1:])]

    best = found.best(OURS, "subject", over=PLAIN)
    text = "\n\n".join(
        [
            (
                f"{count} prompts of the subject, another object and a place; {STEPS} steps, with the paper's"
                " fractions of the schedule. Targets are sampled with the whole prompt: with the subject's prompt"
                " alone, the paper's choice, this small model loses the scene. *layout* is the correlation of the"
                " pixels with the base model's picture of the same seed. *colour distance* (CIE Lab, smaller is"
                " closer) and *texture similarity* compare a disc around the subject with its photo, and so does"
                " *embedding cosine*, where the paper has I-DINO and I-CLIP. *prompt* is the share that the detector"
                " finds of place, colour, shape and texture of the other object, and subject, where the paper has"
                " T-CLIP. *PSNR around the subject* is against the picture of stage one, outside the mask, which is"
                " made from the words alone, without a segmentation. *spread of places* is the mean distance of the"
                " subject from its mean position. Human preference and ImageReward were not measured."
            ),
            "By lambda 1, the fraction of the schedule that the base model samples:",
            table(found, [named(switch) for switch in SWITCHES]),
            "The rows of the paper's ablation:",
            table(found, ROWS),
            measurements.markdown(measurements.CLAIMS, claims),
            measurements.grid(
                "retouch",
                [shown(number) for number in range(measurements.FIRST)],
                titles,
                chosen=(shown(best), f"of {count} samples, the one where ours gains most likeness over the base model"),
            ),
        ]
    )
    yield measurements.Section("Layout-and-Retouch", text)
