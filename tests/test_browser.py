"""The web half: its state under node, its editors in Chromium, and both renderers of a real ComfyUI page."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from montage.dev import Server
from montage.workshop.browser import run_node
from montage.workshop.live_server import serving


@pytest.mark.parametrize("state", ["strokes", "layers"])
def test_state(state):
    run_node(f"{state}.test.js", {})


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["editor", "layout"])
def test_editor_on_a_bare_page(browser, editor):
    run_node(f"{editor}.test.js", browser)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["classic", "modern"])
def test_comfy_page(page_server, browser, renderer):
    run_node("comfy.test.js", {**browser, "MONTAGE_COMFY": page_server.url, "MONTAGE_RENDERER": renderer})


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["classic", "modern"])
def test_languages(page_server, browser, renderer):
    run_node("language.test.js", {**browser, "MONTAGE_COMFY": page_server.url, "MONTAGE_RENDERER": renderer})


@pytest.fixture(scope="module")
def server_of_a_newcomer(browser: dict[str, str]) -> Iterator[Server]:
    """A ComfyUI with one checkpoint, which no template names: SD1.5 to ComfyUI, with random weights."""
    from montage.workshop.random_models import save_checkpoint

    with tempfile.TemporaryDirectory(prefix="montage-web-", ignore_cleanup_errors=True) as base:
        save_checkpoint(Path(base) / "models" / "checkpoints" / "my-model.safetensors", "sd15-narrow")
        with serving(Path(base)) as running:
            yield running


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["classic", "modern"])
def test_the_first_photomontage(server_of_a_newcomer, browser, renderer):
    comfy = {"MONTAGE_COMFY": server_of_a_newcomer.url, "MONTAGE_RENDERER": renderer}
    run_node("flagship.test.js", {**browser, **comfy})
