"""What `pip install` of our requirements does to an environment that has ComfyUI: it adds, it changes nothing."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
LOCALIZE = ["rf_groundingdino", "segment-anything"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    return {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def resolve(*arguments: str) -> list[dict]:
    """The metadata of all that pip would install here; skips where it has no index to ask."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and re.search(
        r"connection|network|timed? ?out|No matching distribution|No module named pip", done.stderr, re.I
    ):
        pytest.skip(f"pip cannot resolve here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return [item["metadata"] for item in json.loads(done.stdout)["install"]]


def requirements(package: str) -> list[Requirement]:
    """What a package's newest release asks for, whether it is installed here or not."""
    metadata = resolve("--no-deps", "--ignore-installed", package)[0]
    return [
        r
        for r in map(Requirement, metadata.get("requires_dist", []))
        if not r.marker or r.marker.evaluate({"extra": ""})
    ]


def test_installing_changes_no_version_that_is_there():
    here = installed()
    plan = {canonical(m["name"]): m["version"] for m in resolve(*LOCALIZE)}
    assert {name: (here[name], version) for name, version in plan.items() if here.get(name, version) != version} == {}


@pytest.mark.parametrize("package", LOCALIZE)
def test_what_we_name_accepts_every_version_that_is_there(package):
    """Also where the packages are installed already and the test above has nothing to resolve."""
    here = installed()
    refused = [
        str(r)
        for r in requirements(package)
        if canonical(r.name) in here and not r.specifier.contains(here[canonical(r.name)], prereleases=True)
    ]
    assert refused == []


def test_supervision_of_other_packs_stays_with_the_package_we_name_and_not_with_the_other():
    """The reason for the choice: many packs bring a current supervision, and groundingdino-py would downgrade it."""
    current = resolve("--no-deps", "--ignore-installed", "supervision")[0]["version"]

    def accepted_by(package):
        return all(r.specifier.contains(current) for r in requirements(package) if r.name == "supervision")

    assert accepted_by("rf_groundingdino") and not accepted_by("groundingdino-py")


def test_the_extra_of_the_pack_is_what_is_tested_here():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r"^localize\s*=\s*\[(.*?)\]", text, re.M | re.S)
    assert extra and sorted(re.findall(r'"([^"]+)"', extra[1])) == sorted(LOCALIZE)
