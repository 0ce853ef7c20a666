"""From a workflow, seeds and a table of overrides to jobs: prompts with an identity."""

import copy
import csv
import hashlib
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cluster import ROOT
from .errors import Failure

OURS = ROOT / "example_workflows" / "api"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SEEDS = ("seed", "noise_seed")
IN_INPUT = " [input]"  # ComfyUI's suffix for a file of its input folder, which a name without a suffix means, too
CLIPSPACE = "clipspace"  # where in the input folder the Mask Editor saves

Prompt = dict[str, dict[str, Any]]  # node id: {"class_type", "inputs", ...}, as ComfyUI's API takes it
Row = dict[str, Any]  # "node.input": value, and perhaps "name"


@dataclass
class Job:
    """One prompt to run. `uploads`: what it reads, {the name in ComfyUI's input folder: the file here}."""

    id: str  # a hash of the prompt, which names its uploads by their content
    name: str
    prompt: Prompt
    overrides: Row
    uploads: dict[str, Path] = field(default_factory=dict)
    attempts: int = 0

    @property
    def folder(self) -> str:
        """The name of the folder of its results."""
        return f"{self.name}-{self.id}"


def load_workflow(name: str) -> tuple[Prompt, Path]:
    """An API workflow, by its file or by (a unique part of) the name of one of ours; and the file."""
    path = Path(name)
    if not path.is_file():
        found = [ours for ours in sorted(OURS.glob("*.json")) if name.lower() in ours.stem.lower()]
        exact = [ours for ours in found if ours.stem == name]
        if len(exact or found) != 1:
            seen = "; ".join(ours.stem for ours in found or sorted(OURS.glob("*.json")))
            raise Failure(f"There is no file {name}, and it does not name one workflow of ours: {seen}.")
        path = (exact or found)[0]
    try:
        prompt = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Failure(f"{path} does not hold JSON: {error}.") from None
    if not isinstance(prompt, dict) or not all(isinstance(n, dict) and "class_type" in n for n in prompt.values()):
        raise Failure(f"{path} is not an API workflow: export it with Workflow > Export (API).")
    return prompt, path


def parse_seeds(text: str) -> range:
    """ "3..7" -> 3, 4, 5, 6, 7; "4" -> 4."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise Failure(f"--seeds takes A..B with A <= B, such as 0..19, and got {text}.")
    return range(int(found[1]), int(found[2] or found[1]) + 1)


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV (first line: the columns; an empty cell overrides nothing) or JSON Lines file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Failure(f"The table {path} cannot be read: {error.strerror}.") from None
    if path.suffix.lower() == ".csv":
        return [{key: cell for key, cell in row.items() if cell} for row in csv.DictReader(text.splitlines())]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise Failure(f"Line {number} of {path} does not hold JSON: {error}.") from None
            if not isinstance(rows[-1], dict):
                raise Failure(f'Line {number} of {path} is not an object {{"node.input": value}}.')
    return rows


def find_node(prompt: Prompt, name: str) -> str:
    """The id of the node of this id, or of the only one with this title or class."""
    if name in prompt:
        return name
    found = [key for key, node in prompt.items() if name in (node["class_type"], node.get("_meta", {}).get("title"))]
    if len(found) != 1:
        raise Failure(
            f"The table names the node {name}, and the workflow has {len(found) or 'none'} of that name: use one of"
            f" the ids {', '.join(prompt)}."
        )
    return found[0]


def typed(value: Any, present: Any, key: str) -> Any:
    """A table's value in the type of the one it replaces: cells of a CSV are all text."""
    if not isinstance(value, str) or isinstance(present, str):
        return value
    try:
        parsed = json.loads(value.lower() if isinstance(present, bool) else value)
    except ValueError:
        parsed = value
    fits = isinstance(parsed, type(present)) or (isinstance(present, float) and isinstance(parsed, int))
    if isinstance(present, (bool, int, float)) and not fits:
        raise Failure(f"The table gives {key} the value {value}, and the workflow has {present!r} there.")
    return parsed


def override(prompt: Prompt, row: Row) -> None:
    """Write a row's values into the prompt."""
    for key, value in row.items():
        if key == "name":
            continue
        name, dot, entry = key.partition(".")
        node = prompt[find_node(prompt, name)] if dot else None
        if node is None or entry not in node["inputs"]:
            has = ", ".join(node["inputs"]) if node else "none without a dot"
            raise Failure(f"The table's column {key} is not node.input; the inputs there: {has}.")
        node["inputs"][entry] = typed(value, node["inputs"][entry], key)


def add_to_seeds(prompt: Prompt, number: int) -> None:
    """Add `number` to every seed: so the images of a stack and their composite stay together."""
    for node in prompt.values():
        for key in SEEDS:
            if isinstance(node["inputs"].get(key), int):
                node["inputs"][key] += number


def find_file(named: str, folders: list[Path]) -> Path | None:
    """The file of that name, from the first folder that has it. A file of the Mask Editor is found without its folder
    clipspace, too.
    """
    for name in (named, named.removeprefix(f"{CLIPSPACE}/")):
        for folder in folders:
            if os.path.isfile(folder / name):  # Path.is_file raises where a prompt's text is too long for a file name
                return folder / name
    return None


def upload_name(named: str, path: Path) -> str:
    """The name that a file gets in the input folder, made of its content. A file of the Mask Editor stays in the folder
    clipspace, by which Collage Layer tells which way round Load Image's MASK is.
    """
    name = f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}-{path.name}"
    is_painted = named.startswith(f"{CLIPSPACE}/") or path.parent.name == CLIPSPACE
    return f"{CLIPSPACE}/{name}" if is_painted else name


def take_files(prompt: Prompt, folders: list[Path]) -> dict[str, Path]:
    """Replace every input that names a picture found in one of the folders, or any file as "@path", by the name it is
    uploaded under. Returns {that name: file}.
    """
    uploads = {}
    for key, node in prompt.items():
        for entry, value in node["inputs"].items():
            if not isinstance(value, str):
                continue
            named = value.removeprefix("@").removesuffix(IN_INPUT)
            if not value.startswith("@") and Path(named).suffix.lower() not in PICTURES:
                continue
            path = find_file(named, folders)
            if path:
                node["inputs"][entry] = upload_name(named, path)
                uploads[node["inputs"][entry]] = path
            elif value.startswith("@"):
                seen = ", ".join(map(str, folders))
                raise Failure(f"{node['class_type']} (node {key}) is to read {named}, which is in none of {seen}.")
    return uploads


def identity(prompt: Prompt) -> str:
    """A hash of what the prompt computes: titles do not count."""
    bare = {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in prompt.items()}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()[:12]


def safe_name(text: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", text).strip(".-")[:60] or "run"


def make_jobs(prompt: Prompt, rows: list[Row], seeds: range | None, folders: list[Path]) -> list[Job]:
    """A job for each row and seed, in that order; rows that come to the same prompt are one job."""
    jobs: dict[str, Job] = {}
    for (number, row), seed in itertools.product(enumerate(rows or [{}]), seeds or [None]):
        changed = copy.deepcopy(prompt)
        override(changed, row)
        if seed is not None:
            add_to_seeds(changed, seed)
        uploads = take_files(changed, folders)
        parts = [str(row.get("name", f"row-{number:04d}"))] if rows else []
        parts += [f"seed-{seed:04d}"] if seed is not None else []
        name = safe_name("-".join(parts) or "run")
        overrides = {**row, **({"seeds": seed} if seed is not None else {})}
        job = Job(identity(changed), name, changed, overrides, uploads)
        jobs.setdefault(job.id, job)
    return list(jobs.values())
