"""Makes what an example workflow needs besides its API form: the page's own form, a thumbnail, and words to translate.

    python dev.py workflow "example_workflows/api/NAME.json" [--no-run | --inset "Image 0" "Image 1"]

writes example_workflows/NAME.json and, from the last picture that a run saves, its .jpg, with the pictures that the
nodes of these titles preview small in its corner; names of nodes and inputs that a language in locales/ lacks are added
to it in English. What the page's form has already keeps its place, size and colour, and its groups and notes stay; a
new node goes into the column of its depth.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from .live_server import serving

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
NOTES = {"MarkdownNote", "Note"}
SEEDS = {"seed", "noise_seed"}  # the page gives inputs of these names a menu, whatever their schema says
WIDTH, GAP, TOP, ROW = 320, 60, 90, 26  # pixels of the page: a column, between two, its first node, one slot or widget
THUMBNAIL, INSET = 512, 140  # pixels along a side: of the picture, and of those in its corner


class Input(NamedTuple):
    """One input of a node on the page. type: as a link has it. options: of the schema. optional: drawn as such."""

    name: str
    type: str
    options: dict[str, Any]
    optional: bool = False

    @property
    def is_widget(self) -> bool:
        """Also one that takes links of other types than its widget's: "COMBO,STRING"."""
        kinds = {self.type, self.options.get("widgetType")}
        return bool(kinds & WIDGETS) and not self.options.get("forceInput")


def inputs_of(info: dict[str, Any], values: dict[str, Any]) -> Iterator[Input]:
    """A node's inputs, in the schema's order, with those that a growing list or a chosen option adds.

    info: of /object_info. values: the node's inputs in the API form.
    """
    for group in ("required", "optional"):
        for name, (kind, *rest) in info["input"].get(group, {}).items():
            options = rest[0] if rest else {}
            if kind == "COMFY_AUTOGROW_V3":
                template = options["template"]
                (item,) = template["input"]["required"].values()
                filled = sum(key.startswith(f"{name}.") for key in values)
                for number in range(min(filled + 1, template["max"])):  # and an empty one, for the next
                    optional = number >= template["min"]
                    yield Input(f"{name}.{template['prefix']}{number}", item[0], {}, optional)
                continue
            yield Input(name, "COMBO" if isinstance(kind, list) else kind, options, group == "optional")
            if kind == "COMFY_DYNAMICCOMBO_V3":
                (chosen,) = (option for option in options["options"] if option["key"] == values[name])
                for one in inputs_of({"input": chosen["inputs"]}, {}):
                    yield one._replace(name=f"{name}.{one.name}")


def widget_values(inputs: list[Input], values: dict[str, Any]) -> list[Any]:
    """What the page keeps of a node's widgets: each one's value, after some with that of a menu or a button."""
    found = []
    for one in inputs:
        if not one.is_widget:
            continue
        value = values.get(one.name)
        found.append(one.options.get("default", "") if value is None or isinstance(value, list) else value)
        if one.type == "INT" and (one.options.get("control_after_generate") or one.name in SEEDS):
            found.append("fixed")
        if one.options.get("image_upload"):
            found.append("image")
    return found


def page_node(number: str, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """A node without its links and its place."""
    inputs = list(inputs_of(info, node["inputs"]))
    unknown = node["inputs"].keys() - {one.name for one in inputs}
    if unknown:
        raise ValueError(f"{node['class_type']} ({number}) has no input {', '.join(sorted(unknown))}.")
    slots = []
    for one in sorted(inputs, key=lambda one: one.is_widget):  # sockets first, as the page sorts them
        if one.is_widget and one.options.get("socketless"):
            continue
        slot: dict[str, Any] = {"localized_name": one.name, "name": one.name, "type": one.type}
        if one.is_widget:
            slot["widget"] = {"name": one.name}
        elif one.optional:
            slot["shape"] = 7
        if "." in one.name and not one.is_widget:
            slot["label"] = one.name.partition(".")[2]
        slots.append({**slot, "link": None})
    outputs = [
        {"localized_name": name, "name": name, "type": kind, "links": None}
        for name, kind in zip(info["output_name"], info["output"])
    ]
    values = widget_values(inputs, node["inputs"])
    rows = max(len(slots), len(outputs)) + sum(
        8 for one in inputs if one.is_widget and (one.options.get("multiline") or one.options.get("socketless"))
    )
    made = {
        "id": int(number),
        "type": node["class_type"],
        "pos": [0, 0],
        "size": [WIDTH, ROW * (rows + 1) + (260 if info["output_node"] else 0)],  # a picture under its widgets
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": slots,
        "outputs": outputs,
        "properties": {"Node name for S&R": node["class_type"]},
    }
    title = node.get("_meta", {}).get("title")
    if title not in (None, info["display_name"]):
        made["title"] = title
    return {**made, "widgets_values": values} if values else made


def depths(prompt: dict[str, Any]) -> dict[str, int]:
    """How many links lie between each node and what it begins with, along the longest way."""
    found: dict[str, int] = {}

    def depth(number: str) -> int:
        if number not in found:
            sources = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
            found[number] = 1 + max(map(depth, sources), default=-1)
        return found[number]

    for number in prompt:
        depth(number)
    return found


def page_form(prompt: dict[str, Any], infos: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The page's form of an API workflow. infos: /object_info. before: the page's form that is there already."""
    column = depths(prompt)
    order = sorted(prompt, key=lambda number: (column[number], int(number)))
    nodes = {number: page_node(number, prompt[number], infos[prompt[number]["class_type"]]) for number in order}
    placed = {str(node["id"]): node for node in (before or {}).get("nodes", ())}
    notes = [node for node in placed.values() if node["type"] in NOTES]
    bottoms: dict[int, int] = {}
    # Where some nodes have a place already, the new ones go under all of them.
    top = max((node["pos"][1] + node["size"][1] + GAP for node in placed.values()), default=TOP)
    for position, number in enumerate(order):
        node = nodes[number]
        node["order"] = position
        old = placed.get(number)
        if old and old["type"] == node["type"]:
            node.update({key: old[key] for key in ("pos", "size", "color", "bgcolor", "title") if key in old})
            continue
        y = bottoms.get(column[number], top)
        node["pos"] = [column[number] * (WIDTH + GAP), y]
        bottoms[column[number]] = y + node["size"][1] + GAP
    links = []
    for number in order:
        for index, slot in enumerate(nodes[number]["inputs"]):
            value = prompt[number]["inputs"].get(slot["name"])
            if isinstance(value, list):
                source, output = nodes[str(value[0])], value[1]
                slot["link"] = len(links) + 1
                outlet = source["outputs"][output]
                outlet["links"] = [*(outlet["links"] or ()), slot["link"]]
                links.append([slot["link"], source["id"], output, int(number), index, slot["type"]])
    every = [*nodes.values(), *notes]
    return {
        "id": "00000000-0000-0000-0000-000000000000",
        "revision": 0,
        "last_node_id": max(node["id"] for node in every),
        "last_link_id": len(links),
        "nodes": every,
        "links": links,
        "groups": (before or {}).get("groups", []),
        "config": {},
        "extra": {"ds": {"scale": 1, "offset": [90, 90]}},  # clear of the page's menus
        "version": 0.4,
    }


def words_of(info: dict[str, Any]) -> dict[str, Any]:
    """A node's names and tooltips in English, as a locale's nodeDefs.json holds them."""
    schema = itertools.chain.from_iterable(info["input"].get(group, {}).items() for group in ("required", "optional"))
    inputs = {name: (rest[0] if rest else {}) for name, (_, *rest) in schema}
    outputs = zip(info["output_name"], info["output_tooltips"] or ())
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": options.get("display_name", name), "tooltip": options.get("tooltip", "")}
            for name, options in inputs.items()
        },
        "outputs": {
            str(number): {"name": name, "tooltip": tooltip or ""} for number, (name, tooltip) in enumerate(outputs)
        },
    }


def add_missing(words: dict[str, Any], english: dict[str, Any]) -> list[str]:
    """Add what a translation lacks, in place; returns where, as node.inputs.name."""
    added = []
    for key, value in english.items():
        if key not in words and value != {}:
            words[key] = value
            added.append(key)
        elif isinstance(value, dict) and value:
            added += [f"{key}.{rest}" for rest in add_missing(words[key], value)]
    return added


def add_stubs(infos: dict[str, Any], locales: Path = LOCALES) -> None:
    """Add English words to every language that lacks them, and say which."""
    ours = {name: info for name, info in infos.items() if info["python_module"] == "custom_nodes.montage"}
    english = {name: words_of(info) for name, info in ours.items() if not info.get("dev_only")}
    for path in sorted(locales.glob("*/nodeDefs.json")):
        words = json.loads(path.read_text(encoding="utf-8"))
        if added := add_missing(words, english):
            path.write_text(json.dumps(words, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            print(f"{path.relative_to(locales.parent)}: to translate: {', '.join(added)}")


def fitted(base: Path, image: dict[str, str], side: int) -> Image.Image:
    """A picture of a run's outputs as a square. base: the server's folder. side: in pixels."""
    with Image.open(base / image["type"] / image["subfolder"] / image["filename"]) as picture:
        return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path, help="its API form, in example_workflows/api")
    parser.add_argument("--no-run", action="store_true", help="make no thumbnail")
    parser.add_argument("--inset", nargs="+", default=[], help="titles of nodes whose pictures it shows small")
    chosen = parser.parse_args()
    if not chosen.workflow.is_file():
        parser.error(f"there is no {chosen.workflow}: save its API form there first (Workflow > Export (API))")
    prompt = json.loads(chosen.workflow.read_text(encoding="utf-8"))
    page = chosen.workflow.resolve().parent.parent / chosen.workflow.name
    before = json.loads(page.read_text(encoding="utf-8")) if page.exists() else None
    with tempfile.TemporaryDirectory(prefix="montage-workflow-") as base, serving(Path(base)) as server:
        infos = server.call("/object_info")
        page.write_text(json.dumps(page_form(prompt, infos, before), indent=1, ensure_ascii=False), encoding="utf-8")
        add_stubs(infos)
        if not chosen.no_run:
            outputs = server.run(prompt, chosen.workflow.stem)
            saved = [image for node in sorted(outputs, key=int) for image in outputs[node].get("images", ())]
            last = [image for image in saved if image["type"] == "output"][-1]
            titled = {node["_meta"]["title"]: outputs[name] for name, node in prompt.items() if name in outputs}
            small = [titled[title]["images"][-1] for title in chosen.inset]
            made = fitted(Path(base), last, THUMBNAIL)
            for number, image in enumerate(small):
                made.paste(fitted(Path(base), image, INSET), (number * INSET, THUMBNAIL - INSET))
            made.save(page.with_suffix(".jpg"), quality=90)


if __name__ == "__main__":
    main()
