"""Every core node that takes or gives a MODEL, CONDITIONING, LATENT, SIGMAS, GUIDER or MASK, wired once before and once
after this pack's nodes: each keeps the identity laws or is refused in a sentence.

    python workshop/bootstrap.py montage.workshop.core_nodes

writes the outcome to docs/neighbours.md; tests/test_core_nodes_*.py hold it to that. The nodes are those that ComfyUI
lists, so that a new one turns up by itself.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import comfy.samplers
import torch
from comfy_api.latest import io

import nodes

from ..nodes.collage import CollageControl, CollageCrossAttn, CollageNoise
from ..nodes.layout_retouch import MultiSourceSwap, StepBlendSampler, TokenAttentionMap
from ..nodes.mca_ctrl import CollaborativeAttention
from ..nodes.photomontage import CompositeAttentionInject
from ..nodes.record import FeatureRecorder
from .collages import BLUE, RED, canvas, layer, plain
from .random_models import demo_control_net, demo_model
from .sampling import sample, sample_custom

Tensor = torch.Tensor

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "neighbours.md"
TYPES = ("MODEL", "CONDITIONING", "LATENT", "SIGMAS", "GUIDER", "MASK")
STEPS, SIZE, PIXELS, CFG = 2, 8, 64, 3.0
PROMPT = "a red ball beside a blue cube on grass"
SMALL = {
    "width": PIXELS,
    "height": PIXELS,
    "length": 1,
    "batch_size": 1,
    "steps": STEPS,
}  # instead of a video of full size
SAME, RUNS, ALONE = "same", "runs", "fails without ours too"
SEPARATE = {"TorchCompileModel": "tested in tests/test_neighbours.py", "TrainLoraNode": "trains, and does not sample"}


# ---------------------------------------------------------------- the core's nodes


@functools.cache
def core_nodes() -> dict[str, type]:
    """ComfyUI's nodes by their ids, as its server lists them without the nodes that call an API."""
    asyncio.run(nodes.init_builtin_extra_nodes())
    return {name: nodes.NODE_CLASS_MAPPINGS[name] for name in sorted(nodes.NODE_CLASS_MAPPINGS)}


class NeedsMore(Exception):
    """A node wants something that nobody can make here: a file, or what another model gives."""


class CoreNode:
    """One of them, and what stands in its sockets."""

    def __init__(self, name: str, node: type) -> None:
        self.name, self.node = name, node
        groups = node.INPUT_TYPES()
        self.required: dict[str, tuple] = groups.get("required", {})
        self.inputs: dict[str, tuple] = {**self.required, **groups.get("optional", {})}
        self.outputs = [str(output) if isinstance(output, str) else "COMBO" for output in node.RETURN_TYPES]

    @property
    def function(self) -> Any:
        """What it does: some nodes differ in nothing but their inputs' names (those that merge models)."""
        name = "execute" if issubclass(self.node, io.ComfyNode) else self.node.FUNCTION
        found = getattr(self.node, name)
        return getattr(found, "__func__", found)

    def takes(self, kind: str) -> str | None:
        """The first input of a type."""
        return next((name for name, spec in self.inputs.items() if spec[0] == kind), None)

    def gives(self, kind: str) -> bool:
        return kind in self.outputs

    def __call__(self, kind: str, wired: Any, given: dict[str, Any]) -> Any:
        """Its first output of a type, with `wired` in its first input of that type. Raises NeedsMore."""
        socket = self.takes(kind)
        arguments = {name: self.argument(name, spec, given) for name, spec in self.required.items() if name != socket}
        if socket:
            arguments[socket] = wired
        if issubclass(self.node, io.ComfyNode):
            ready = self.node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
            result = ready.execute(**arguments)
            found = result.args if isinstance(result, io.NodeOutput) else result
        else:
            found = getattr(self.node(), self.node.FUNCTION)(**arguments)
            found = found["result"] if isinstance(found, dict) else found
        value = found[self.outputs.index(kind)]
        return value[0] if getattr(self.node, "OUTPUT_IS_LIST", None) and isinstance(value, list) else value

    @staticmethod
    def argument(name: str, spec: tuple, given: dict[str, Any]) -> Any:
        kind, settings = spec[0], spec[1] if len(spec) > 1 else {}
        if kind == "CONDITIONING" and name == "negative":
            return given["negative"]
        if isinstance(kind, str) and kind in given:
            return given[kind]
        if isinstance(kind, list) or kind == "COMBO":
            options = kind if isinstance(kind, list) else settings.get("options", [])
            if not options:
                raise NeedsMore("a file")
            return settings.get("default", options[0])
        if kind == "INT" and name in SMALL:
            return SMALL[name]
        defaults = {"INT": 1, "FLOAT": 1.0, "BOOLEAN": False, "STRING": ""}
        if kind in defaults:
            return settings.get("default", settings.get("min", defaults[kind]))
        raise NeedsMore(str(kind))


# ---------------------------------------------------------------- ours


@functools.cache
def sockets() -> dict[str, Any]:
    """What goes into a core node's other sockets."""
    model, clip, vae = demo_model()
    generator = torch.Generator().manual_seed(0)
    encode = lambda text: clip.encode_from_tokens_scheduled(clip.tokenize(text))  # noqa: E731
    return {
        "MODEL": model,
        "CLIP": clip,
        "VAE": vae,
        "CONTROL_NET": demo_control_net(),
        "CONDITIONING": encode(PROMPT),
        "negative": encode(""),
        "LATENT": {"samples": torch.randn(1, 4, SIZE, SIZE, generator=generator)},
        "IMAGE": torch.rand(1, PIXELS, PIXELS, 3, generator=generator),
        "MASK": torch.ones(1, PIXELS, PIXELS),
        "SIGMAS": comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS),
        "GUIDER": guider_of(model, encode(PROMPT), encode("")),
        "SAMPLER": comfy.samplers.sampler_object("euler"),
        "TIMESTEPS_RANGE": (0.0, 1.0),
    }


def guider_of(model: Any, positive: list, negative: list) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(CFG)
    return guider


def sampled(model: Any, latent: dict | None = None, positive: list | None = None, **settings: Any) -> dict:
    given = sockets()
    latent = latent or {"samples": torch.zeros(1, 4, SIZE, SIZE)}
    settings = {"steps": STEPS, "cfg": CFG, **settings}
    return sample(model, latent, positive=positive or given["CONDITIONING"], negative=given["negative"], **settings)


def recorded(model: Any, latent: dict | None = None, positive: list | None = None, **settings: Any) -> dict:
    model, latent = FeatureRecorder.execute(model, latent or {"samples": torch.zeros(1, 4, SIZE, SIZE)}, 256).args
    return sampled(model, latent, positive, **settings)


@functools.cache
def collage() -> Any:
    """Two layers of equal noise and ordinary control."""
    left = layer(plain(RED), "a red ball", x=0.25, scale=0.5)
    return canvas(layer(plain(BLUE), "a blue cube", x=0.75, scale=0.5, behind=left), prompt=PROMPT)[0]


@functools.cache
def controlled() -> tuple[list, list]:
    given = sockets()
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    arguments = given["CONDITIONING"], given["negative"], given["CONTROL_NET"], given["IMAGE"], 1.0, 0.0, 1.0
    return apply(*arguments)


def base_only(model: Any, images: tuple[dict, dict]) -> tuple[Any, dict]:
    """A composite in which the first image owns everything."""
    masks = torch.stack([torch.ones(PIXELS, PIXELS), torch.zeros(PIXELS, PIXELS)])
    stack = {f"latent{number}": image for number, image in enumerate(images)}
    return CompositeAttentionInject.execute(model, stack, masks, 0, 0.0, 1.0, "all", "model", "composite").args


def nothing_edited(model: Any, images: tuple[dict, dict]) -> tuple[Any, dict]:
    """A subject in no part of the first image, which is locked."""
    nowhere = torch.zeros(1, PIXELS, PIXELS)
    arguments = 0, True, False, "SAGI first", 0.3, "soft", images[0], nowhere
    preset = {"preset": "paper swap"}
    return CollaborativeAttention.execute(model, images[1], torch.ones(1, PIXELS, PIXELS), preset, *arguments).args


def all_from_layout(model: Any, images: tuple[dict, dict]) -> tuple[Any, dict]:
    return MultiSourceSwap.execute(model, *images, 1.0, 1.0, 1.0, "all").args


def measured(model: Any, images: Any) -> tuple[Any, dict]:
    """The CONDITIONING of Token Attention Map carries its mark; so does `marked()`."""
    empty = {"samples": torch.zeros(1, 4, SIZE, SIZE)}
    return TokenAttentionMap.execute(model, empty, sockets()["CLIP"], PROMPT, "red ball", "all").args[:2]


def marked() -> list:
    given = sockets()
    empty = {"samples": torch.zeros(1, 4, SIZE, SIZE)}
    return TokenAttentionMap.execute(given["MODEL"], empty, given["CLIP"], PROMPT, "red ball", "all").args[2]


def of_one_noise(model: Any, images: Any) -> tuple[Any, dict]:
    return CollageNoise.execute(model, collage(), 4.0).args[0], sockets()["LATENT"]


def of_one_control(model: Any, images: Any) -> tuple[Any, dict]:
    return CollageControl.execute(model, collage(), 1.0).args[0], {"samples": torch.zeros(1, 4, SIZE, SIZE)}


def recording(model: Any, images: Any) -> tuple[Any, dict]:
    return FeatureRecorder.execute(model, {"samples": torch.zeros(1, 4, SIZE, SIZE)}, 256).args


class Ours(NamedTuple):
    """A node of ours with nothing to do. patch: (MODEL, two recorded images) -> (MODEL, LATENT). reference: what a
    sampler then gives, of the MODEL without the node: "plain", "first" of the images, "partly" denoised, or
    "controlled".
    """

    title: str
    patch: Callable[[Any, Any], tuple[Any, dict]]
    reference: str = "plain"


OURS = [
    Ours("Feature Recorder", recording),
    Ours("Token Attention Map", measured),
    Ours("Composite Attention Inject", base_only, "first"),
    Ours("Collaborative Attention", nothing_edited, "first"),
    Ours("Multi Source Swap", all_from_layout, "first"),
    Ours("Collage Noise", of_one_noise, "partly"),
    Ours("Collage Control", of_one_control, "controlled"),
]
TITLES = [*(ours.title for ours in OURS), "Collage Cross Attention", "Step Blend Sampler"]


# ---------------------------------------------------------------- outcomes


def outcome(act: Callable[[], Tensor], expected: Tensor | None = None) -> str:
    """What became of one wiring: SAME as expected, RUNS where nothing is expected, or "refused"; anything else as it is
    (and no table with that is right).
    """
    try:
        found = act()
    except NeedsMore:
        raise
    except Exception as error:
        title = str(error).partition(":")[0].split(" and ")[0]
        if isinstance(error, (ValueError, RuntimeError)) and title in TITLES:
            return "refused"
        return f"FAILED: {type(error).__name__}: {error}"
    if expected is None:
        return RUNS
    if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-3, equal_nan=True):
        return SAME
    return f"FAILED: differs by {(found - expected).abs().max() if found.shape == expected.shape else found.shape}"


def sampled_beside(ours: Ours, model: Any, latent: dict) -> Tensor:
    """What a sampler makes of a MODEL and LATENT that are a node's."""
    settings: dict[str, Any] = {"denoise": 0.8} if ours.reference == "partly" else {}
    if ours.title == "Token Attention Map":
        settings["positive"] = marked()
    if ours.reference == "controlled":
        settings["positive"] = controlled()[0]
    return sampled(model, latent, **settings)["samples"]


def of_models(core: CoreNode, after: bool) -> dict[str, str]:
    """A node that changes a MODEL, beside each of ours."""
    given = sockets()
    model = core("MODEL", given["MODEL"], given)
    references = {
        "plain": sampled(model)["samples"],
        "partly": sampled(model, given["LATENT"], denoise=0.8)["samples"],
        "controlled": sampled(model, positive=controlled()[0])["samples"],
    }
    found = {}
    try:
        images = (recorded(model),) * 2
        references["first"] = references["plain"]
    except ValueError:  # what cannot be recorded is composed of images without it
        images = (recorded(given["MODEL"]),) * 2
        references["first"] = images[0]["samples"]
    for ours in OURS:

        def act(ours: Ours = ours) -> Tensor:
            if not after:
                return sampled_beside(ours, *ours.patch(model, images))
            patched, latent = ours.patch(given["MODEL"], images)
            return sampled_beside(ours, core("MODEL", patched, given), latent)

        found[ours.title] = outcome(act, references[ours.reference])
    return found


def of_conditionings(core: CoreNode, after: bool) -> dict[str, str]:
    given = sockets()
    positive = core("CONDITIONING", given["CONDITIONING"], given)
    reference = sampled(given["MODEL"], positive=positive)["samples"]
    biased = functools.partial(
        CollageCrossAttn.execute, given["MODEL"], given["CLIP"], collage(), 1.0, "log log", 0.0, 1.0, "all"
    )
    if after:
        if not core.takes("CONDITIONING"):
            return {}
        patched, latent = measured(given["MODEL"], None)
        mapped = core("CONDITIONING", marked(), given)
        model, own = biased().args
        return {
            "Token Attention Map": outcome(lambda: sampled(patched, latent, mapped)["samples"], reference),
            "Collage Cross Attention": outcome(
                lambda: sampled(model, positive=core("CONDITIONING", own, given))["samples"]
            ),
        }

    def composed() -> Tensor:
        images = (recorded(given["MODEL"], positive=positive),) * 2
        return sampled(*base_only(given["MODEL"], images), positive)["samples"]

    def with_bias() -> Tensor:
        model, conditioning = biased(positive).args
        return sampled(model, positive=conditioning)["samples"]

    return {
        "Feature Recorder": outcome(lambda: recorded(given["MODEL"], positive=positive)["samples"], reference),
        "Composite Attention Inject": outcome(composed, reference),
        "Collage Cross Attention": outcome(with_bias),
    }


def of_latents(core: CoreNode, after: bool) -> dict[str, str]:
    given = sockets()
    latent = core("LATENT", given["LATENT"], given)
    if latent["samples"].numel() > 16 * given["LATENT"]["samples"].numel():  # of audio, or in pixels
        raise NeedsMore("a larger picture than this table's")
    reference = sampled(given["MODEL"], latent, denoise=0.5)["samples"]
    if after:
        if not core.takes("LATENT"):
            return {}
        images = (recorded(given["MODEL"]),) * 2

        def composed_of_changed() -> Tensor:
            changed = core("LATENT", images[0], given)
            return sampled(*base_only(given["MODEL"], (changed, images[1])))["samples"]

        return {"Composite Attention Inject": outcome(composed_of_changed)}

    def composed() -> Tensor:
        images = (recorded(given["MODEL"], latent, denoise=0.5),) * 2
        return sampled(*base_only(given["MODEL"], images), denoise=0.5)["samples"]

    first = reference[:1] if len(reference) == 1 else None
    return {
        "Feature Recorder": outcome(lambda: recorded(given["MODEL"], latent, denoise=0.5)["samples"], reference),
        "Composite Attention Inject": outcome(composed, first),
    }


def of_schedules(core: CoreNode, after: bool) -> dict[str, str]:
    given = sockets()
    if after:  # no node of ours gives SIGMAS
        return {}
    sigmas = core("SIGMAS", given["SIGMAS"], given)
    empty = {"samples": torch.zeros(1, 4, SIZE, SIZE)}

    def run(model: Any, latent: dict) -> dict:
        guider = guider_of(model, given["CONDITIONING"], given["negative"])
        return sample_custom(latent, guider, sigmas)[0]

    reference = run(given["MODEL"], empty)["samples"]

    def composed() -> Tensor:
        image = run(*recording(given["MODEL"], None))
        return run(*base_only(given["MODEL"], (image, image)))["samples"]

    return {
        "Feature Recorder": outcome(lambda: run(*recording(given["MODEL"], None))["samples"], reference),
        "Composite Attention Inject": outcome(composed, reference),
    }


def of_guiders(core: CoreNode, after: bool) -> dict[str, str]:
    given = sockets()
    empty = {"samples": torch.zeros(1, 4, SIZE, SIZE)}

    def run(guider: Any, latent: dict) -> dict:
        return sample_custom(latent, guider, given["SIGMAS"])[0]

    def guider(model: Any) -> Any:
        return core("GUIDER", given["GUIDER"], {**given, "MODEL": model})

    reference = run(guider(given["MODEL"]), empty)["samples"]
    if after:

        def blended() -> Tensor:
            one = guider(given["MODEL"])
            return run(StepBlendSampler.execute(one, guider(given["MODEL"]), 0.5, 0.0).args[0], empty)["samples"]

        return {"Step Blend Sampler": outcome(blended, reference)}

    def record() -> dict:
        model, latent = recording(given["MODEL"], None)
        return run(guider(model), latent)

    def composed() -> Tensor:
        model, latent = base_only(given["MODEL"], (record(), record()))
        return run(guider(model), latent)["samples"]

    return {
        "Feature Recorder": outcome(lambda: record()["samples"], reference),
        "Composite Attention Inject": outcome(composed, reference),
    }


def of_masks(core: CoreNode, after: bool) -> dict[str, str]:
    given = sockets()
    mask = core("MASK", given["MASK"], given)
    if after:  # what becomes of a MASK that one of ours gives is that node's affair
        return {}
    images = (recorded(given["MODEL"]),) * 2

    def composed() -> Tensor:
        masks = torch.cat([mask, mask])[:2]
        stack = {"latent0": images[0], "latent1": images[1]}
        made = CompositeAttentionInject.execute(
            given["MODEL"], stack, masks, 0, 0.0, 1.0, "all", "model", "composite"
        ).args
        return sampled(*made)["samples"]

    def swapped() -> Tensor:
        return sampled(*MultiSourceSwap.execute(given["MODEL"], *images, 0.0, 0.0, 1.0, "all", mask).args)["samples"]

    return {"Composite Attention Inject": outcome(composed), "Multi Source Swap": outcome(swapped)}


WIRINGS: dict[str, Callable[[CoreNode, bool], dict[str, str]]] = {
    "MODEL": of_models,
    "CONDITIONING": of_conditionings,
    "LATENT": of_latents,
    "SIGMAS": of_schedules,
    "GUIDER": of_guiders,
    "MASK": of_masks,
}


# ---------------------------------------------------------------- the table


class Row(NamedTuple):
    kind: str
    name: str
    found: str

    def __str__(self) -> str:
        return f"| {self.name} | {self.found} |"


def names() -> Iterator[tuple[str, str]]:
    """(type, name) of every core node that gives one of the types."""
    for kind in WIRINGS:
        yield from ((kind, name) for name, node in core_nodes().items() if CoreNode(name, node).gives(kind))


def rows(after: bool, every: int = 1) -> Iterator[Row]:
    """Core nodes that give one of the types, and what became of them before, or after, our nodes. every: one of so
    many is gone through.
    """
    turn = itertools.count()
    for kind, wiring in WIRINGS.items():
        first: dict[Any, str] = {}  # what a node does -> the first node that does it
        for name, node in core_nodes().items():
            core = CoreNode(name, node)
            if core.gives(kind):
                like = first.setdefault(core.function, name)
                if like != name:
                    yield Row(kind, name, f"as {like}")
                    continue
                if next(turn) % every:
                    continue
                row = Row(kind, name, SEPARATE.get(name) or in_words(core, wiring, after))
                logging.info("%s", row)
                yield row


def in_words(core: CoreNode, wiring: Callable[[CoreNode, bool], dict[str, str]], after: bool) -> str:
    try:
        found = wiring(core, after)
    except NeedsMore as error:
        return f"not connected: needs {error}"
    except Exception:  # the node without ours: it is made for another model, or wants other settings
        return ALONE
    by_outcome: dict[str, list[str]] = {}
    for title, what in found.items():
        by_outcome.setdefault(what, []).append(title)
    parts = [f"{what}: {', '.join(titles)}" if len(by_outcome) > 1 else what for what, titles in by_outcome.items()]
    return "; ".join(parts) or "nothing to connect"


HEADS = {False: "## Before our nodes", True: "## After our nodes"}
INTRODUCTION = """# Compatibility with ComfyUI's core nodes

Every core node that has one of these types as input or output, connected once before and once after the nodes of this
pack, on the demo model. `python workshop/bootstrap.py montage.workshop.core_nodes` makes these tables, and tests check
that they are still true.

- same: a Montage node at zero strength changes nothing (to 1e-3). runs: there was nothing to compare.
- refused: the Montage node raises an error that says what to change.
- fails without ours too: the core node does not work on this model, being made for another.
- not connected: it needs something that only another model or a file provides.

The pictures have 64x64 pixels. There FreeU_V2 divides by zero without our nodes too, since the middle block has one
token; at other sizes it goes with all of them. The areas of the conditioning nodes cover the whole picture; smaller
ones are refused where images are recorded or composed.
"""


def section(found: list[Row], after: bool) -> str:
    """One half of the document."""
    parts = [HEADS[after]]
    for kind in TYPES:
        lines = [str(row) for row in found if row.kind == kind]
        parts.append("\n".join([f"### {kind}\n", "| core node | outcome |", "|---|---|", *lines]))
    return "\n\n".join(parts)


def written(after: bool) -> str:
    """The same half as it stands in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    halves = re.split(rf"(?=^{re.escape(HEADS[True])}$)", text, flags=re.MULTILINE)
    half = halves[1] if after else halves[0][halves[0].index(HEADS[False]) :]
    return half.strip()


def main() -> None:
    with torch.inference_mode():
        halves = [section(list(rows(after)), after) for after in (False, True)]
    DOCUMENT.write_text("\n".join([INTRODUCTION, "\n\n".join(halves)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
