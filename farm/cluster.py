"""The connection to Ray."""

import os
from pathlib import Path

from .errors import Failure

ROOT = Path(__file__).resolve().parent.parent
NOT_SENT = ["/output", "/node_modules", "__pycache__"]  # .git and what .gitignore names are left out by Ray itself


def connect(address: str | None) -> None:
    """Connect to the cluster at `address` ("auto": the one this machine belongs to), or start Ray on this machine.

    Every worker's current folder becomes a copy of this checkout. Inside a Ray job it already is one. Raises Failure
    if Ray is not installed or does not answer.
    """
    try:
        import ray
    except ImportError:
        raise Failure('The farm runs on Ray, which is not installed: run  pip install "ray[default]"') from None
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"working_dir": str(ROOT), "excludes": NOT_SENT}
    if address:
        options["address"] = address
    elif "RAY_ADDRESS" not in os.environ:  # set inside a Ray job
        options |= {"address": "local", "include_dashboard": False}  # Ray would join a cluster that ran here before
    try:
        ray.init(**options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise Failure(f"Ray did not answer at {address or 'this machine'}: {error}") from error
