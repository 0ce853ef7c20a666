"""What a batch shows: a bar with the rate and what runs where on a terminal, and a line for each job that ended."""

import shutil
import sys
import time
from typing import Any, TextIO

BAR = 20  # characters


class Progress:
    """total: the jobs to run now. Rates and the remaining time count from the first job that ended."""

    def __init__(self, total: int, out: TextIO = sys.stderr) -> None:
        self.total, self.out = total, out
        self.counts = {"done": 0, "failed": 0, "lost": 0}
        self.began = time.monotonic()
        self.first: float | None = None
        self.bar = out.isatty()

    @property
    def count(self) -> int:
        """How many jobs have ended."""
        return sum(self.counts.values())

    def rate(self) -> float:
        """Jobs a minute. 0 while there is nothing to count from."""
        if self.first is None or self.count < 2:
            return 0.0
        return 60 * (self.count - 1) / max(time.monotonic() - self.first, 1e-6)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.out.write(f"\r\033[K{text}\n" if self.bar else f"{text}\n")
        self.out.flush()

    def ended(self, record: dict[str, Any], error: str) -> None:
        """A job has ended."""
        self.counts[record["status"]] += 1
        self.first = self.first or time.monotonic()
        how = {"done": f"{record['seconds']:.1f} s", "failed": error, "lost": f"given up: {error}"}[record["status"]]
        rate = f", {self.rate():.1f} a minute" if self.rate() else ""
        self.say(f"[{self.count}/{self.total}{rate}] {record['name']} on {record['worker']}: {how}")

    def show(self, running: dict[str, str]) -> None:
        """Redraw the bar. running: {worker: what it does}."""
        if not self.bar:
            return
        filled = BAR * self.count // max(self.total, 1)
        rate = self.rate()
        left = f"{rate:.1f} a minute, {60 * (self.total - self.count) / rate:.0f} s left" if rate else "starting"
        doing = "; ".join(f"{where}: {what.strip()}" for where, what in running.items())
        line = f"[{'#' * filled}{'.' * (BAR - filled)}] {self.count}/{self.total}, {left} | {doing}"
        self.out.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
        self.out.flush()

    def summary(self) -> str:
        """The last line."""
        counts = ", ".join(f"{number} {status}" for status, number in self.counts.items() if number or status == "done")
        return f"{counts} in {time.monotonic() - self.began:.0f} s, {self.rate():.1f} a minute once they ran"
