"""Says what a release still lacks; docs/releasing.md is the page that it belongs to.

    python workshop/release.py v0.1.0            exits with 1 and one line for each thing that is missing
    python workshop/release.py --address URL     writes the repository's public address into pyproject.toml

Standard library alone, Python 3.11 or newer.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ICON = "docs/icon.svg"


def icon_of(address: str) -> str:
    """Where the registry finds the icon: it wants a URL of its own."""
    return f"{address}/raw/HEAD/{ICON}"


def missing(tag: str, project: dict, changelog: str) -> list[str]:
    """What keeps `tag` from being released, a sentence each.

    project: pyproject.toml's content. changelog: CHANGELOG.md's text.
    """
    found = []
    version = project["project"]["version"]
    if tag != f"v{version}":
        found.append(f"The tag is {tag}, but pyproject.toml has version {version}.")
    heading = re.search(r"^## (\S+)(?: - (\S+))?$", changelog, re.M)
    newest, date = heading.groups() if heading else (None, None)
    if newest != version:
        found.append(f"CHANGELOG.md begins with {newest}, but pyproject.toml has version {version}.")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date or ""):
        found.append(f'CHANGELOG.md has no date for {newest}: write "## {newest} - YYYY-MM-DD".')
    address = project["project"].get("urls", {}).get("Repository", "")
    if not address:
        found.append("pyproject.toml has no address: run  python workshop/release.py --address https://...")
    elif project["tool"]["comfy"].get("Icon") != icon_of(address):
        found.append(f"Icon in pyproject.toml is not {icon_of(address)}: run --address {address} again.")
    return found


def with_address(text: str, address: str) -> str:
    """pyproject.toml's text with the address, and the icon's."""
    if not re.fullmatch(r"https://[^\s\"]+[^\s\"/]", address):
        raise ValueError(f"{address!r} is not an address: it begins with https:// and has no slash at its end.")
    for key, value in (("Repository", address), ("Icon", icon_of(address))):
        text, count = re.subn(rf'^{key} = ".*?"', f'{key} = "{value}"', text, flags=re.M)
        if count != 1:
            raise ValueError(f"pyproject.toml has {count} lines that begin with {key}: leave one.")
    return text


def main() -> None:
    import tomllib

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tag", nargs="?", help="as v0.1.0")
    parser.add_argument("--address", help="the repository's public address, as https://HOST/OWNER/NAME")
    chosen = parser.parse_args()
    path = ROOT / "pyproject.toml"
    if chosen.address:
        path.write_text(with_address(path.read_text(encoding="utf-8"), chosen.address), encoding="utf-8")
    if chosen.tag:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        found = missing(chosen.tag, project, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
        sys.exit("\n".join(found) or None)
    if not chosen.address:
        parser.error("name a tag, or --address")


if __name__ == "__main__":
    main()
