"""The web half: its state under node, its editors in Chromium, and both renderers of a real ComfyUI page."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from live_server import dev, serving

ROOT = Path(__file__).resolve().parent.parent
WEB_TESTS = ROOT / "tests" / "web"
WEIGHTS = ROOT / "demo" / "weights" / "demo-model.safetensors"
PLAYWRIGHT = "1.65.0"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def unavailable(reason):
    """In CI the web half must be tested; elsewhere one line says that it was not."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


def tool(name):
    return shutil.which(name) or unavailable(f"the web tests need {name}, which is not installed")


def install(command, what, **variables):
    result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if result.returncode:
        unavailable(f"the browser tests need {what}, and installing it failed: {result.stderr.strip()[-300:]}")


def chromium():
    """The browser's path; on Debian it is installed when this process may."""
    named = os.environ.get("MONTAGE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found:
        return found
    if not (Path("/etc/debian_version").exists() and os.geteuid() == 0):
        unavailable("the browser tests need Chromium: install it, or set MONTAGE_CHROMIUM to its path")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install(["apt-get", "update"], "Debian's package lists", **quiet)
    install(
        ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"], "Chromium", **quiet
    )
    return tool("chromium")


def playwright():
    """playwright-core's module, in the user's cache: it drives a browser and brings none along."""
    folder = dev.cache_dir() / f"playwright-core-{PLAYWRIGHT}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as whole:  # renamed when complete: never half of it
            install(
                [tool("npm"), "install", "--no-audit", "--no-fund", "--prefix", whole, f"playwright-core@{PLAYWRIGHT}"],
                "playwright-core",
            )
            os.rename(Path(whole) / "node_modules" / "playwright-core", folder)
    return folder / "index.mjs"


@pytest.fixture(scope="module")
def browser():
    tool("node")
    return {"MONTAGE_PLAYWRIGHT": str(playwright()), "MONTAGE_CHROMIUM": chromium()}


@pytest.fixture(scope="module")
def server(browser):
    if not WEIGHTS.exists():
        unavailable(f"the tests on ComfyUI's page need {WEIGHTS.relative_to(ROOT)}")
    with tempfile.TemporaryDirectory(prefix="montage-web-", ignore_cleanup_errors=True) as base:
        with serving(Path(base)) as server:
            yield server


def run_node(name, variables):
    result = subprocess.run(
        [tool("node"), "--test", "--test-reporter=spec", str(WEB_TESTS / name)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]


@pytest.mark.parametrize("state", ["strokes", "layers"])
def test_state(state):
    run_node(f"{state}.test.js", {})


@pytest.mark.slow
@pytest.mark.parametrize("editor", ["editor", "layout"])
def test_editor_on_a_bare_page(browser, editor):
    run_node(f"{editor}.test.js", browser)


@pytest.mark.slow
@pytest.mark.parametrize("renderer", ["classic", "modern"])
def test_comfy_page(server, browser, renderer):
    run_node("comfy.test.js", {**browser, "MONTAGE_COMFY": server.url, "MONTAGE_RENDERER": renderer})
