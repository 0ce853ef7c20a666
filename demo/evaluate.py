"""Measures the demo models and writes the tables and pictures of demo/README.md: `python demo/evaluate.py`, with
ComfyUI's folder in COMFYUI_PATH.

Everything is drawn by ComfyUI's own samplers with the shipped weights and judged by the reader, which is
itself measured first, on renders that no training has seen. With --address the machines of a Ray cluster draw
(docs/many-machines.md); what is drawn, and with which seeds, is settled here, and so is what is measured.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

if not __package__:  # started as a script: find the rest as the package that this folder is
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    __package__ = "demo"

import torch
from torch import Tensor

from . import detector, drawings, metrics, sampling, scenes, subject
from .train import save_grid

HERE = Path(__file__).resolve().parent
HELD_OUT = 900_001  # first of the seeds of scenes that no training draws
TARGETS = {"background": 0.98, "colour": 0.95, "shape": 0.90, "texture": 0.85, "present": 0.85}
SHOWN = tuple(name for name in scenes.STYLE if name != "tint")
# What a caption leaves out, by the name of its row.
OMISSIONS = {
    "nothing": (),
    "colour": ("colour",),
    "texture": ("texture",),
    "place": ("place",),
    "all three": scenes.CAPTION_PARTS,
}
STACK = 6  # pictures of one prompt


UNET, DIT = "demo-model.safetensors", "demo-dit.safetensors"


class Evaluation:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.weights = Path(args.weights).resolve() if args.weights else HERE / "weights"
        self.reader = detector.load(self.weights / "demo-reader.safetensors")

    def draw(self, captions: Sequence[str], first_seed: int, model: str = UNET, **settings: Any) -> Tensor:
        """Pictures [n, h, w, 3] of captions, from seeds that follow each other. settings: of a Drawing."""
        return self.timed_draw(captions, first_seed, model, **settings)[0]

    def timed_draw(
        self, captions: Sequence[str], first_seed: int, model: str = UNET, **settings: Any
    ) -> tuple[Tensor, float]:
        """(pictures, CPU seconds of drawing them)."""
        seeds = range(first_seed, first_seed + len(captions))
        drawing = drawings.Drawing(self.weights / model, tuple(captions), tuple(seeds), self.args.steps, **settings)
        return drawings.drawn(drawing, self.args.address)

    # --------------------------------------------------------------------------------------- the judge

    def judge(self) -> dict:
        """The reader on held-out renders, sharp and after the autoencoder, where every answer is known."""
        generator = torch.Generator().manual_seed(HELD_OUT)
        drawn = scenes.sample(3 * self.args.n, generator)
        sharp = scenes.render(drawn, 128, generator).movedim(1, -1)
        _, _, vae = drawings.loaded(self.weights / UNET)
        with torch.inference_mode():
            coded = torch.cat([vae.decode(vae.encode(part)) for part in sharp.split(50)]).clamp(0, 1)
        psnr = -10 * ((coded - sharp) ** 2).mean((1, 2, 3)).log10().mean().item()
        return {
            "renders": self.score(drawn, sharp),
            "after the autoencoder": self.score(drawn, coded),
            "autoencoder psnr": psnr,
            "style": {
                name: self.style_of_truth(drawn, picture)
                for name, picture in (("renders", sharp), ("after the autoencoder", coded))
            },
        }

    def score(self, drawn: scenes.Scenes, pictures: Tensor) -> dict:
        """Shares of right answers over all scenes, by number of objects asked for, and how many there were."""
        verdicts = [
            metrics.judge(metrics.look(self.reader, picture), drawn.background[i].item(), metrics.wanted(drawn, i))
            for i, picture in enumerate(pictures)
        ]
        return {
            name: _shares([v for v in verdicts if len(v.objects) in counts])
            for name, counts in (
                ("all", (1, 2, 3)),
                ("one object", (1,)),
                ("two objects", (2,)),
                ("three objects", (3,)),
            )
        }

    def style_of_truth(self, drawn, pictures) -> dict:
        """The reader's own error in every style variable, by matching what it finds with the scene."""
        errors = []
        for i, picture in enumerate(pictures):
            verdict = metrics.judge(metrics.look(self.reader, picture), 0, metrics.wanted(drawn, i))
            slots = [slot for slot in range(scenes.MOST_OBJECTS) if drawn.shape[i, slot] >= 0]
            errors += [
                metrics.style_errors(found, metrics.truth(drawn, i, slot))
                for slot, found in zip(slots, verdict.objects)
                if found
            ]
        return _means(errors)

    # ------------------------------------------------------------------------------------- the model

    def prompts(self) -> dict:
        return self._prompts(UNET, "unpicked.jpg")

    def dit_prompts(self) -> dict:
        return self._prompts(DIT, "dit-unpicked.jpg")

    def _prompts(self, model: str, name: str) -> dict:
        """What it is told against what it draws, and the first 64 pictures as they came."""
        drawn = scenes.sample(self.args.n, torch.Generator().manual_seed(HELD_OUT + 1))
        captions = [scenes.caption(drawn, i) for i in range(self.args.n)]
        pictures, seconds = self.timed_draw(captions, HELD_OUT, model)
        save_grid(pictures[:64].movedim(-1, 1), self.args.pictures / name, 8)
        return {"score": self.score(drawn, pictures), "captions": captions[:64], "seconds": seconds / len(captions)}

    def _fed(self, model: str, captions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Two runs of each caption, and the second again with the first's self-attention inputs: the first's
        pictures, the second's by what it was fed."""
        n = len(captions)
        first, seconds = self.draw(captions, HELD_OUT, model), {"none": self.draw(captions, HELD_OUT + n, model)}
        for parts in ("kv", "qkv"):
            sources = tuple(range(HELD_OUT, HELD_OUT + n))
            seconds[parts] = self.draw(captions, HELD_OUT + n, model, change=parts, batch=8, sources=sources)
        return first, seconds

    def swap(self) -> dict:
        """Pairs of runs from the same prompt: the second is fed the first's self-attention inputs. How far is
        the second's style from the first's, with and without?"""
        drawn = self.striped(1, HELD_OUT + 2)
        first, seconds = self._fed(UNET, [scenes.caption(drawn, i) for i in range(len(drawn.radius))])
        save_grid(
            torch.cat([x[:8] for x in (first, *seconds.values())]).movedim(-1, 1), self.args.pictures / "swap.jpg", 8
        )
        errors = {name: self.apart(drawn, first, pictures) for name, pictures in seconds.items()}
        # Pair by pair, because pairs differ more from each other than what is fed changes them.
        changes = {
            f"{name} - none": [
                {variable: e[variable] - e0[variable] for variable in e if variable in e0}
                for e, e0 in zip(errors[name], errors["none"])
            ]
            for name in ("kv", "qkv")
        }
        return {name: _means(rows) for name, rows in (errors | changes).items()}

    def apart(self, drawn, first: Tensor, second: Tensor) -> list[dict[str, float]]:
        """Style errors of the second picture's object against the first's, nothing where one has no object."""
        errors = []
        for i in range(len(first)):
            seen = [metrics.look(self.reader, pictures[i]) for pictures in (first, second)]
            a, b = (metrics.judge(s, 0, metrics.wanted(drawn, i)).objects[0] for s in seen)
            errors.append(
                metrics.style_errors(b, a) | {"tint": detector.style_error("tint", seen[0][1], seen[1][1])}
                if a and b
                else {}
            )
        return errors

    def carried(self) -> dict:
        return self._carried(UNET)

    def dit_carried(self) -> dict:
        return self._carried(DIT)

    def _carried(self, model: str) -> dict:
        """As swap, from prompts that leave colour and texture open: how often do they differ from the first run's?"""
        drawn = scenes.sample(self.args.pairs, torch.Generator().manual_seed(HELD_OUT + 5), count=1)
        captions = [scenes.caption(drawn, i, without=("colour", "texture")) for i in range(len(drawn.radius))]
        first, seconds = self._fed(model, captions)
        firsts = [self.main_object(picture) for picture in first]
        return {
            name: _differing([(a, self.main_object(picture)) for a, picture in zip(firsts, pictures)])
            for name, pictures in seconds.items()
        }

    def diversity(self) -> dict:
        return self._diversity(UNET)

    def dit_diversity(self) -> dict:
        return self._diversity(DIT)

    def _diversity(self, model: str) -> dict:
        """How often two pictures of one prompt of one object differ in what the prompt names or leaves open; last, two
        renders of the same shape whose all else is drawn by lot."""
        generator = torch.Generator().manual_seed(HELD_OUT + 6)
        asked = scenes.sample(max(1, self.args.pairs // 4), generator, count=1)
        drawn = {}
        for name, without in OMISSIONS.items():
            captions = [scenes.caption(asked, i, without=without) for i in range(len(asked.radius))]
            drawn[name] = self.draw([caption for caption in captions for _ in range(STACK)], HELD_OUT, model)
        lots = scenes.sample(STACK * len(asked.radius), generator, count=1)
        lots.shape[:, 0] = asked.shape[:, 0].repeat_interleave(STACK)
        drawn["all three, renders"] = scenes.render(lots, 128, generator).movedim(1, -1)
        result = {}
        for name, pictures in drawn.items():
            seen = [self.main_object(picture) for picture in pictures]
            stacks = [seen[i : i + STACK] for i in range(0, len(seen), STACK)]
            result[name] = _differing([pair for stack in stacks for pair in combinations(stack, 2)])
        return result

    def main_object(self, picture: Tensor) -> tuple[int, detector.Found] | None:
        """(background, object the reader is surest of), None where it sees none."""
        place, _, found = metrics.look(self.reader, picture)
        return (place, found[0]) if found else None

    def agreement(self) -> dict:
        """Two striped objects in a picture: how far apart are their styles, when self-attention works, when
        every token sees only itself, and when it is off? Chance: objects of two different pictures."""
        drawn = self.striped(2, HELD_OUT + 3)
        captions = [scenes.caption(drawn, i) for i in range(len(drawn.radius))]
        kinds = {"working": "none", "each token alone": "each token alone", "off": "off"}
        result, shown = {}, []
        for name, change in kinds.items():
            pictures = self.draw(captions, HELD_OUT, change=change)
            shown.append(pictures[:8])
            found = [
                metrics.judge(metrics.look(self.reader, picture), 0, metrics.wanted(drawn, i))
                for i, picture in enumerate(pictures)
            ]
            pairs = [verdict.objects for verdict in found if verdict.present]
            result[name] = _means([metrics.style_errors(*pair) for pair in pairs]) | {
                "present": len(pairs) / len(found)
            }
            if name == "working":
                strangers = [metrics.style_errors(a[0], b[1]) for a, b in zip(pairs, pairs[1:] + pairs[:1])]
                result["chance"] = _means(strangers)
        save_grid(torch.cat(shown).movedim(-1, 1), self.args.pictures / "agreement.jpg", 8)
        return result

    def striped(self, count: int, seed: int) -> scenes.Scenes:
        """Scenes whose every object shows all style variables: striped, neither white nor black."""
        drawn = scenes.sample(20 * self.args.n, torch.Generator().manual_seed(seed), count=count)
        hued = (drawn.colour[:, :count] < list(scenes.COLOURS).index("white")).all(1)
        drawn.texture[:, :count] = scenes.TEXTURES.index("striped")
        return drawn.take(hued.nonzero()[: self.args.pairs, 0])

    # ------------------------------------------------------------------------- what comes with the model

    def controlnet(self) -> dict:
        """Does every object stand where the layout's outline is? With the hint and without."""
        drawn = scenes.sample(self.args.pairs, torch.Generator().manual_seed(HELD_OUT + 4), count=2)
        captions = [scenes.caption(drawn, i) for i in range(len(drawn.radius))]
        hints = scenes.layout(drawn).movedim(1, -1)
        result, shown = {}, [hints[:8]]
        for name in ("with the hint", "without"):
            pictures = self.draw(captions, HELD_OUT, batch=1, hints=hints if name == "with the hint" else None)
            seen = [metrics.look(self.reader, picture)[2] for picture in pictures]
            # A ring's centre is empty: what counts is the filled square about each centre.
            placed = [
                any(metrics.placed(found, _about(drawn, i, slot)) for found in seen[i])
                for i in range(len(seen))
                for slot in range(2)
            ]
            result[name] = sum(placed) / len(placed)
            shown.append(pictures[:8])
        save_grid(torch.cat(shown).movedim(-1, 1), self.args.pictures / "controlnet.jpg", 8)
        return result

    def subject(self) -> dict:
        """The subject by embedding and by LoRA, next to no teaching."""
        kinds = {
            "neither": ("none", "ball"),
            "embedding": ("none", "embedding:demo-subject-embedding ball"),
            "LoRA": ("LoRA", f"{subject.LORA_WORD} ball"),
        }
        return self._subject(UNET, kinds, "subject.jpg")

    def dit_subject(self) -> dict:
        """The same of the transformer, which has a LoRA alone."""
        kinds = {"neither": ("none", "ball"), "LoRA": ("LoRA", f"{subject.LORA_WORD} ball")}
        return self._subject(DIT, kinds, "dit-subject.jpg")

    def _subject(self, model: str, kinds: dict[str, tuple[str, str]], picture: str) -> dict:
        """Colour and texture against the subject's photos. kinds: {how it was taught: (change of the MODEL, words)}."""
        drawn, photos = subject.photos()
        photos, masks = photos.movedim(1, -1), scenes.masks(drawn)[:, 0]
        result, shown = {}, [photos]
        for name, (change, words) in kinds.items():
            captions = [f"a {words} {place}" for place in list(scenes.BACKGROUNDS.values()) * 4][: self.args.pairs]
            pictures = self.draw(captions, HELD_OUT, model, change=change)
            seen = [metrics.look(self.reader, picture)[2] for picture in pictures]
            discs = [(picture, _disc(found[0])) for picture, found in zip(pictures, seen) if found]
            result[name] = {
                "colour distance": _mean([metrics.colour_distance(p, m, photos[0], masks[0]) for p, m in discs]),
                "texture similarity": _mean([metrics.texture_similarity(p, m, photos[0], masks[0]) for p, m in discs]),
                "found": len(discs) / len(pictures),
            }
            shown.append(pictures[:8])
        save_grid(torch.cat(shown).movedim(-1, 1), self.args.pictures / picture, 8)
        return result


def _about(drawn, row: int, slot: int, size: int = 128) -> Tensor:
    at = (torch.arange(size) + 0.5) / size
    x, y = drawn.centre[row, slot]
    reach = drawn.radius[row, slot] / 2
    return ((at - y).abs() < reach)[:, None] & ((at - x).abs() < reach)[None]


def _disc(found: detector.Found, radius: float = 0.15, size: int = 128) -> Tensor:
    at = (torch.arange(size) + 0.5) / size
    return torch.hypot(at[None] - found.centre[0], at[:, None] - found.centre[1]) < radius


def _mean(values) -> float | None:
    return sum(values) / len(values) if values else None


def _shares(verdicts: list[metrics.Verdict]) -> dict:
    objects = {
        field: [right for v in verdicts for right in getattr(v, field)] for field in ("colour", "shape", "texture")
    }
    return {
        "scenes": len(verdicts),
        "background": _mean([v.background for v in verdicts]),
        **{field: _mean(rights) for field, rights in objects.items()},
        "present": _mean([v.present for v in verdicts]),
        "present in shape": _mean([v.present and all(v.shape) for v in verdicts]),
        "spare": _mean([v.spare for v in verdicts]),
    }


def _differing(pairs: list[tuple]) -> dict:
    """Of pairs of main objects: shares that differ in place, colour, texture and shape, and mean error of the style."""
    both = [(a, b) for a, b in pairs if a and b]
    style = [metrics.style_errors(a[1], b[1]) for a, b in both]
    return {
        "pairs": len(both),
        "place": _mean([a[0] != b[0] for a, b in both]),
        **{
            field: _mean([getattr(a[1], field) != getattr(b[1], field) for a, b in both])
            for field in ("colour", "texture", "shape")
        },
        "style": _mean([_mean(list(errors.values())) for errors in style if errors]),
    }


def _means(errors: list[dict[str, float]]) -> dict:
    """Mean of every variable, and over all of SHOWN together, each with half the width of its 95 % confidence
    interval.
    """
    errors = [e for e in errors if e]
    columns = {name: torch.tensor([e[name] for e in errors if name in e]) for name in scenes.STYLE}
    columns["all"] = torch.tensor([_mean([e[name] for name in SHOWN if name in e]) for e in errors])
    return {"pairs": len(errors)} | {
        name: [column.mean().item(), 1.96 * column.std().item() / len(column) ** 0.5]
        for name, column in columns.items()
        if len(column) > 1
    }


# --------------------------------------------------------------------------------------------- the README


def _percent(value) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score_table(scores: dict[str, dict]) -> str:
    fields = ["scenes", "background", "colour", "shape", "texture", "present", "present in shape"]
    rows = [
        [name, str(s["scenes"]), *(_percent(s[field]) for field in fields[1:]), f"{s['spare']:.2f}"]
        for name, s in scores.items()
        if s["scenes"]
    ]
    return _table(["", *fields, "extra objects per scene"], rows)


def _style_table(results: dict[str, dict]) -> str:
    names = [name for name in (*scenes.STYLE, "all") if any(name in result for result in results.values())]
    rows = [
        [
            kind,
            str(result["pairs"]),
            *(f"{result[n][0]:.3f} ± {result[n][1]:.3f}" if n in result else "-" for n in names),
        ]
        for kind, result in results.items()
    ]
    return _table(["", "pairs", *names], rows)


def tables(results: dict) -> dict[str, str]:
    """The README's measured blocks, by the name of their marker."""
    blocks = {}
    if "judge" in results:
        judged = results["judge"]
        blocks["judge"] = (
            _score_table({name: judged[name]["all"] for name in ("renders", "after the autoencoder")})
            + "\n\n"
            + _style_table(judged["style"])
            + f"\n\nAutoencoder: {judged['autoencoder psnr']:.2f} dB PSNR on these renders."
        )
    for name in ("prompts", "dit_prompts"):
        if name not in results:
            continue
        score = results[name]["score"]
        goals = [
            "goal",
            "",
            *(_percent(TARGETS[f]) for f in ("background", "colour", "shape", "texture")),
            "85.0 % (two objects)",
            "",
            "",
        ]
        blocks[name] = (
            f"{_score_table(score)}\n| {' | '.join(goals)} |\n\n{results[name]['seconds']:.2f} CPU-seconds an image."
        )
    heads = {"diversity": "left out", "carried": "fed"}
    for name, head in (heads | {f"dit_{name}": head for name, head in heads.items()}).items():
        if name in results:
            rows = [
                [row, str(shares["pairs"]), *map(_percent, list(shares.values())[1:-1]), f"{shares['style']:.3f}"]
                for row, shares in results[name].items()
            ]
            blocks[name] = _table([head, "pairs", "place", "colour", "texture", "shape", "style"], rows)
    for name in ("swap", "agreement"):
        if name in results:
            blocks[name] = _style_table(results[name])
    if "agreement" in results:
        kinds = {kind: r["present"] for kind, r in results["agreement"].items() if "present" in r}
        blocks["agreement"] += (
            "\n\nBoth objects present: " + ", ".join(f"{kind} {_percent(p)}" for kind, p in kinds.items()) + "."
        )
    if "controlnet" in results:
        blocks["controlnet"] = _table(
            ["objects inside their outline", ""], [[k, _percent(v)] for k, v in results["controlnet"].items()]
        )
    for name in ("subject", "dit_subject"):
        if name in results:
            blocks[name] = _table(
                ["taught by", "colour distance to a photo", "texture similarity", "object found"],
                [
                    [k, f"{v['colour distance']:.1f}", f"{v['texture similarity']:.3f}", _percent(v["found"])]
                    for k, v in results[name].items()
                ],
            )
    return blocks


def write_readme(results: dict, path: Path = HERE / "README.md") -> None:
    text = path.read_text()
    for name, block in tables(results).items():
        before, rest = text.split(f"<!-- measured: {name} -->\n")
        text = f"{before}<!-- measured: {name} -->\n{block}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    path.write_text(text)


SECTIONS = (
    *("judge", "prompts", "dit_prompts", "diversity", "dit_diversity", "swap", "carried", "dit_carried"),
    *("agreement", "controlnet", "subject", "dit_subject"),
)


def connect(address: str) -> None:
    """Connect to the Ray cluster that draws; ends the script where there is none."""
    from farm import cluster, errors

    try:
        cluster.connect(address)
    except errors.Failure as failure:
        sys.exit(str(failure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--n", type=int, default=500, help="prompts")
    parser.add_argument("--pairs", type=int, default=64, help="pictures of every other experiment")
    parser.add_argument("--steps", type=int, default=sampling.STEPS)
    parser.add_argument("--weights", help="another folder of weights")
    parser.add_argument("--results", type=Path, default=HERE / "runs" / "evaluation.json")
    parser.add_argument("--pictures", type=Path, default=HERE / "pictures")
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    parser.add_argument("--address", help="of a Ray cluster whose machines draw; local: one that is started here")
    args = parser.parse_args()
    if args.address:
        connect(args.address)
    sampling.start_comfyui()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    evaluation = Evaluation(args)
    for section in args.only:
        results[section] = getattr(evaluation, section)()
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))
        print(section, tables(results)[section], sep="\n", flush=True)
    if args.readme:
        write_readme(results)


if __name__ == "__main__":
    main()
