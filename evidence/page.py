"""docs/evidence.md as sections: those that were measured anew take the place of older ones, and the head and the first
table are made of whatever the page then holds.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .causes import CAUSES, CAUSES_ON_DIT, DIFFERENCES, SMALL, UNKNOWN, Cause
from .measurements import CLAIMS, Section, markdown

HEAD = """# Evidence

The claims of each paper, measured on the two demo models, a UNet and a diffusion transformer (DiT), which draw toy
scenes ([demo/README.md](../demo/README.md)). *Reproduced*: the 95 % confidence interval of the paired difference lies
on the paper's side of zero; *not reproduced*: on the other side; *not decided*: it contains zero.
"""
METHOD = """## How it was measured

`python dev.py evidence` makes all of this page with fixed seeds and ComfyUI's own samplers; each section says when and
from which commit it was measured. Tables show means with their 95 % confidence intervals. No GPU was available.

Where the papers have LPIPS, DINO or CLIP-I, this page has EfficientNet-Lite0 with its ImageNet weights, a network
trained on photographs: *feature distance* is LPIPS's formula over its features with equal weights, *embedding cosine*
the cosine similarity of its embeddings. They are neither LPIPS nor DINO, and their numbers can be compared only with
each other; tests/test_perceptual.py checks them on pictures whose likeness is known. Sections without these columns
are older. What the papers measure with ImageReward or with people is not measured here. That the methods' formulas are
the papers' is tested in tests/."""
ON_DIT = re.compile(r",? on the transformer")
MODEL_NAMES = ("UNet", "DiT")
TITLE = "All claims"
MOST = 2000  # samples that anyone would measure


class Row(NamedTuple):
    """A claim as the page has it. setting: the title of its section, without the model."""

    setting: str
    model: str
    text: str
    paper: str
    found: str
    verdict: str


def sections(text: str) -> list[Section]:
    """The sections of a page, in order, without those that are made of them."""
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    found = [Section(title.strip(), body.strip()) for title, _, body in (part.partition("\n") for part in parts)]
    return [section for section in found if section.title not in (TITLE, "How it was measured")]


def measured_line(commit: str, day: str, machine: str) -> str:
    return f"*Measured {day}, commit {commit}, on {machine}.*"


def replaced(old: Sequence[Section], new: Iterable[Section]) -> list[Section]:
    """The old sections with the new ones in their places: by title, else after the last one of the same method, else at
    the end.
    """
    done = list(old)
    for section in new:
        titles = [each.title for each in done]
        if section.title in titles:
            done[titles.index(section.title)] = section
            continue
        same = [number for number, title in enumerate(titles) if method_of(title) == method_of(section.title)]
        done.insert(same[-1] + 1 if same else len(done), section)
    return done


def method_of(title: str) -> str:
    return re.split(r"[,:]", title)[0]


def rows(of: Iterable[Section]) -> list[Row]:
    """Every claim of the sections, in order."""
    found = []
    for section in of:
        model = MODEL_NAMES[bool(ON_DIT.search(section.title))]
        setting = ON_DIT.sub("", section.title)
        lines = section.text.splitlines()
        for start in (number for number, line in enumerate(lines) if _cells(line) == CLAIMS):
            seen: Counter[str] = Counter()
            for line in lines[start + 2 :]:
                if not line.startswith("|"):
                    break
                text, paper, number, verdict = _cells(line)
                seen[text] += 1
                again = f" ({seen[text]})" if seen[text] > 1 else ""
                found.append(Row(setting, model, text + again, paper, number, verdict))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []


def merged(found: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """{(setting, claim): {model: its row}}, the settings of a method together. A claim of the DiT in a setting that the
    UNet does not have stands with the same claim of the same method.
    """
    by_claim: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(found, key=lambda row: MODEL_NAMES.index(row.model)):
        key = row.setting, row.text
        if key not in by_claim:
            alike = (k for k in by_claim if (method_of(k[0]), k[1]) == (method_of(row.setting), row.text))
            key = next((k for k in alike if row.model not in by_claim[k]), key)
        by_claim.setdefault(key, {})[row.model] = row
    methods = list(dict.fromkeys(method_of(setting) for setting, _ in by_claim))
    return dict(sorted(by_claim.items(), key=lambda item: methods.index(method_of(item[0][0]))))


def verdict_of(by_model: dict[str, Row]) -> str:
    """One verdict of a claim: both models' where they differ."""
    verdicts = [row.verdict for row in by_model.values()]
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return ", ".join(f"{model} {row.verdict}" for model, row in by_model.items())


def first_table(of: Iterable[Section]) -> str:
    """What every paper claims, and what was found: the first thing on the page."""
    claims = merged(rows(of))
    table, setting = [], ""
    for (title, text), by_model in claims.items():
        if title != setting:
            table.append([f"**{title}**", "", "", "", ""])
            setting = title
        here = [by_model[model].found if model in by_model else "" for model in MODEL_NAMES]
        verdict = verdict_of(by_model)
        table.append([text, next(iter(by_model.values())).paper, *here, verdict])
    verdicts = Counter(row.verdict for by_model in claims.values() for row in by_model.values())
    counted = ", ".join(f"{verdicts[name]} {name}" for name in ("reproduced", "not decided", "not reproduced"))
    return "\n\n".join(
        [
            f"## {TITLE}",
            (
                f"{sum(verdicts.values())} verdicts on {len(claims)} claims: {counted}. Differences are paired, with"
                " their 95 % confidence interval and the number of pairs; an empty cell was not measured."
            ),
            markdown(["claim", "paper", "here, UNet", "here, DiT", "verdict"], table),
            causes_table(claims),
            differences_table(claims),
        ]
    )


def causes_table(claims: dict[tuple[str, str], dict[str, Row]]) -> str:
    """Why claims were not found, how that is known, and where more samples would tell."""
    by_cause: dict[Cause, dict[str, list[str]]] = {}
    for (setting, text), by_model in claims.items():
        for model, row in by_model.items():
            if row.verdict != "reproduced":
                named = by_cause.setdefault(cause_of(setting, text, row), {})
                named.setdefault(f"{setting}: {text}", []).append(model + samples_wanted(row))
    if not by_cause:
        return "Every claim is reproduced."
    lines = [
        ["<br>".join(f"{text} ({', '.join(models)})" for text, models in named.items()), *cause]
        for cause, named in by_cause.items()
    ]
    return (
        "**What was not reproduced or not decided, and why.** In brackets: the model and, where undecided, the number"
        " of samples that would decide a difference of the size found here.\n\n"
        + markdown(["claim", "cause", "how it was tested"], lines)
    )


def differences_table(claims: dict[tuple[str, str], dict[str, Row]]) -> str:
    """Where the two models differ by their nature, and what shows it."""
    lines = []
    for (setting, text), by_model in claims.items():
        for (method, pattern), why in DIFFERENCES.items():
            if method_of(setting) == method and re.search(pattern, text) and MODEL_NAMES[1] in by_model:
                here = [by_model[model].found if model in by_model else "" for model in MODEL_NAMES]
                lines.append([f"{setting}: {text}", *here, why])
    return (
        "**Where the two models differ, and why.** They differ in size and in the number of training samples: only the"
        " directions can be compared.\n\n" + markdown(["claim", *MODEL_NAMES, "why"], lines)
    )


def samples_wanted(row: Row) -> str:
    """How many samples would decide a claim that is not decided, if its difference stayed."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", row.found)]
    if row.verdict != "not decided" or len(numbers) < 3 or not all(numbers):
        return ""
    mean, half, n = numbers[:3]
    wanted = n * (half / mean) ** 2
    return f" {wanted:.0f}" if wanted < MOST else f" more than {MOST}"


def cause_of(setting: str, text: str, row: Row) -> Cause:
    """The cause of a claim that was not found."""
    on_dit = CAUSES_ON_DIT if row.model == MODEL_NAMES[1] else {}
    for (method, pattern), cause in [*on_dit.items(), *CAUSES.items()]:
        if method_of(setting) == method and re.search(pattern, text):
            return cause
    return UNKNOWN if row.verdict == "not reproduced" else SMALL


def written(of: Sequence[Section]) -> str:
    """The page's Markdown."""
    return "\n\n".join([HEAD.strip(), first_table(of), METHOD, *(f"## {title}\n\n{text}" for title, text in of)]) + "\n"
