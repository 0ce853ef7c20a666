#!/usr/bin/env python3
"""Spreads many runs of a workflow over several ComfyUI servers, by ComfyUI's own API. Needs nothing but Python.

    python docs/many_machines.py workflow.json http://first:8188 http://second:8188 --runs 20 --output pictures

workflow.json: exported with Workflow > Export (API); every server needs the same models, this pack and the workflow's
input pictures. Run k adds k to every seed in it, so that the images of a stack and their composite stay together; run 0
is the workflow as it is. Each server takes its next run when it is done with the last: a faster one does more. The
pictures that the workflow saves are fetched as run-0000-NAME. The same run gives the same picture on every server of
one kind; other GPUs round differently.
"""

import argparse
import copy
import json
import queue
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


def call(url, payload=None):
    data = None if payload is None else json.dumps(payload).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=60
    ) as answer:
        return answer.read()


def with_seeds(prompt, number):
    """The workflow with `number` added to every seed that is written in it."""
    changed = copy.deepcopy(prompt)
    for node in changed.values():
        for key in ("seed", "noise_seed"):
            if isinstance(node["inputs"].get(key), int):
                node["inputs"][key] += number
    return changed


def run(server, prompt):
    """Queue a prompt on a server, wait for its end: the saved images, [{filename, subfolder, type}]. Raises
    RuntimeError if it fails.
    """
    queued = json.loads(call(f"{server}/prompt", {"prompt": prompt}))["prompt_id"]
    while not (history := json.loads(call(f"{server}/history/{queued}")).get(queued)):
        time.sleep(0.5)
    if history["status"]["status_str"] != "success":
        errors = [
            data["exception_message"] for kind, data in history["status"]["messages"] if kind == "execution_error"
        ]
        raise RuntimeError(errors[0] if errors else "interrupted")
    return [
        image for shown in history["outputs"].values() for image in shown.get("images", ()) if image["type"] == "output"
    ]


def work(server, numbers, prompt, output, failures):
    """One server's share: the next number, until there is none."""
    while True:
        try:
            number = numbers.get_nowait()
        except queue.Empty:
            return
        try:
            for image in run(server, with_seeds(prompt, number)):
                (output / f"run-{number:04d}-{image['filename']}").write_bytes(
                    call(f"{server}/view?{urllib.parse.urlencode(image)}")
                )
            print(f"run {number}: {server}", flush=True)
        except (OSError, RuntimeError) as error:
            said = error.read().decode() if isinstance(error, urllib.error.HTTPError) else error
            failures.append(f"run {number} on {server}: {said}")
            if not isinstance(
                error, RuntimeError
            ):  # the server does not answer, or not to this: leave the rest to the others
                numbers.put(number)
                return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("servers", nargs="+", help="http://host:port")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prompt, numbers, failures = json.loads(options.workflow.read_text(encoding="utf-8")), queue.SimpleQueue(), []
    for number in range(options.runs):
        numbers.put(number)
    threads = [
        threading.Thread(target=work, args=(server.rstrip("/"), numbers, prompt, options.output, failures))
        for server in options.servers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = numbers.qsize()
    sys.exit("\n".join([*failures, *([f"{left} runs were not done"] if left else [])]) or None)


if __name__ == "__main__":
    main()
