"""Kills a ComfyUI and removes its folder once this process's standard input closes: `python guard.py PROCESS FOLDER`.

A worker that is killed cannot stop its ComfyUI any more, and one that nobody owns would hold its GPU for ever. The
worker holds the other end of this standard input, which the system closes for it, however it dies. Ray kills a dead
worker's children and its process group, so the guard must belong to neither: it is started in a session of its own.
"""

import contextlib
import os
import shutil
import signal
import sys


def detach() -> None:
    """Stop being the worker's child."""
    if hasattr(os, "fork") and os.fork():
        os._exit(0)


def kill_group(process: int) -> None:
    """Kill a process and what it started in its session. A stopped process cannot act on a kinder signal."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            os.kill(process, signal.SIGTERM)  # which ends it at once there
        else:
            os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    detach()
    sys.stdin.buffer.read()
    kill_group(int(sys.argv[1]))
    shutil.rmtree(sys.argv[2], ignore_errors=True)
