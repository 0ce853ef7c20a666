"""Puts a real ComfyUI under the tests, in this process, and the pack under the name `montage`."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMFY = os.environ.get("COMFYUI_PATH")
if not COMFY:
    raise pytest.UsageError("COMFYUI_PATH is not set: run  python dev.py test")

# The pack's root must not be importable itself: its nodes/ would hide ComfyUI's nodes.py.
sys.path[:] = [COMFY, str(ROOT / "tests")] + [
    p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / "tests")
]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing(False)

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.cpu = not torch.cuda.is_available()

spec = importlib.util.spec_from_file_location("montage", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
sys.modules["montage"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["montage"])


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs every node under inference mode."""
    with torch.inference_mode():
        yield
