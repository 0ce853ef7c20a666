"""The example workflows as the tests run them: shortened, and their pictures compared."""

import json
from pathlib import Path

from PIL import Image, ImageChops

from .. import dev

WORKFLOWS = Path(__file__).resolve().parent.parent / "example_workflows"
PHOTOMONTAGE = "04 Photomontage (demo)"
COMPOSITE = "46"  # its SaveImage of the composite


def workflow(name: str) -> dict:
    """The API workflow of that name."""
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def quick(prompt: dict, steps: int = 3) -> dict:
    """The prompt itself, with few steps and small batches."""
    for node in prompt.values():
        if node["class_type"] in ("KSampler", "BasicScheduler"):
            node["inputs"]["steps"] = steps
        if node["class_type"] == "LearnLayerToken":
            node["inputs"].update(steps=2, preview_every=0)
        if "amount" in node["inputs"]:
            node["inputs"]["amount"] = 2
    return prompt


def picture(server: dev.Server, outputs: dict[str, dict], node: str = COMPOSITE) -> Image.Image:
    """The only picture that a node of a finished prompt saved or previewed."""
    (image,) = outputs[node]["images"]
    return Image.open(server.base / image["type"] / image["subfolder"] / image["filename"]).convert("RGB")


def equal(a: Image.Image, b: Image.Image) -> bool:
    """But for one level of 255: torch's rounding on a CPU depends on where its memory lies."""
    return max(most for _, most in ImageChops.difference(a, b).getextrema()) <= 1
