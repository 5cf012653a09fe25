"""Whole gradients of a step, seen between its last backward and its update, and how alike two of them are.

Read against DeepSpeed 0.19.8: `safe_get_full_grad` joins a parameter's gradient from all ranks at ZeRO-3 (a collective)
and gives the reduced one, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from ultralong_ray.benchmark.measure import StepNumbers

BLOCK_ELEMENTS = 2**26  # summed in float64 at a time
WRAPPER = "causal_lm."  # where LanguageModelLoss keeps the Hugging Face model


def observed_step(
    engine: Any, step: Callable[[], StepNumbers], visit: Callable[[str, torch.Tensor], None]
) -> StepNumbers:
    """Run `step`, showing `visit` every parameter's name and whole gradient before the update. Collective.

    The engine's own `step` is the one place that the training code passes between backward and update, so it is
    replaced on this instance for the time of the call.
    """
    update = engine.step

    def observed(*args: Any, **kwargs: Any) -> Any:
        for name, parameter in engine.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is None:
                raise RuntimeError(f"{name} has no gradient")
            visit(name.removeprefix(WRAPPER), gradient)
        return update(*args, **kwargs)

    engine.step = observed
    try:
        return step()
    finally:
        del engine.step


def whole_weights(causal_lm: Any) -> dict[str, torch.Tensor]:
    """Every parameter by name as the model computes with it, on the CPU of every rank. Collective."""
    weights = {}
    for name, parameter in causal_lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().cpu().clone()
    return weights


def gradients_of(engine: Any, folder: Path, step: Callable[[], StepNumbers]) -> dict[str, Any]:
    """Gradients of a step against those of the first setup that ran with `folder`, which are left there.

    Returns on rank 0, by tensor, {cosine, relative_error}; for the first setup no tensors. Collective.
    """
    stored = folder / "gradients"
    is_rank0, is_first = dist.get_rank() == 0, not stored.exists()
    dist.barrier()  # all have looked
    if is_rank0:
        stored.mkdir(exist_ok=True)
    tensors: dict[str, dict[str, float]] = {}

    def visit(name: str, gradient: torch.Tensor) -> None:
        if not is_rank0:
            return
        if is_first:
            torch.save(gradient.float().cpu(), stored / f"{name}.pt")
        else:
            tensors[name] = likeness(gradient, torch.load(stored / f"{name}.pt").to(gradient.device))

    numbers = observed_step(engine, step, visit)
    return {"is_reference": is_first, "loss": numbers.loss, "grad_norm": numbers.grad_norm, "tensors": tensors}


def likeness(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Cosine of two tensors, and the norm of their difference over the norm of the second. Sums are float64."""
    dot = first_square = second_square = difference_square = 0.0
    for a, b in zip(first.flatten().split(BLOCK_ELEMENTS), second.flatten().split(BLOCK_ELEMENTS), strict=True):
        a, b = a.double(), b.double()
        dot += (a * b).sum().item()
        first_square += a.square().sum().item()
        second_square += b.square().sum().item()
        difference_square += (a - b).square().sum().item()
    norm = math.sqrt(first_square * second_square)
    return {
        "cosine": dot / norm if norm else float(first_square == second_square),
        "relative_error": math.sqrt(difference_square / second_square) if second_square else float("inf"),
    }
