"""A server of the very ComfyUI that is in this process."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import dev


def frontend_options() -> list[str]:
    """Options for the page in the folder MONTAGE_FRONTEND_ROOT, none where it is not set: the page that ComfyUI pins.

    Any other version comes without touching the environment by
    `pip install --no-deps --target FOLDER comfyui-frontend-package`, and its page lies in
    FOLDER/comfyui_frontend_package/static. Raises dev.Failure where the folder holds no page.
    """
    root = os.environ.get("MONTAGE_FRONTEND_ROOT")
    if not root:
        return []
    if not (Path(root) / "index.html").is_file():
        raise dev.Failure(
            f"MONTAGE_FRONTEND_ROOT is {root}, but there is no index.html in it: set it to the folder static of an "
            "unpacked comfyui-frontend-package, or unset it."
        )
    return ["--front-end-root", root]


@contextlib.contextmanager
def serving(base: Path, *options: str) -> Iterator[dev.Server]:
    """A running server whose models, custom nodes and pictures lie in the folder `base`, which it knows by that
    name.
    """
    env = dev.Environment(sys.executable, os.environ["COMFYUI_PATH"], ours=False)
    with dev.running_server(env, base, "--cpu", "--disable-api-nodes", *frontend_options(), *options) as running:
        yield running
