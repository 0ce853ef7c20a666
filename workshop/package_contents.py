"""What of this repository goes to people: the registry's archive is what git tracks less what .comfyignore names."""

import ast
import asyncio
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments):
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def archive():
    """The archive's files, as comfy-cli packs them: .comfyignore is read as git reads its own."""
    tracked = set(git("ls-files"))
    return tracked - set(git("ls-files", "--cached", "--ignored", f"--exclude-from={ROOT / '.comfyignore'}"))


def imported(path):
    """The pack's own modules that a module imports, anywhere in it."""
    package = path.parent
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package
            for _ in range(node.level - 1):
                base = base.parent
            base = base.joinpath(*(node.module or "").split(".")) if node.module else base
            yield from (base, *(base / alias.name for alias in node.names))


def shipped_modules():
    """Every module that ComfyUI may load: what __init__.py imports, and what that imports."""
    found, waiting = set(), [ROOT / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for place in imported(path):
            waiting += [
                file
                for file in (place.with_suffix(".py"), place / "__init__.py", place.parent / "__init__.py")
                if file.is_file()
            ]
    return sorted(found)


def schemas():
    """The schemas of all nodes, finalized as ComfyUI does it."""
    import montage

    extension = asyncio.run(montage.comfy_entrypoint())
    return [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
