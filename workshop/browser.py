"""Node, Chromium and playwright-core for the tests of the web half, found or installed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from .. import dev

WEB_TESTS = Path(__file__).resolve().parent.parent / "tests" / "web"
PLAYWRIGHT = "1.65.0"
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")


def unavailable(reason: str) -> NoReturn:
    """In CI the web half must be tested; elsewhere one line says that it was not."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def tool(name: str) -> str:
    return shutil.which(name) or unavailable(f"the web tests need {name}, which is not installed")


def install(command: list[str], what: str, **variables: str) -> None:
    result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    if result.returncode:
        unavailable(f"the browser tests need {what}, and installing it failed: {result.stderr.strip()[-300:]}")


def chromium() -> str:
    """The browser's path; on Debian it is installed when this process may."""
    named = os.environ.get("MONTAGE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found:
        return found
    if not (Path("/etc/debian_version").exists() and os.geteuid() == 0):
        unavailable("the browser tests need Chromium: install it, or set MONTAGE_CHROMIUM to its path")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    install(["apt-get", "update"], "Debian's package lists", **quiet)
    install(
        ["apt-get", "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"], "Chromium", **quiet
    )
    return tool("chromium")


def playwright() -> Path:
    """playwright-core's module, in the user's cache: it drives a browser and brings none along."""
    folder = dev.cache_dir() / f"playwright-core-{PLAYWRIGHT}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as whole:  # renamed when complete: never half of it
            install(
                [tool("npm"), "install", "--no-audit", "--no-fund", "--prefix", whole, f"playwright-core@{PLAYWRIGHT}"],
                "playwright-core",
            )
            os.rename(Path(whole) / "node_modules" / "playwright-core", folder)
    return folder / "index.mjs"


def run_node(name: str, variables: dict[str, str]) -> None:
    """One file of tests in JavaScript, under these environment variables; it must pass."""
    result = subprocess.run(
        [tool("node"), "--test", "--test-reporter=spec", str(WEB_TESTS / name)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
