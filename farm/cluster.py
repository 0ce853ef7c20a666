"""The connection to Ray."""

import os
from pathlib import Path
from typing import Any

from .errors import Failure

ROOT = Path(__file__).resolve().parent.parent
NOT_SENT = ["/output", "/node_modules", "__pycache__"]  # .git and what .gitignore names are left out by Ray itself


def on_this_machine(address: str | None) -> bool:
    """Whether Ray is to be started here: no address is given, and this is not a Ray job, which knows its cluster."""
    return not address and "RAY_ADDRESS" not in os.environ


def connect(address: str | None) -> None:
    """Connect to the cluster at `address` ("auto": the one this machine belongs to), or start Ray on this machine.

    Every worker's current folder becomes a copy of this checkout. Inside a Ray job it already is one. Raises Failure
    if Ray is not installed or does not answer.
    """
    try:
        import aiohttp  # noqa: F401  the workers talk to ComfyUI with it; it comes with ray[default]
        import ray
        from ray.exceptions import RayError
    except ImportError:
        raise Failure('The farm runs on Ray, which is not installed: run  pip install "ray[default]"') from None
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        options["runtime_env"] = {"working_dir": str(ROOT), "excludes": NOT_SENT}
    if address:
        options["address"] = address
    elif on_this_machine(address):
        options |= {"address": "local", "include_dashboard": False}  # Ray would join a cluster that ran here before
    try:
        ray.init(**options)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise Failure(f"Ray did not answer at {address or 'this machine'}: {error}") from error
