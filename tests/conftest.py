"""Puts a real ComfyUI under the tests, in this process, and the pack under the name `montage`."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from montage.dev import Server

ROOT = Path(__file__).resolve().parent.parent


def start() -> None:
    """workshop/bootstrap.py, which nothing can import before it has run."""
    if not os.environ.get("COMFYUI_PATH"):
        raise pytest.UsageError("COMFYUI_PATH is not set: run  python dev.py test")
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "workshop" / "bootstrap.py")
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.start()


start()


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """ComfyUI runs every node under inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """A ComfyUI with this pack and the tests' own (testing_pack)."""
    from montage.workshop.live_server import serving

    base = tmp_path_factory.mktemp("comfy")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "testing_pack").symlink_to(ROOT / "tests" / "testing_pack")
    with serving(base) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> dict[str, str]:
    """The environment variables that name a browser to the tests in JavaScript."""
    from montage.workshop import browser

    browser.tool("node")
    return {"MONTAGE_PLAYWRIGHT": str(browser.playwright()), "MONTAGE_CHROMIUM": browser.chromium()}


@pytest.fixture(scope="module")
def page_server(browser: dict[str, str]) -> "Iterator[Server]":
    """A ComfyUI for a browser to open."""
    from montage.workshop.live_server import serving

    with (
        tempfile.TemporaryDirectory(prefix="montage-web-", ignore_cleanup_errors=True) as base,
        serving(Path(base)) as running,
    ):
        yield running
