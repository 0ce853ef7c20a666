"""What is published: the archive, its metadata, and the words for every node in every language."""

import json
import os
import re
import subprocess
import sys

import pytest

from montage.workshop import help_pages, release
from montage.workshop.package_contents import ROOT, archive, git, schemas, shipped_modules

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
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
                "methods",
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
    newest = re.search(r"^## (\S+)", CHANGELOG, re.M)[1]
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
    assert "python dev.py lint" in workflow


# ---------------------------------------------------------------- a release

TAG = f"v{PROJECT['project']['version']}"
ADDRESS = "https://example.org/someone/montage"


def with_address():
    return tomllib.loads(release.with_address((ROOT / "pyproject.toml").read_text(encoding="utf-8"), ADDRESS))


def dated():
    return re.sub(r"^(## \S+) - \S+$", r"\1 - 2030-01-02", CHANGELOG, count=1, flags=re.M)


def test_nothing_is_missing_but_what_the_page_says_must_be_filled_in():
    """The repository's address, which is not known yet, and the day of the release."""
    assert release.missing(TAG, with_address(), dated()) == []
    page = (ROOT / "docs" / "releasing.md").read_text(encoding="utf-8")
    assert "workshop/release.py --address" in page and "YYYY-MM-DD" in page
    assert set(release.missing(TAG, PROJECT, CHANGELOG)) <= {
        "pyproject.toml has no address: run  python workshop/release.py --address https://...",
        f'CHANGELOG.md has no date for {TAG[1:]}: write "## {TAG[1:]} - YYYY-MM-DD".',
    }


def test_a_release_that_contradicts_itself_is_refused():
    project = with_address()
    assert "The tag is v9.9.9" in release.missing("v9.9.9", project, dated())[0]
    assert "CHANGELOG.md begins with 9.9.9" in release.missing(TAG, project, f"## 9.9.9 - 2030-01-02\n{dated()}")[0]
    project["tool"]["comfy"]["Icon"] = "https://example.org/another.png"
    assert "Icon in pyproject.toml is not" in release.missing(TAG, project, dated())[0]


@pytest.mark.parametrize("address", ["example.org/montage", "https://example.org/montage/", 'https://a"b', ""])
def test_what_is_no_address_is_not_written(address):
    with pytest.raises(ValueError, match="is not an address"):
        release.with_address("", address)


def test_publishing_asks_first_and_the_icon_is_square():
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert (
        workflow.index("needs: suite") < workflow.index("workshop/release.py") < workflow.index("publish-node-action")
    )
    icon = (ROOT / release.ICON).read_text(encoding="utf-8")
    width, height = (int(re.search(rf'{side}="(\d+)"', icon)[1]) for side in ("width", "height"))
    assert width == height <= 400  # the registry's limit


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


@pytest.mark.parametrize(
    "typed",
    [
        "inpaint",
        "mask from text",
        "style transfer",
        "sam",
        "seam",
        "regional prompt",
        "character swap",
        "face swap",
        "dreambooth",
        "flux",
        "qwen",
        "z-image",
    ],
)
def test_node_search_finds_what_people_type(typed):
    found = [schema for schema in schemas() if any(typed in alias.lower() for alias in schema.search_aliases or ())]
    assert found


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


def test_the_help_pages_of_every_language_are_of_its_words():
    assert {path.stem for path in help_pages.pages()} == set(LANGUAGES)
    for path, text in help_pages.pages().items():
        assert path.is_file() and path.read_text(encoding="utf-8") == text, "python workshop/help_pages.py"


def test_step_blend_tells_of_momentum_in_every_language():
    pages = [path for path in help_pages.pages() if path.parent.name == "StepBlendSampler"]
    assert len(pages) == len(LANGUAGES)
    for path in (ROOT / "web" / "docs" / "StepBlendSampler.md", *pages):
        assert "APG" in path.read_text(encoding="utf-8"), path


def test_notes_of_help_pages_are_of_nodes_and_in_every_language():
    notes = [help_pages.in_language(language, "help") for language in LANGUAGES]
    nodes = {schema.node_id for schema in schemas()}
    assert all(one.keys() == notes[0].keys() <= nodes and all(one.values()) for one in notes)


def test_help_pages_name_every_input_and_output():
    """By the id or by the name that the node shows."""
    missing = []
    for schema in schemas():
        page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
        for one in (*schema.inputs, *schema.outputs):
            names = filter(None, (one.id, one.display_name))
            if not any(re.search(rf"\b{re.escape(name)}\b", page, re.IGNORECASE) for name in names):
                missing.append(f"{schema.node_id}.md: {one.id}")
    assert not missing, missing


def texts_of_editors():
    """What the web half says through t(), in English."""
    for path in sorted((ROOT / "web").glob("*.js")):
        for text in re.findall(r'\bt\(\s*("(?:[^"\\]|\\.)*")', path.read_text(encoding="utf-8")):
            yield json.loads(text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_editors_words_are_translated(language):
    translated = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))["montage"]
    texts = set(texts_of_editors())
    assert len(texts) > 60
    assert set(translated) == texts
    for text, translation in translated.items():
        assert translation and set(re.findall(r"{\w+}", translation)) == set(re.findall(r"{\w+}", text)), text


def test_every_text_of_the_editors_goes_through_their_translation():
    """A sentence or a button's word as a plain string would stay English."""
    shown = re.compile(
        r'(?:textContent|title|ariaLabel|notice)\b\s*[:=]\s*[^;\n]*?(?<!t\()"[A-Za-z][^"]* [^"]*"|button\(\s*"'
    )
    for path in sorted((ROOT / "web").glob("*.js")):
        assert not shown.findall(path.read_text(encoding="utf-8")), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_are_translated(language):
    main = json.loads((ROOT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    used = {word for schema in schemas() for word in schema.category.split("/")}
    assert used <= set(main["nodeCategories"])
