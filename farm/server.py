"""One ComfyUI, started and kept by a worker, and its API."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import aiohttp

from . import guard
from .cluster import ROOT
from .errors import PromptFailed, ServerLost
from .jobs import Prompt
from .settings import Settings

KEEP_BYTES = 4 << 30  # of saved files, for prompts whose save nodes ComfyUI takes from its cache
SIGNS = {"progress", "progress_state", "executing", "executed", "execution_start", "execution_cached"}
OVER = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
COUNTED = re.compile(r"(.+_)\d{5,}(_?\.[\w.]+)")  # NAME_00012_.png


class Server:
    """A ComfyUI that listens on this machine only, with this pack and with folders of its own for what it writes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.process: subprocess.Popen | None = None
        self.guard: subprocess.Popen | None = None
        self._session: aiohttp.ClientSession | None = None
        self.base = self.input = self.log = Path()  # start makes new ones
        self.url, self.doing = "", ""

    @property
    def session(self) -> aiohttp.ClientSession:
        """Of a started server. Raises ServerLost for one that is not."""
        if not self._session:
            raise ServerLost("ComfyUI is not running")
        return self._session

    # ------------------------------------------------------------ the process

    async def start(self) -> None:
        """Start ComfyUI anew and wait until it answers. Raises ServerLost if it does not."""
        await self.stop()
        self.base = Path(tempfile.mkdtemp(prefix="montage-farm-"))
        self.input, self.log = Path(self.settings.input_directory or self.base / "input"), self.base / "server.log"
        port = _free_port()
        command, variables = self._command(port)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        watch = [sys.executable, guard.__file__, str(self.process.pid), str(self.base)]
        self.guard = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        self.url, self.doing = f"http://127.0.0.1:{port}", "starting"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.settings.timeout))
        deadline = time.monotonic() + self.settings.start_timeout
        while not await self.answers(5):
            if self.process.poll() is not None:
                raise ServerLost(self._story(f"ComfyUI ended while starting (exit {self.process.returncode})"))
            if time.monotonic() > deadline:
                raise ServerLost(self._story(f"ComfyUI did not answer within {self.settings.start_timeout:.0f} s"))
            await asyncio.sleep(0.5)
        self.doing = ""

    async def stop(self) -> None:
        """Kill ComfyUI, hung or not, and remove its folders."""
        if self._session:
            await self._session.close()
        if self.process and self.guard:
            guard.kill_group(self.process.pid)
            await asyncio.to_thread(self.process.wait)
            await asyncio.to_thread(self.guard.communicate)  # closes its standard input
            shutil.rmtree(self.base, ignore_errors=True)
        self._session = self.process = self.guard = None

    async def answers(self, seconds: float) -> bool:
        """Whether the server answers within that time."""
        limit = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self.session.get(f"{self.url}/system_stats", timeout=limit) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    def _command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line of ComfyUI and its environment variables."""
        import dev  # the checkout's own; a worker's current folder is the checkout

        comfy = Path(self.settings.comfy) if self.settings.comfy else dev.existing_comfy()
        if comfy is None or not (comfy / "main.py").is_file():
            raise ServerLost(
                f"There is no ComfyUI at {comfy} on {socket.gethostname()}: give --comfyui, or set COMFYUI_PATH there"
                " before Ray is started"
            )
        python = self.settings.python or str(dev.python_of(comfy))
        for name in ("output", "temp", "user", "input"):
            (self.base / name).mkdir(exist_ok=True)
        command = [python, str(comfy / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
        command += ["--output-directory", str(self.base / "output"), "--temp-directory", str(self.base / "temp")]
        command += ["--user-directory", str(self.base / "user"), "--input-directory", str(self.input)]
        command += ["--database-url", "sqlite:///:memory:"]
        if not _has_pack(comfy):
            dev.link_pack(self.base)
            paths = self.base / "paths.yaml"
            paths.write_text(json.dumps({"farm": {"custom_nodes": str(self.base / "custom_nodes")}}), encoding="utf-8")
            command += ["--extra-model-paths-config", str(paths)]
        variables = dev.child_variables(dev.Environment(python, comfy, ours=False))
        variables.pop("PYTHONPATH", None)  # Ray's: this pack's nodes/ must not stand for ComfyUI's nodes.py
        if self.settings.cpus:
            command.append("--cpu")
            variables["OMP_NUM_THREADS"] = str(self.settings.cpus)
        return [*command, *self.settings.arguments], variables

    def _story(self, what: str) -> str:
        """`what`, and the end of the server's log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return f"{what} on {socket.gethostname()}; its log ends: {' | '.join(lines[-5:])[-800:]}"

    # ------------------------------------------------------------ a prompt

    async def run(self, prompt: Prompt) -> dict[str, bytes]:
        """Run a prompt: {name: content} of the files that it saved. Raises PromptFailed or ServerLost."""
        try:
            history = await self._history(prompt)
            files = self._saved(history["outputs"])
            if not all(path.is_file() for _, path in files):  # named by a cached save node, and pruned since
                await self._post("/free", {"free_memory": True})
                await asyncio.sleep(1)  # ComfyUI empties its caches between two prompts
                files = self._saved((await self._history(prompt))["outputs"])
            contents = {name: path.read_bytes() for name, path in files}
        except asyncio.TimeoutError:
            raise ServerLost(self._story(f"No progress for {self.settings.timeout:.0f} s ({self.doing})")) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ServerLost(self._story(f"ComfyUI does not answer ({error})")) from error
        self._prune({path for _, path in files})
        return contents

    async def _history(self, prompt: Prompt) -> dict[str, Any]:
        """Queue a prompt and wait for its end."""
        client = uuid.uuid4().hex
        async with self.session.ws_connect(f"{self.url}/ws", params={"clientId": client}, max_msg_size=0) as messages:
            answer = await self._post("/prompt", {"prompt": prompt, "client_id": client})
            queued = answer["prompt_id"]
            if answer["node_errors"]:  # ComfyUI runs the outputs that are valid, and would call that a success
                await self._post("/interrupt", {"prompt_id": queued})
            await self._end(messages, queued, prompt)
        if answer["node_errors"]:
            raise PromptFailed(_reasons(answer["node_errors"]))
        async with self.session.get(f"{self.url}/history/{queued}") as answer:
            history = (await answer.json()).get(queued)
        if not history:
            raise ServerLost("ComfyUI has no record of the prompt")
        if history["status"]["status_str"] != "success":
            raise _error(history["status"]["messages"])
        return history

    async def _end(self, messages: Any, queued: str, prompt: Prompt) -> None:
        """Follow the server's messages until the prompt has ended, whichever way. TimeoutError without progress."""
        deadline = time.monotonic() + self.settings.timeout
        while True:
            message = await messages.receive(timeout=max(0.01, deadline - time.monotonic()))
            if message.type in OVER:
                raise ServerLost(self._story("ComfyUI died"))
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if kind == "executing" and data.get("node") is None and data.get("prompt_id") == queued:
                self.doing = ""
                return
            if kind in SIGNS:  # others come from a server whose execution hangs, too
                deadline = time.monotonic() + self.settings.timeout
                self.doing = _doing(kind, data, prompt) or self.doing

    async def _post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(self.url + path, json=payload) as answer:
            text = await answer.text()
            if answer.status == 400:
                raise PromptFailed(_refusal(text))
            if answer.status >= 300:
                raise ServerLost(f"ComfyUI answered {answer.status} to {path}: {text[:300]}")
            return json.loads(text) if text else {}

    def _saved(self, outputs: dict[str, Any]) -> list[tuple[str, Path]]:
        """(name, path) of every file that a prompt saved. ComfyUI's counters are begun at 1 for each prompt: on a
        server they depend on what it ran before.
        """
        found, counts = [], {}
        for node in sorted(outputs, key=lambda key: (len(key), key)):
            entries = [entry for values in outputs[node].values() if isinstance(values, list) for entry in values]
            for entry in entries:
                if not isinstance(entry, dict) or entry.get("type") != "output" or "filename" not in entry:
                    continue
                name = f"{entry.get('subfolder') or '.'}/{entry['filename']}".removeprefix("./").replace("\\", "/")
                path = self.base / "output" / name
                if counted := COUNTED.fullmatch(name):
                    number = counts[counted.groups()] = counts.get(counted.groups(), 0) + 1
                    name = f"{counted[1]}{number:05d}{counted[2]}"
                found.append((name, path))
        return found

    def _prune(self, last: set[Path]) -> None:
        """Delete the oldest saved files above KEEP_BYTES, the last prompt's excepted."""
        files = sorted((p for p in (self.base / "output").rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime)
        spare = sum(path.stat().st_size for path in files) - KEEP_BYTES
        for path in files:
            if spare > 0 and path not in last:
                spare -= path.stat().st_size
                path.unlink()

    def put(self, name: str, content: bytes) -> None:
        """Write a file into the input folder, under a temporary name first: the folder may be shared."""
        path = self.input / name
        path.parent.mkdir(exist_ok=True)  # clipspace, which a new input folder does not have
        part = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        part.write_bytes(content)
        part.replace(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_pack(comfy: Path) -> bool:
    """Whether the pack is installed in this ComfyUI: that one is used then, for two would claim the same nodes."""
    named = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()[1]  # name = "montage"
    return any(
        named in path.read_text(encoding="utf-8", errors="replace").splitlines()
        for path in (comfy / "custom_nodes").glob("*/pyproject.toml")
    )


def _doing(kind: str, data: dict[str, Any], prompt: Prompt) -> str:
    """What the server does, in a few words: "KSampler 12/20"."""
    if kind == "progress":
        node = prompt.get(str(data.get("node")), {}).get("class_type", "")
        return f"{node} {data.get('value')}/{data.get('max')}".strip()
    if kind == "executing" and data.get("node"):
        return prompt.get(str(data["node"]), {}).get("class_type", "")
    return ""


def _error(messages: list[Any]) -> Exception:
    """What a history's messages say of a prompt that did not succeed."""
    for kind, data in messages:
        if kind == "execution_error":
            return PromptFailed(
                f"{data['node_type']} (node {data['node_id']}): {data['exception_type']}:"
                f" {str(data['exception_message']).strip()}"
            )
    return ServerLost("The prompt was interrupted")


def _reasons(errors: dict[str, Any]) -> str:
    """ComfyUI's errors of validation, {node: {"class_type", "errors"}}, in one line."""
    return "; ".join(
        f"{found['class_type']} (node {node}): {error['message']}: {error['details']}"
        for node, found in errors.items()
        for error in found["errors"]
    )


def _refusal(text: str) -> str:
    """ComfyUI's reasons for refusing a prompt, in one line."""
    try:
        answer = json.loads(text)
        return _reasons(answer.get("node_errors") or {}) or answer["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:1000]
