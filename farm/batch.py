"""Gives jobs to workers until every job has ended, whatever happens to the workers."""

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from .errors import Failure
from .jobs import Job
from .progress import Progress
from .settings import Settings
from .store import Store
from .worker import Outcome, Worker

BEAT_SECONDS = 2.0
STARTS = 3  # attempts of one worker to start its ComfyUI, replacements included


@dataclass
class Hand:
    """A worker as the driver sees it: its actor and what was last asked of it."""

    actor: Any
    number: int
    failed_starts: int = 0
    where: str = ""
    job: Job | None = None
    call: Any = None  # the reference of start() or run() while it is under way
    doing: str = ""
    beat: Any = None
    heard: float = field(default_factory=time.monotonic)


class Batch:
    """Runs jobs on `workers` actors. attempts: how many workers a job may lose before it is given up."""

    def __init__(self, store: Store, settings: Settings, workers: int, attempts: int, progress: Progress) -> None:
        self.store, self.settings, self.attempts, self.progress = store, settings, attempts, progress
        self.actor: Any = ray.remote(num_cpus=settings.cpus, num_gpus=0 if settings.cpus else 1)(Worker)
        self.waiting: deque[Job] = deque()
        self.contents: dict[str, Any] = {}  # of uploads: {name: reference}
        self.hands: list[Hand] = []
        self.workers, self.hired, self.beat_at = workers, 0, 0.0

    def run(self, jobs: list[Job]) -> None:
        """Run the jobs; every one is noted in the store. Raises Failure if no worker can start a ComfyUI."""
        self.waiting.extend(jobs)
        for _ in range(min(self.workers, len(jobs))):
            self._hire()
        try:
            while self.waiting or any(hand.job for hand in self.hands):
                self._turn()
        finally:
            self._dismiss()

    def _turn(self) -> None:
        for hand in self.hands:
            if not hand.call and self.waiting:
                self._give(hand)
        calls = {hand.call: hand for hand in self.hands if hand.call}
        ready, _ = ray.wait(list(calls), num_returns=1, timeout=0.5)
        for call in ready:
            self._collect(calls[call])
        self._listen()
        self.progress.show({hand.where: f"{hand.job.name} {hand.doing}" for hand in self.hands if hand.job})

    def _hire(self, failed_starts: int = 0) -> None:
        hand = Hand(self.actor.remote(self.settings), self.hired, failed_starts, f"worker {self.hired}")
        hand.call = hand.actor.start.remote()
        self.hired += 1
        self.hands.append(hand)

    def _give(self, hand: Hand) -> None:
        job = self.waiting.popleft()
        for name, path in job.uploads.items():
            if name not in self.contents:
                self.contents[name] = ray.put(path.read_bytes())
        uploads = {name: self.contents[name] for name in job.uploads}
        job.attempts += 1
        hand.job, hand.heard, hand.beat = job, time.monotonic(), None
        hand.call = hand.actor.run.remote(job.prompt, uploads)

    def _collect(self, hand: Hand) -> None:
        """Take what a finished call brought."""
        call, job = hand.call, hand.job
        hand.call = hand.job = None
        try:
            found: Any = ray.get(call)
        except RayError as error:  # its process or machine died, or the result was lost with it
            lines = str(error).strip().splitlines()
            task = isinstance(error, RayTaskError)  # an error of the worker's own, as of a full disk
            self._replace(hand, job, f"the worker died: {lines[-1 if task else 0]}")
            return
        if job is None:
            hand.where, reason = found
            if reason:
                self._replace(hand, None, reason)
            else:
                hand.failed_starts = 0
            return
        if found.status == "lost":
            hand.call = hand.actor.start.remote()  # while it restarts its server, the others take the job
        self._end(job, found, hand.where)

    def _replace(self, hand: Hand, job: Job | None, reason: str) -> None:
        """Let a new worker take a dead one's place, anywhere in the cluster."""
        self.hands.remove(hand)
        ray.kill(hand.actor)
        self.progress.say(f"{hand.where}: {reason}")
        failed_starts = 0 if job else hand.failed_starts + 1
        if failed_starts < STARTS:
            self._hire(failed_starts)
        elif not self.hands:
            raise Failure(f"No worker could start ComfyUI. {reason}")
        if job:
            self._end(job, Outcome("lost", 0.0, {}, reason), hand.where)

    def _end(self, job: Job, outcome: Outcome, where: str) -> None:
        """Note an attempt's end, or queue the job again."""
        if outcome.status == "lost" and job.attempts < self.attempts:
            self.progress.say(f"{job.name}: tried again, for {where} was lost: {outcome.error}")
            self.waiting.appendleft(job)
            return
        record = {
            "id": job.id,
            "name": job.name,
            "status": outcome.status,
            "overrides": job.overrides,
            "seconds": round(outcome.seconds, 2),
            "attempts": job.attempts,
            "worker": where,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if outcome.status == "done":
            self.store.write(job, outcome.files, record)
        else:
            self.store.note({**record, "error": outcome.error})
        self.progress.ended(record, outcome.error)

    def _listen(self) -> None:
        """Ask the busy workers what they do. One that says nothing for longer than its server may be silent is stuck
        itself and is killed; its call then fails as that of any dead worker.
        """
        if time.monotonic() < self.beat_at:
            return
        self.beat_at = time.monotonic() + BEAT_SECONDS
        for hand in self.hands:
            if not hand.job:
                continue
            if hand.beat is None:
                hand.beat = hand.actor.beat.remote()
            if ray.wait([hand.beat], timeout=0)[0]:
                with contextlib.suppress(RayError):  # its call tells
                    hand.doing, hand.heard = ray.get(hand.beat), time.monotonic()
                hand.beat = None
            elif time.monotonic() - hand.heard > self.settings.timeout + 10 * BEAT_SECONDS:
                ray.kill(hand.actor)

    def _dismiss(self) -> None:
        """Stop the servers. Those that do not stop in time end with their actors."""
        closing = [hand.actor.close.remote() for hand in self.hands]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=5)
        for hand in self.hands:
            ray.kill(hand.actor)
        self.hands.clear()
