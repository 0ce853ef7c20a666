"""One training loop for every network here: a time or step budget, an average of the weights, and checkpoints
from which a killed run goes on as if nothing had happened. Under torchrun every process trains on batches of its own,
and every few steps all go on from the mean of their weights (local SGD: cheap where processes outnumber free cores)."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BETAS = (0.9, 0.99)
AVERAGE = 0.995  # of the weights: how much of it stays at every step
SAVE_EVERY = 60.0  # seconds
MEET_EVERY = 8  # steps, when several processes train


def ranks() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Budget:
    """How long to train: `seconds` of this machine, or `steps` when given (then two runs are alike)."""

    def __init__(self, seconds: float, steps: int | None = None):
        self.seconds, self.steps = seconds, steps
        self.spent = 0.0  # share of it, up to 1: `fit` keeps it

    def advance(self, step: int, elapsed: float) -> float:
        self.spent = step / self.steps if self.steps else elapsed / self.seconds
        return self.spent


def fit(
    name: str,
    folder: Path,
    parameters: dict[str, Tensor],
    loss_of: Callable[[torch.Generator], Tensor],
    budget: Budget,
    lr: float,
    seed: int = 0,
    warmup: int = 100,
    show: Callable[[int], None] | None = None,
) -> dict:
    """Trains `parameters` in place and leaves their average over the last steps in them.

    loss_of draws all its randomness from the generator it is given, on the parameters' device; the generator
    depends on seed, step and process alone, so the continuation of a killed run is the run itself. The learning rate
    rises for `warmup` steps, stays, and falls along a cosine over the second half of the budget.
    Returns {"steps", "seconds", "loss"} (the loss as a running mean).
    """
    path = folder / f"{name}.safetensors"
    values = list(parameters.values())
    device = values[0].device
    optimiser = torch.optim.AdamW(values, lr, BETAS, weight_decay=0.01, fused=True)
    average = [value.detach().clone() for value in values]
    step, elapsed, mean = _resume(path, parameters, average, optimiser) if path.exists() else (0, 0.0, None)
    rank, world = ranks()
    start, saved = time.monotonic() - elapsed, time.monotonic()

    while (spent := budget.advance(step, elapsed)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / warmup) * _cosine(max(0.0, 2 * spent - 1))
        loss = loss_of(torch.Generator(device).manual_seed((seed * 1_000_003 + step) * world + rank))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimiser.step()
        step += 1
        if world == 1:
            elapsed = time.monotonic() - start
        elif step % MEET_EVERY == 0:
            elapsed = _meet(values, time.monotonic() - start, world)
        torch._foreach_lerp_(average, [value.detach() for value in values], 1 - min(AVERAGE, (1 + step) / (20 + step)))
        # Reading the loss waits for a GPU: not every step.
        if step % 20 == 0 or mean is None:
            mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
        if step % 40 == 0 and not rank:
            print(f"{name} step {step} {spent:4.0%} loss {mean:.4f} {step / elapsed:.2f} steps/s", flush=True)
        if time.monotonic() - saved > SAVE_EVERY and not rank and (world == 1 or step % MEET_EVERY == 0):
            _save(path, parameters, average, optimiser, step, elapsed, mean)
            saved = time.monotonic()
            if show:
                with averaged(values, average):
                    show(step)
    if world > 1:
        _meet(average, elapsed, world)
    if not rank:
        _save(path, parameters, average, optimiser, step, elapsed, mean)
    _copy(values, average)
    print(f"{name} done: {step} steps in {elapsed:.0f} s, loss {mean:.4f}", flush=True)
    return {"steps": step, "seconds": round(elapsed), "loss": round(mean, 4)}


def save_safely(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a whole file or none: a kill in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, metadata)
    os.replace(partial, path)


@torch.no_grad()
def restore(path: Path, parameters: dict[str, Tensor]) -> None:
    """Puts the averaged weights of a checkpoint into the parameters."""
    with safe_open(path, "pt") as file:
        for key, value in parameters.items():
            value.copy_(file.get_tensor(f"average.{key}"))


class averaged:
    """Within the block the parameters hold their average."""

    def __init__(self, values: list[Tensor], average: list[Tensor]):
        self.values, self.average = values, average

    def __enter__(self):
        self.kept = [value.detach().clone() for value in self.values]
        _copy(self.values, self.average)

    def __exit__(self, *_):
        _copy(self.values, self.kept)


@torch.no_grad()
def _copy(to: list[Tensor], source: list[Tensor]) -> None:
    for a, b in zip(to, source):
        a.copy_(b)


def _cosine(spent: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))


@torch.no_grad()
def _meet(values: list[Tensor], elapsed: float, world: int) -> float:
    """Averages tensors over all processes, in place, and the time, so that all of them stop at the same step."""
    flat = torch.cat([torch.tensor([elapsed], device=values[0].device), *(value.flatten() for value in values)])
    dist.all_reduce(flat)
    flat /= world
    for value, part in zip(values, flat[1:].split([value.numel() for value in values])):
        value.copy_(part.view_as(value))
    return flat[0].item()


def _save(path, parameters, average, optimiser, step, elapsed, mean) -> None:
    tensors = {}
    for (key, value), smooth in zip(parameters.items(), average):
        state = optimiser.state[value]
        tensors |= {
            f"now.{key}": value,
            f"average.{key}": smooth,
            f"first.{key}": state["exp_avg"],
            f"second.{key}": state["exp_avg_sq"],
        }
    progress = {"step": step, "elapsed": elapsed, "mean": mean}
    save_safely(tensors, path, {"progress": json.dumps(progress)})


@torch.no_grad()
def _resume(path, parameters, average, optimiser) -> tuple[int, float, float]:
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        device = average[0].device
        for (key, value), smooth in zip(parameters.items(), average):
            value.copy_(file.get_tensor(f"now.{key}"))
            smooth.copy_(file.get_tensor(f"average.{key}"))
            # Laid out in memory as the parameter is (channels last): the fused optimiser does not look at strides.
            optimiser.state[value] = {
                "step": torch.tensor(float(progress["step"]), device=device),
                "exp_avg": torch.empty_like(value).copy_(file.get_tensor(f"first.{key}")),
                "exp_avg_sq": torch.empty_like(value).copy_(file.get_tensor(f"second.{key}")),
            }
    print(f"{path.stem}: going on from step {progress['step']}", flush=True)
    return progress["step"], progress["elapsed"], progress["mean"]
