"""Puts a real ComfyUI, and this pack under the name `montage`, into a Python process.

    python workshop/bootstrap.py montage.evidence.report --quick

runs a module of the pack with both in place, as `dev.py evidence` and `dev.py benchmark` do; tests/conftest.py calls
start(). The Python is ComfyUI's, and COMFYUI_PATH says where ComfyUI lies.
"""

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start() -> None:
    """Make ComfyUI importable, on the CPU where there is no GPU, and import the pack as `montage`."""
    # The pack's own folders must not be importable by themselves: its nodes/ would hide ComfyUI's nodes.py.
    ours = (ROOT, ROOT / "workshop", ROOT / "tests")
    sys.path[:] = [os.environ["COMFYUI_PATH"], *(p for p in sys.path if p and Path(p).resolve() not in ours)]

    import comfy.options

    comfy.options.enable_args_parsing(False)
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    spec = importlib.util.spec_from_file_location(
        "montage", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    sys.modules["montage"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["montage"])


if __name__ == "__main__":
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("COMFYUI_PATH is not set: run this through dev.py.")
    del sys.argv[0]
    start()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
