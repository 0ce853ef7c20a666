"""What is published: the archive, its metadata, and the words for every node in every language."""

import json
import os
import re
import subprocess
import sys

import pytest

from montage.workshop.package_contents import ROOT, archive, git, schemas, shipped_modules

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LANGUAGES = ["zh", "ja"]


def test_the_archive_has_what_the_nodes_need():
    files = archive()
    assert {path.relative_to(ROOT).as_posix() for path in shipped_modules()} <= files
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"} <= files
    for folder in ("web", "locales", "subgraphs", "example_workflows"):
        assert set(git("ls-files", folder)) <= files, folder
    assert {name for name in git("ls-files") if name.rpartition("/")[2] in files_named()} <= files


def files_named():
    """The files beside them that the pack's modules name."""
    return {
        name
        for path in shipped_modules()
        for name in re.findall(r'"([\w.-]+\.(?:safetensors|png|jpg|txt))"', path.read_text(encoding="utf-8"))
    }


def test_the_archive_has_nothing_else():
    known = {path.relative_to(ROOT).as_posix() for path in shipped_modules()}
    for name in archive():
        if name.endswith(".py"):
            assert name in known or name.partition("/")[0] in (
                "nodes",
                "patching",
                "kernels",
                "localize",
            ), f"{name} is shipped and never loaded"
        else:
            assert (
                name.partition("/")[0] in ("web", "locales", "subgraphs", "example_workflows", "demo")
                or "/" not in name
            ), name
    assert {name.rpartition("/")[2] for name in archive() if name.startswith("demo/weights/")} <= files_named()


def test_the_pack_loads_from_its_archive_alone(tmp_path):
    """In a process of its own, as ComfyUI loads it."""
    for name in archive():
        target = tmp_path / "montage" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / name)
    code = """if True:
        import sys, asyncio, importlib.util
        sys.path.insert(0, sys.argv[1])
        import comfy.options; comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args; args.cpu = True
        import nodes
        folder = sys.argv[2]
        spec = importlib.util.spec_from_file_location(
            "montage", folder + "/__init__.py", submodule_search_locations=[folder]
        )
        module = sys.modules["montage"] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        extension = asyncio.run(module.comfy_entrypoint())
        found = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
        assert found["MontageDemoModel"].execute().args[0].model
        print(len(found))"""
    out = subprocess.run(
        [sys.executable, "-c", code, os.environ["COMFYUI_PATH"], str(tmp_path / "montage")],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0 and int(out.stdout.split()[-1]) == len(schemas()), out.stderr[-2000:]


def test_version_changelog_and_requirements_agree():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[1]
    assert PROJECT["project"]["version"] == newest
    assert (
        PROJECT["project"]["dependencies"] == [] and not (ROOT / "requirements.txt").exists()
    )  # so nothing in ComfyUI's environment changes
    assert PROJECT["tool"]["comfy"]["requires-comfyui"] == ">=0.30.0"


def test_ci_runs_the_suite_on_every_python():
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    assert re.search(r'python: \["3.10", "3.11", "3.12", "3.13"\]', workflow) and "python dev.py test" in workflow
    lowest = PROJECT["project"]["requires-python"]
    assert lowest == ">=3.10"


# ---------------------------------------------------------------- words


def test_every_input_and_output_has_a_tooltip_and_every_node_a_help_page():
    for schema in schemas():
        assert schema.description and schema.category.startswith("montage"), schema.node_id
        for one in (*schema.inputs, *schema.outputs):
            assert one.tooltip, f"{schema.node_id}.{one.id}"
        page = ROOT / "web" / "docs" / f"{schema.node_id}.md"
        assert page.is_file(), f"{schema.node_id} has no help page"
        pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert pictures, f"{page.name} shows no picture"
        for picture in pictures:
            assert (page.parent / picture).is_file(), f"{page.name} shows {picture}, which is not there"


def test_every_workflow_has_a_thumbnail_and_a_twin():
    folder = ROOT / "example_workflows"
    flows = {path.stem for path in folder.glob("*.json")}
    assert len(flows) >= 10 and flows == {path.stem for path in folder.glob("*.jpg")} == {
        path.stem for path in (folder / "api").glob("*.json")
    }


def test_every_help_page_belongs_to_a_node():
    nodes = {
        name
        for path in (ROOT / "nodes").glob("*.py")
        for name in re.findall(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} <= nodes


def options_of(one):
    return [str(option) for option in getattr(one, "options", None) or [] if isinstance(option, str)]


def wanted(schema):
    """The parts of a node that a translation must have."""
    yield ("display_name",)
    yield ("description",)
    for one in schema.inputs:
        yield from (("inputs", one.id, "name"), ("inputs", one.id, "tooltip"))
    for number, _ in enumerate(schema.outputs):
        yield from (("outputs", str(number), "name"), ("outputs", str(number), "tooltip"))


def parts(tree, path=()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from parts(value, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_complete(language):
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert {schema.node_id for schema in schemas()} <= nodes.keys()
    for schema in schemas():
        have = {path for path in parts(nodes[schema.node_id]) if "options" not in path}
        assert have == set(wanted(schema)), schema.node_id
        for one in schema.inputs:
            translated = nodes[schema.node_id]["inputs"][one.id].get("options", {})
            assert set(translated) <= set(options_of(one)), f"{schema.node_id}.{one.id}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_in_their_language(language):
    """A name or a sentence without a character of the script was forgotten. Types and symbols stay as they are."""
    script = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}[language]
    nodes = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node, words in nodes.items():
        sentences = [
            words["description"],
            words["display_name"],
            *(one["tooltip"] for group in ("inputs", "outputs") for one in words.get(group, {}).values()),
        ]
        for sentence in sentences:
            assert re.search(script, sentence), f"{node}: {sentence}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_translated(language):
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    used = {word for schema in schemas() for word in schema.category.split("/")}
    assert used <= set(main["nodeCategories"])
