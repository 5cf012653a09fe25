"""The clock of every contestant: warm-up, timed steps, memory, progress. A step function in, JSON-ready numbers out."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.benchmark.gpu_state import GpuState
from ultralong_ray.benchmark.setups import Benchmark, Setup


@dataclass(frozen=True, slots=True)
class Work:
    """What a worker process is told."""

    benchmark: Benchmark
    setup: Setup
    contestant: str
    folder: str  # scratch, shared by the processes of all contestants
    began: float  # time.time() of the command


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """What a step reports beside its time."""

    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # before clipping


def progress(work: Work, text: str) -> None:
    """A line from rank 0, with the seconds since the command began."""
    if dist.get_rank() == 0:
        print(f"[{time.time() - work.began:7.1f} s] {work.contestant}: {text}", flush=True)


def measure(work: Work, device: torch.device, prepare: Callable[[int], Any], step: Callable[[Any], StepNumbers]) -> Any:
    """Run warm-up and timed steps. `prepare(index)` makes a step's batch outside of the clock.

    Returns a dict with seconds and losses of every step, warm-up first, and this rank's peak memory in GiB.
    """
    seconds, numbers = [], []
    reset_peak(device)
    total = work.benchmark.warmup + work.benchmark.steps
    states = []
    for index in range(total):
        batch = prepare(index)
        with GpuState(device) as state:
            synchronize(device)
            started = time.perf_counter()
            numbers.append(step(batch))
            synchronize(device)
            seconds.append(time.perf_counter() - started)
        states.append(state.medians)
        kind = "warm-up step" if index < work.benchmark.warmup else "step"
        progress(work, f"{kind} {index + 1} of {total}: {seconds[-1]:.3f} s, loss {numbers[-1].loss:.5f}")
    return {
        "warmup_seconds": seconds[: work.benchmark.warmup],
        "step_seconds": seconds[work.benchmark.warmup :],
        "losses": [number.loss for number in numbers],
        "grad_norms": [number.grad_norm for number in numbers],
        "gpu_while_timed": states[work.benchmark.warmup :],
        **peak_memory(device),
    }


def synchronize(device: torch.device) -> None:
    """All ranks' queues are empty."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def reset_peak(device: torch.device) -> None:
    """From now on is what `peak_memory` looks at, on the GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """GiB of this rank at its fullest: allocated and reserved on the GPU, resident in host memory (pinned included)."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    if device.type != "cuda":
        return {"peak_host_gib": resident}
    return {
        "peak_gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "peak_gpu_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        "peak_host_gib": resident,
    }
