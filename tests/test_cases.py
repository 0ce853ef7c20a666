"""Prompts that once failed or gave a wrong picture, on one real server: each with the outcome that is right.

tests/cases/ holds them as API prompts for the demo model.
"""

import copy
import json
import re
from pathlib import Path

import pytest

from montage import dev
from montage.workshop.workflows import PHOTOMONTAGE, equal, picture, quick, workflow

CASES = Path(__file__).resolve().parent / "cases"
SKIPS = "Composite Attention Inject: EasyCache on this MODEL skips evaluations of the model, .* Disconnect EasyCache"
RUNS = None
OUTCOMES = {  # what the error says, or RUNS
    "02-perpneg-composed": RUNS,
    "03-easycache-composed-only": SKIPS,
    "03-easycache-recorded-and-composed": SKIPS.replace("Composite Attention Inject", "Feature Recorder"),
    "06-deepshrink-composed-only": "Composite Attention Inject: Deep Shrink resizes .* Disconnect Deep Shrink",
    "08-stack-of-9-samplers": RUNS,
    "21-list-of-latents": RUNS,
    "21-rebatched-before-the-recorder": r"Graph Cut Montage: .* of a list \(Rebatch Latents\) come one by one",
}

pytestmark = pytest.mark.slow


def case(name: str) -> dict:
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


def test_every_case_has_an_outcome():
    assert {path.stem for path in CASES.iterdir()} == OUTCOMES.keys()


@pytest.mark.parametrize("name", OUTCOMES)
def test_a_case_ends_as_it_should(server, name):
    if OUTCOMES[name] is RUNS:
        assert server.run(case(name), name)
        return
    with pytest.raises(dev.Failure) as caught:
        server.run(case(name), name)
    assert re.search(OUTCOMES[name], str(caught.value))


def test_perp_neg_over_base_tokens_is_the_base_image(server):
    """Its third conditioning passes through; what is left is the plain run under the same guidance."""
    prompt = case("02-perpneg-composed")
    for image in ("11", "21"):
        guided = f"{image}0"
        prompt[guided] = {**copy.deepcopy(prompt["41"])}
        prompt[guided]["inputs"]["model"] = prompt[image]["inputs"]["model"]
        prompt[image]["inputs"]["model"] = [guided, 0]
    prompt["30"]["inputs"]["strokes"] = ""  # everything is kept from the base
    prompt["45"] = {"class_type": "SaveImage", "inputs": {"images": ["12", 0], "filename_prefix": "base"}}
    outputs = server.run(prompt, "Perp-Neg over base tokens")
    assert equal(picture(server, outputs, "44"), picture(server, outputs, "45"))


@pytest.mark.parametrize(
    "node, title, inputs",
    [
        ("PerturbedAttentionGuidance", "Perturbed-Attention Guidance", {"scale": 3.0}),
        ("SelfAttentionGuidance", "Self-Attention Guidance", {"scale": 0.5, "blur_sigma": 2.0}),
    ],
)
def test_guidance_by_the_middle_block_is_refused_by_name(server, node, title, inputs):
    """A server loads these nodes by their path, under another module name than an import gives them."""
    prompt = quick(workflow("11 Subject swap (demo)"))
    windows = {"sagi_start": 0.0, "sagi_end": 0.5, "salq_start": 0.5, "salq_end": 1.0}
    sites = {"sagi_sites": "all", "salq_sites": "all"}
    custom = {f"preset.{name}": value for name, value in {**windows, **sites}.items()}
    prompt["40"]["inputs"].update(preset="custom", **custom)
    prompt["50"] = {"class_type": node, "inputs": {"model": ["40", 0], **inputs}}
    prompt["42"]["inputs"]["model"] = ["50", 0]
    with pytest.raises(
        dev.Failure, match=f"Collaborative Attention: {title} needs the middle block's .* Disconnect it"
    ):
        server.run(prompt, f"a swap beside {title}")


def test_a_prompt_that_is_valid_in_part_is_a_failure(server):
    """ComfyUI runs its valid outputs and reports success."""
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    seen = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    unseen = {"class_type": "PreviewImage", "inputs": {}}
    assert server.run({"1": image, "2": seen}, "a whole prompt")["2"]
    with pytest.raises(dev.Failure, match="refused a part of a prompt: .*Required input is missing"):
        server.run({"1": image, "2": seen, "3": unseen}, "a prompt")


def with_evaluations(server, prompt: dict, name: str) -> int:
    """How many images the model evaluates for a prompt."""
    before = server.call("/montage_test/evaluations")["count"]
    server.run(prompt, name)
    return server.call("/montage_test/evaluations")["count"] - before


def test_a_new_image_leaves_the_recordings_of_the_others(server):
    """With the default settings: no image of a stack of three is replayed, at first or when one of them is made
    again. Every sampler evaluates a conditional and an unconditional image each step.
    """
    steps, prompt = 3, quick(workflow(PHOTOMONTAGE), 3)
    prompt["2"]["inputs"]["text"] = "in the evening"  # not what another test of this server has cached
    recorders = [node for node in prompt.values() if node["class_type"] == "FeatureRecorder"]
    assert len(recorders) == 3
    assert with_evaluations(server, prompt, "three images and their composite") == 4 * 2 * steps
    for seed in range(1001, 1012):  # as often as it takes to meet a bound on runs
        prompt["23"]["inputs"]["seed"] = seed
        assert with_evaluations(server, prompt, f"another image, seed {seed}") == 2 * 2 * steps


def test_a_stack_of_32_samplers_with_a_recorder_each(server):
    prompt = case("08-stack-of-9-samplers")
    prompt["4"]["inputs"].update(width=64, height=64)
    for number in range(32):
        for kind in "rsv":
            node = prompt[f"{kind}{number}"] = copy.deepcopy(prompt[f"{kind}0"])
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] in ("r0", "s0"):
                    node["inputs"][name] = [f"{value[0][0]}{number}", value[1]]
        prompt[f"s{number}"]["inputs"].update(steps=1, seed=100 + number)
        prompt["30"]["inputs"].update(
            {f"latents.latent{number}": [f"s{number}", 0], f"images.image{number}": [f"v{number}", 0]}
        )
    assert server.run(prompt, "a stack of 32")
