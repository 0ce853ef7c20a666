"""The command line: python -m farm."""

import argparse
import shlex
import sys
from pathlib import Path

from .cluster import connect, on_this_machine
from .errors import Failure
from .jobs import load_workflow, make_jobs, parse_seeds, read_table
from .settings import Settings

EPILOG = """A table is a CSV (the first line names the columns) or JSON Lines file; a column is node.input, where node
is a node's id, or its title or class where only one has it. A column "name" names the run. Values that name pictures
beside the table, beside the workflow or in --pictures are sent to the machines; so is any file written as @path.

A killed batch goes on with the same command: what the output folder's manifest.jsonl calls done is not run again. A
prompt that ComfyUI refuses, or in which a node raises an error, is reported once; --retry-failed runs it again."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser("python -m farm", description="Run a workflow many times on many GPUs.")
    found.formatter_class, found.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    add = found.add_argument
    add("workflow", help="an API workflow (Workflow > Export (API)), or part of the name of one of ours")
    add("--output", type=Path, default=Path("output/farm"), help="folder of the results (default: %(default)s)")
    add("--seeds", metavar="A..B", help="a run for each number, which is added to every seed in the workflow")
    add("--table", type=Path, help="a run for each row of overrides; with --seeds, for each row and number")
    add("--pictures", type=Path, action="append", default=[], help="another folder to look for pictures in")
    add("--address", help="of the Ray cluster, or auto; none: this machine")
    add("--workers", type=int, help="how many ComfyUIs (default: as many as the cluster has GPUs, or cores for)")
    add("--cpus-per-worker", type=int, default=0, metavar="N", help="run without GPUs, each worker on N CPU cores")
    add(
        "--timeout",
        type=float,
        default=600,
        help="seconds without progress until a server counts as hung (%(default)s)",
    )
    add("--start-timeout", type=float, default=600, help="seconds that ComfyUI may take to start (%(default)s)")
    add("--attempts", type=int, default=3, help="workers that a run may lose before it is given up (%(default)s)")
    add("--retry-failed", action="store_true", help="run again what failed in an earlier batch")
    add("--comfyui", help="ComfyUI's folder on the workers' machines (default: their COMFYUI_PATH)")
    add("--python", help="the Python to start ComfyUI with (default: the one of its own environment)")
    add("--comfyui-args", default="", help='more of ComfyUI\'s options, in one string: --comfyui-args="--fast"')
    add("--input-directory", help="a folder that all machines share, as every ComfyUI's input folder")
    return found


def settings_of(options: argparse.Namespace) -> Settings:
    """How the workers start ComfyUI. On this machine alone that is as dev.py would."""
    comfy, python = options.comfyui, options.python
    if on_this_machine(options.address) and not comfy:
        import dev

        try:
            here = dev.environment()
        except dev.Failure as error:
            raise Failure(str(error)) from None
        comfy, python = str(here.comfy), python or str(here.python)
    return Settings(
        comfy=comfy,
        python=python,
        arguments=tuple(shlex.split(options.comfyui_args)),
        input_directory=options.input_directory,
        timeout=options.timeout,
        start_timeout=options.start_timeout,
        cpus=options.cpus_per_worker,
    )


def worker_count(options: argparse.Namespace) -> int:
    """--workers, or what the cluster has room for."""
    if options.workers:
        return options.workers
    import ray

    has = ray.cluster_resources()
    if options.cpus_per_worker:
        room = int(has.get("CPU", 0) // options.cpus_per_worker)
        lacks = f"Ray has {has.get('CPU', 0):.0f} CPU cores, fewer than --cpus-per-worker {options.cpus_per_worker}."
    else:
        room = int(has.get("GPU", 0))
        lacks = (
            "Ray sees no GPU: give --cpus-per-worker to run on CPU cores, or --workers to wait for machines to join."
        )
    if not room:
        raise Failure(lacks)
    return room


def batch(options: argparse.Namespace) -> int:
    """Run what the options ask for: the exit status."""
    prompt, path = load_workflow(options.workflow)
    rows = read_table(options.table) if options.table else []
    folders = [*([options.table.parent] if options.table else []), path.parent, *options.pictures, Path()]
    jobs = make_jobs(prompt, rows, parse_seeds(options.seeds) if options.seeds else None, folders)
    if options.table and not rows:
        raise Failure(f"The table {options.table} has no rows.")

    from .store import Store

    store = Store(options.output)
    ended = ("done",) if options.retry_failed else ("done", "failed")
    missing = [job for job in jobs if store.status(job) not in ended]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them already in {options.output}.", file=sys.stderr)
    if missing:
        connect(options.address)
        from .batch import Batch
        from .progress import Progress

        progress = Progress(len(missing))
        Batch(store, settings_of(options), worker_count(options), options.attempts, progress).run(missing)
        progress.say(progress.summary())
    bad = [store.records[job.id] for job in jobs if store.status(job) != "done"]
    for record in bad:
        print(f"{record['name']} {record['status']}: {record['error']}", file=sys.stderr)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Parse, run, and tell failures in a sentence."""
    options = parser().parse_args(argv)
    try:
        return batch(options)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
