"""Checkpoints on the clock: what the training loop loses to them, how fast they are written and read. One rank's part.

Flows in: a Checkpoints. Flows out: seconds of steps without and with checkpoints, of every snapshot, upload and of one
load. The steps are the project's own training steps, and the checkpoints those of train/checkpoint_write.py.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from ultralong_ray.benchmark.measure import Work, peak_memory, progress, synchronize
from ultralong_ray.benchmark.ours import Ours
from ultralong_ray.benchmark.setups import Benchmark
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import forget_others, load_newest
from ultralong_ray.train.checkpoint_files import Manifest
from ultralong_ray.train.checkpoint_write import CheckpointWriter, Saved

KEPT = 1  # beside the one on its way: the disk of a lent machine is small


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A whole command: `benchmark.steps` steps without checkpoints, as many with one every `every`, as many without."""

    benchmark: Benchmark
    target: Location
    local: str | None
    snapshot: Literal["memory", "disk", "none"]
    every: int
    folder: str  # scratch, shared by the processes
    began: float  # time.time() of the command


def run(checkpoints: Checkpoints, device: torch.device) -> dict[str, Any]:
    """Every rank's part."""
    benchmark = checkpoints.benchmark
    work = Work(benchmark, benchmark.setups[0], "checkpoint", checkpoints.folder, checkpoints.began)
    began = time.perf_counter()
    ours = Ours(work, device)
    saved: list[Saved] = []

    def committed(found: Saved) -> None:
        saved.append(found)
        progress(work, f"committed {found}")
        forget_others(checkpoints.target, found.name, KEPT, None)

    local = None if checkpoints.local is None else Path(checkpoints.local)
    writer = CheckpointWriter(ours.engine, checkpoints.target, checkpoints.snapshot, local, committed, lambda: None)
    progress(work, f"ready after {time.perf_counter() - began:.1f} s, the snapshot's memory included")
    timed = _Timed(work, ours, writer, device)
    timed.steps(benchmark.warmup, None)
    before = timed.steps(benchmark.steps, None)
    blocked: list[float] = []
    during = timed.steps(benchmark.steps, checkpoints.every, blocked)
    writer.wait()
    after = timed.steps(benchmark.steps, None)
    began = time.perf_counter()
    restored = load_newest(ours.engine, checkpoints.target, {})
    assert restored is not None and not restored.passed_over
    progress(work, f"step {restored.step} loaded in {time.perf_counter() - began:.2f} s")
    return {
        "plain_seconds": [*before, *after],
        "checkpointing_seconds": during,
        "blocked_seconds": blocked,
        "load_seconds": time.perf_counter() - began,
        "saved": [dataclasses.asdict(found) for found in saved],
        **peak_memory(device),
    }


class _Timed:
    """Steps by number, each from one barrier to the next."""

    def __init__(self, work: Work, ours: Ours, writer: CheckpointWriter, device: torch.device) -> None:
        self.work, self.ours, self.writer, self.device = work, ours, writer, device
        self.step = 0

    def steps(self, count: int, every: int | None, blocked: list[float] | None = None) -> list[float]:
        """Seconds of `count` steps, with what a checkpoint after every `every`-th adds to them."""
        seconds = []
        for index in range(count):
            self.step += 1
            batch = self.ours.batch(self.step)
            synchronize(self.device)
            began = time.perf_counter()
            self.ours.step(batch)
            if every is not None and blocked is not None and (index + 1) % every == 0:
                layout = {"world_size": dist.get_world_size()}
                blocked.append(self.writer.take(Manifest(self.step, {}, layout, {})))
                self.writer.start()
            synchronize(self.device)
            seconds.append(time.perf_counter() - began)
            progress(self.work, f"step {self.step}: {seconds[-1]:.3f} s")
        return seconds
