"""The output folder: a folder for each finished job, and manifest.jsonl with a line for each that ended.

A job's folder appears whole: it is written under a temporary name and renamed. It holds the files that the workflow
saved, prompt.json and result.json (its line of the manifest).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import Failure
from .jobs import Job

Record = dict[str, Any]  # a line of the manifest
PART = ".part"


class Store:
    """What is done already, and the way to add to it. One process at a time writes into a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.manifest = folder, folder / "manifest.jsonl"
        self._lock = _lock(folder / ".lock")
        for rest in folder.glob(f".*{PART}"):
            shutil.rmtree(rest, ignore_errors=True)
        self.records = self._read()

    def _read(self) -> dict[str, Record]:
        """The last record of each job. A line that a killed run left unfinished is cut off."""
        if not self.manifest.exists():
            return {}
        text = self.manifest.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.manifest, len(whole))
        try:
            return {record["id"]: record for record in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise Failure(f"{self.manifest} is damaged ({error}): move it away, or repair that line.") from None

    def status(self, job: Job) -> str | None:
        """How the job ended: "done", "failed", "lost", or None if it has not."""
        record = self.records.get(job.id)
        if record and record["status"] == "done":
            return "done" if (self.folder / record["folder"]).is_dir() else None
        if (self.folder / job.folder / "result.json").is_file():  # killed between the folder and its line
            self.note(json.loads((self.folder / job.folder / "result.json").read_text(encoding="utf-8")))
            return "done"
        return record["status"] if record else None

    def write(self, job: Job, files: Mapping[str, bytes], record: Record) -> None:
        """Put a finished job's files into its folder and note it."""
        part, final = self.folder / f".{job.folder}{PART}", self.folder / job.folder
        record = {**record, "folder": job.folder, "files": sorted(files)}
        texts = {"prompt.json": job.prompt, "result.json": record}
        shutil.rmtree(part, ignore_errors=True)
        for name, content in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        part.mkdir(exist_ok=True)
        for name, value in texts.items():
            (part / name).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
        if final.exists():  # of a run whose line the user has taken out of the manifest
            shutil.rmtree(final)
        part.rename(final)
        self.note(record)

    def note(self, record: Record) -> None:
        """Add a line to the manifest."""
        with open(self.manifest, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[record["id"]] = record


def _lock(path: Path) -> Any:
    """Hold the file for as long as this process lives. Raises Failure if another one does."""
    held = open(path, "a")  # noqa: SIM115  closed by the system, however this process ends
    with contextlib.suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(
                f"Another batch is writing into {path.parent}: wait for it, or name another folder."
            ) from None
        except OSError:
            pass  # a network file system without locks
    return held
