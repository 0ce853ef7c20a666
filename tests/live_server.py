"""dev.py, which lies outside of every package, as a module; and a server of this very ComfyUI."""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("montage_dev", Path(__file__).resolve().parent.parent / "dev.py")
dev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dev)


@contextlib.contextmanager
def serving(base, *options):
    """A running server whose models, custom nodes and pictures lie in the folder `base`, which it knows by that
    name.
    """
    env = dev.Environment(sys.executable, os.environ["COMFYUI_PATH"], ours=False)
    with dev.running_server(env, base, "--cpu", "--disable-api-nodes", *options) as running:
        running.base = base
        yield running
