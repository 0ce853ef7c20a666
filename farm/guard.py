"""Runs a command until it ends or this process's standard input closes: `python guard.py FOLDER COMMAND...`.

A worker that is killed cannot stop its ComfyUI any more, and a ComfyUI that nobody owns would hold its GPU for ever.
The worker holds the other end of this process's standard input, which the system closes for it, however it dies.
FOLDER, the command's own, is removed then.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading


def main(folder: str, command: list[str]) -> None:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    closing = threading.Event()

    def follow() -> None:
        code = child.wait()
        if not closing.is_set():
            os._exit(code if code >= 0 else 128 - code)  # as a shell reports a signal

    threading.Thread(target=follow, daemon=True).start()
    sys.stdin.buffer.read()
    closing.set()
    if sys.platform == "win32":
        child.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # a stopped process cannot act on a kinder signal
    child.wait()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
