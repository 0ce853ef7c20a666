"""The web half: its state under node, its editors in Chromium, and both renderers of a real ComfyUI page."""

import pytest

from montage.workshop.browser import run_node


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
