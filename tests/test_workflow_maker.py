"""What `python dev.py workflow` makes of an API workflow, against the workflows that were laid out by hand."""

import itertools
import json

import pytest

from montage.workshop import workflow_maker
from montage.workshop.workflows import WORKFLOWS

pytestmark = pytest.mark.slow

NAMES = sorted(  # without those with a subgraph, which has no API form of its own
    path.name for path in WORKFLOWS.glob("*.json") if "definitions" not in json.loads(path.read_text(encoding="utf-8"))
)


@pytest.fixture(scope="module")
def infos(server):
    return server.call("/object_info")


def pair(name):
    """(the page's form, the API form)."""
    return tuple(json.loads((folder / name).read_text(encoding="utf-8")) for folder in (WORKFLOWS, WORKFLOWS / "api"))


def wiring(page):
    """{node id: (type, {input: (source, its output)}, values of its widgets without those that a link feeds)}."""
    sources = {link: (node, output) for link, node, output, *_ in page["links"]}
    found = {}
    for node in page["nodes"]:
        linked = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        fed = any(slot["link"] is not None and "widget" in slot for slot in node["inputs"])
        if node["type"] not in workflow_maker.NOTES:
            found[node["id"]] = node["type"], linked, None if fed else node.get("widgets_values") or []
    return found


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_workflow_that_was_made_on_the_page(infos, name):
    page, prompt = pair(name)
    made = workflow_maker.page_form(prompt, infos)
    assert wiring(made) == wiring(page)
    for link, source, output, target, slot, kind in made["links"]:
        nodes = {node["id"]: node for node in made["nodes"]}
        assert link in nodes[source]["outputs"][output]["links"] and nodes[target]["inputs"][slot]["link"] == link
        assert nodes[target]["inputs"][slot]["type"] == kind


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another(infos, name):
    nodes = workflow_maker.page_form(pair(name)[1], infos)["nodes"]
    for a, b in itertools.combinations(nodes, 2):
        apart = any(
            a["pos"][axis] + a["size"][axis] <= b["pos"][axis] or b["pos"][axis] + b["size"][axis] <= a["pos"][axis]
            for axis in (0, 1)
        )
        assert apart, f"{a['type']} {a['id']} and {b['type']} {b['id']}"


def test_what_lies_on_the_page_stays_there_and_a_new_node_goes_below(infos):
    page, prompt = pair(NAMES[0])
    number = max(map(int, prompt)) + 1000
    prompt[str(number)] = {
        "class_type": "PreviewImage",
        "inputs": {
            "images": next(node["inputs"]["images"] for node in prompt.values() if node["class_type"] == "SaveImage")
        },
    }
    made = workflow_maker.page_form(prompt, infos, page)
    before, after = ({node["id"]: node for node in one["nodes"]} for one in (page, made))
    assert after.keys() - before.keys() == {number} and made["groups"] == page["groups"]
    assert all(after[key]["pos"] == node["pos"] and after[key]["size"] == node["size"] for key, node in before.items())
    assert after[number]["pos"][1] > max(node["pos"][1] + node["size"][1] for node in before.values())


def test_an_input_that_the_node_lacks_is_refused(infos):
    prompt = {"1": {"class_type": "KSampler", "inputs": {"stepz": 4}}}
    with pytest.raises(ValueError, match=r"KSampler \(1\) has no input stepz"):
        workflow_maker.page_form(prompt, infos)


def test_words_that_a_language_lacks_are_added_in_english(infos, tmp_path, capsys):
    path = tmp_path / "locales" / "xx" / "nodeDefs.json"
    path.parent.mkdir(parents=True)
    shipped = json.loads((workflow_maker.LOCALES / "ja" / "nodeDefs.json").read_text(encoding="utf-8"))
    lacking = json.loads(json.dumps(shipped))
    del lacking["FeatureRecorder"], lacking["GraphCutMontage"]["inputs"]["lam"]["tooltip"]
    path.write_text(json.dumps(lacking), encoding="utf-8")
    workflow_maker.add_stubs(infos, tmp_path / "locales")
    named = capsys.readouterr().out.strip().partition("to translate: ")[2].split(", ")
    assert set(named) == {"FeatureRecorder", "GraphCutMontage.inputs.lam.tooltip"}
    words = json.loads(path.read_text(encoding="utf-8"))
    assert words["FeatureRecorder"]["display_name"] == "Feature Recorder"
    assert words["GraphCutMontage"]["inputs"]["lam"]["tooltip"].startswith("How strongly seams avoid")
    del words["FeatureRecorder"]
    words["GraphCutMontage"]["inputs"]["lam"]["tooltip"] = shipped["GraphCutMontage"]["inputs"]["lam"]["tooltip"]
    assert words == {name: node for name, node in shipped.items() if name != "FeatureRecorder"}
