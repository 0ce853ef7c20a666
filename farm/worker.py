"""The Ray actor that owns a GPU (or some CPU cores) and one ComfyUI on it."""

import os
import time
from dataclasses import dataclass
from typing import Any

import ray

from .errors import PromptFailed, ServerLost
from .jobs import Prompt
from .server import Server
from .settings import Settings


@dataclass
class Outcome:
    """How a job ended on a worker: status "done", "failed" (it would anywhere) or "lost" (try elsewhere)."""

    status: str
    seconds: float
    files: dict[str, bytes]
    error: str = ""


class Worker:
    """Runs one prompt at a time. Errors are returned, not raised: an exception of Ray's means that the process died."""

    def __init__(self, settings: Settings) -> None:
        self.server = Server(settings)

    async def start(self) -> tuple[str, str]:
        """Start the server, or restart it: where it is, and the reason if it does not answer."""
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        where = f"{ray.util.get_node_ip_address()}{f' GPU {gpus}' if gpus else ''} (process {os.getpid()})"
        try:
            await self.server.start()
        except ServerLost as error:
            await self.server.stop()
            return where, str(error)
        return where, ""

    async def run(self, prompt: Prompt, uploads: dict[str, Any]) -> Outcome:
        """Run a prompt. uploads: {name in the input folder: reference to its content}."""
        began = time.monotonic()
        try:
            for name, content in uploads.items():
                if not (self.server.input / name).exists():
                    self.server.put(name, await content)
            files = await self.server.run(prompt)
        except PromptFailed as error:
            return Outcome("failed", time.monotonic() - began, {}, str(error))
        except ServerLost as error:
            await self.server.stop()
            return Outcome("lost", time.monotonic() - began, {}, str(error))
        return Outcome("done", time.monotonic() - began, files)

    async def beat(self) -> str:
        """What the server does at the moment. An answer at all tells that this process is not stuck."""
        return self.server.doing

    async def close(self) -> None:
        """Stop the server and remove its folders."""
        await self.server.stop()
