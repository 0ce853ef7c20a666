"""Prompts that nobody would write, and many in a row, on a real server: it answers every one, in words, and nothing
stays behind.

python dev.py test tests/test_fuzz.py                                            a sample
MONTAGE_FUZZ=2000 MONTAGE_SOAK=200 python dev.py test tests/test_fuzz.py         all of it: less than an hour on two
cores
"""

import copy
import json
import os
import random
import statistics
import time
import urllib.error

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from montage import dev
from montage.workshop.live_server import serving
from montage.workshop.workflows import PHOTOMONTAGE, equal, picture, quick, workflow

PROMPTS, RUNS = int(os.environ.get("MONTAGE_FUZZ", 40)), int(os.environ.get("MONTAGE_SOAK", 12))
FLAT = 1.02  # of memory, over a long row of runs
LARGEST = {
    "width": 192,
    "height": 192,
    "batch_size": 3,
    "amount": 3,
    "steps": 4,
    "preview_every": 4,
}  # larger is slow, and no fault

pytestmark = pytest.mark.slow

NUMBERS = st.one_of(
    st.integers(-3, 9), st.floats(-3, 3), st.sampled_from([0, -1, 1e-9, 1e9, -1e9, 2**63, float("nan"), float("inf")])
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "all",
            "none",
            "d9",
            "u2-",
            "u@1-2",
            "-",
            "m",
            "0",
            "\n",
            "embedding:nothing",
            "(ball:1e9)",
            "../../etc/passwd",
            "#zzz",
            '{"v":1}',
            '{"v":9,"strokes":[]}',
            '{"v":1,"base":0,"strokes":[{"k":0,"r":-5,"p":[0]}]}',
            '{"v":1,"base":99,"strokes":[{"k":"a","r":1e30,"p":[1,2,3]}]}',
            "[[[[",
            "null",
        ]
    ),
)
ANYTHING = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none(), st.lists(st.integers(0, 60), max_size=3))


def prompts():
    """{name: a quick version of each workflow that needs the demo model alone}."""
    found = {name: quick(prompt, steps=2) for name, prompt in dev.demo_workflows()}
    for prompt in found.values():
        for node in prompt.values():
            if node["class_type"] == "LearnLayerToken":
                node["inputs"]["preview_every"] = 2
    return found


@st.composite
def mutated(draw, workflows):
    """A workflow with one to three inputs changed to something of their kind or not, wired elsewhere, or missing."""
    prompt = copy.deepcopy(workflows[draw(st.sampled_from(sorted(workflows)))])
    for _ in range(draw(st.integers(1, 3))):
        node = prompt[draw(st.sampled_from(sorted(prompt)))]["inputs"]
        if not node:
            continue
        key = draw(st.sampled_from(sorted(node)))
        if draw(st.integers(0, 9)) == 0:
            del node[key]
        elif isinstance(node[key], list):
            node[key] = [draw(st.sampled_from(sorted(prompt))), draw(st.integers(0, 3))]
        else:
            kind = {str: TEXTS, bool: st.booleans(), int: NUMBERS, float: NUMBERS}.get(type(node[key]), ANYTHING)
            value = draw(kind if draw(st.integers(0, 3)) else ANYTHING)
            node[key] = min(value, LARGEST[key]) if key in LARGEST and isinstance(value, (int, float)) else value
    return prompt


def answer(server, prompt, seconds=120):  # noqa: F811
    """What came of a prompt: None, or the error of the node that failed. Fails where the server does not say."""
    try:
        queued = server.call("/prompt", {"prompt": prompt})["prompt_id"]
    except urllib.error.HTTPError as refused:
        said = json.load(refused)
        assert refused.code == 400 and (said["node_errors"] or said["error"]["message"]), said
        return None
    messages = server.end(queued, seconds=seconds, pause=0.05)["status"]["messages"]
    return next((data for kind, data in messages if kind == "execution_error"), None)


def test_no_prompt_gets_less_than_a_clear_answer(server):  # noqa: F811
    ours = {
        node["display_name"]
        for node in server.call("/object_info").values()
        if node["python_module"] == "custom_nodes.montage"
    }
    reference = picture(server, server.run(quick(workflow(PHOTOMONTAGE)), "before"))

    @settings(
        max_examples=PROMPTS, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(mutated(prompts()))
    def one(prompt):
        error = answer(server, prompt)
        if error and any("custom_nodes/montage" in line.replace("\\", "/") for line in error["traceback"]):
            assert error["exception_message"].startswith(tuple(f"{name}:" for name in ours)), error[
                "exception_message"
            ] + "".join(error["traceback"])

    one()
    changed = quick(workflow(PHOTOMONTAGE))
    changed["44"]["inputs"]["seed"] = 1  # not from the server's cache
    assert equal(picture(server, server.run(changed, "after")), reference)
    assert "memory leak" not in server.log.read_text(
        errors="replace"
    )  # ComfyUI's words for a model that somebody holds


def test_every_number_that_is_none_is_refused_by_name(server):  # noqa: F811
    tried = set()
    for prompt in prompts().values():
        for node, content in prompt.items():
            info = server.call(f"/object_info/{content['class_type']}")[content["class_type"]]
            kinds = {**info["input"]["required"], **info["input"].get("optional", {})}
            for key in content["inputs"]:
                if (
                    info["python_module"] == "custom_nodes.montage"
                    and kinds.get(key, [None])[0] == "FLOAT"
                    and (content["class_type"], key) not in tried
                ):
                    tried.add((content["class_type"], key))
                    wrong = copy.deepcopy(prompt)
                    wrong[node]["inputs"][key] = float("nan")
                    assert f"{info['display_name']}: {key} is NaN" in answer(server, wrong)["exception_message"]
    assert len(tried) > 20


@pytest.fixture
def tidy(tmp_path):
    """A server with the cache that keeps only what the last prompt used.

    ComfyUI's usual one keeps the key of every node that a cancelled prompt did not reach, and a key tells all of the
    node's ancestors: its own nodes alone grow by half a megabyte a cancel, which would hide what is ours.
    """
    with serving(tmp_path, "--cache-classic") as running:
        yield running


def test_memory_stays_flat_over_many_runs_and_cancels(tidy):
    process, chance, taken = psutil.Process(tidy.process.pid), random.Random(0), []
    for number in range(RUNS):
        prompt = quick(workflow(PHOTOMONTAGE), steps=2)
        for node in ("13", "23", "33"):
            prompt[node]["inputs"]["seed"] = 100 * number + int(node)
        queued = tidy.call("/prompt", {"prompt": prompt})["prompt_id"]
        if chance.random() < 0.4:
            time.sleep(chance.random())
            tidy.call("/interrupt", {}, parse=False)
        tidy.end(queued, pause=0.05)
        taken.append(process.memory_info().rss)
    if RUNS >= 100:
        fifth = RUNS // 5
        first, last = statistics.median(taken[fifth : 2 * fifth]), statistics.median(taken[-fifth:])
        print(f"memory: {first / 2**20:.0f} MB after a fifth of {RUNS} runs, {last / 2**20:.0f} MB at the end")
        assert last < FLAT * first
    assert tidy.run(quick(workflow(PHOTOMONTAGE)), "after")
