"""What more workers bring: runs of the photomontage a minute, on one server by its API and on the farm.

python dev.py benchmark farm
    one server, one worker and two, each of them on one core: for a machine that does nothing else
python dev.py benchmark farm --workers 1 2 4 --runs 40
"""

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from ...farm import jobs, store
from ...workshop.live_server import serving
from ..measurements import ROOT

WORKFLOW = "photomontage (demo)"
ON_ONE_CORE = ("--cpus-per-worker", "1", "--comfyui-args=--disable-api-nodes")


def on_a_server(runs: int) -> float:
    """Runs a minute after the first, which loads the model."""
    prompt, path = jobs.load_workflow(WORKFLOW)
    batch = jobs.make_jobs(prompt, [], range(runs), [path.parent])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, serving(Path(folder)) as server:
        began = 0.0
        for number, job in enumerate(batch):
            queued = server.call("/prompt", {"prompt": job.prompt})["prompt_id"]
            assert server.end(queued, pause=0.02)["status"]["status_str"] == "success"
            began = began if number else time.monotonic()
        return 60 * (runs - 1) / (time.monotonic() - began)


def on_workers(workers: int, runs: int) -> float:
    """Runs a minute from the moment on at which every worker has ended one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "farm", WORKFLOW, "--seeds", f"0..{runs - 1}", "--output", folder]
        subprocess.run([*command, "--workers", str(workers), *ON_ONE_CORE], cwd=ROOT, check=True)
        records = store.Store(Path(folder)).records.values()
    ended = sorted((datetime.fromisoformat(record["ended"]), record["worker"]) for record in records)
    firsts = {worker: when for when, worker in reversed(ended)}
    assert len(firsts) == workers, f"{workers - len(firsts)} workers ended no run: take more --runs"
    began = max(firsts.values())
    return 60 * sum(when > began for when, _ in ended) / (ended[-1][0] - began).total_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    alone = on_a_server(options.runs)
    print(f"one server: {alone:.1f} runs a minute", flush=True)
    for workers in options.workers:
        rate = on_workers(workers, options.runs)
        print(f"{workers} workers: {rate:.1f} runs a minute, {rate / alone:.2f} of the server's", flush=True)


if __name__ == "__main__":
    main()
