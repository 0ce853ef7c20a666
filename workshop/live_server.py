"""A server of the very ComfyUI that is in this process."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import dev


@contextlib.contextmanager
def serving(base: Path, *options: str) -> Iterator[dev.Server]:
    """A running server whose models, custom nodes and pictures lie in the folder `base`, which it knows by that
    name.
    """
    env = dev.Environment(sys.executable, os.environ["COMFYUI_PATH"], ours=False)
    with dev.running_server(env, base, "--cpu", "--disable-api-nodes", *options) as running:
        yield running
