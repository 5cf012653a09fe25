"""A stand-in for DeepSpeed's engine in this process: a module and AdamW, as at ZeRO stage 0, in a world of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint_files import Manifest
from ultralong_ray.train.checkpoint_write import CheckpointWriter, Saved, Snapshot
from ultralong_ray.train.partition import KINDS, parts_of
from ultralong_ray.train.snapshot import HostCopy


@contextlib.contextmanager
def world_of_one(folder: Path) -> Iterator[None]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def made_engine(width: int = 9) -> Any:
    """Three parameters whose state differs everywhere."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, 5, bias=False))
    engine = SimpleNamespace(module=module, device=torch.device("cpu"))
    engine.optimizer = torch.optim.AdamW(module.parameters(), fused=False)
    engine.optimizer.defaults["fused"] = False
    step(engine)
    return engine


def step(engine: Any) -> None:
    """Change weights, moments and the random state."""
    engine.module(torch.randn(3, engine.module[0].in_features)).square().sum().backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


def state_of(engine: Any) -> dict[str, torch.Tensor]:
    return {f"{part.name} {kind}": part.get(kind).clone() for part in parts_of(engine) for kind in KINDS}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def writer_of(
    engine: Any, root: Location, snapshot: Snapshot = "memory", local: Path | None = None
) -> tuple[CheckpointWriter, list[Saved]]:
    """A writer, and the list that what it commits goes to."""
    saved: list[Saved] = []
    return CheckpointWriter(engine, root, snapshot, local, saved.append, lambda: None), saved


def save(writer: CheckpointWriter, step: int) -> None:
    """Take, write and commit."""
    writer.take(about(step))
    writer.start()
    writer.wait()


def about(step: int) -> Manifest:
    return Manifest(step, {"seed": 1}, {"world_size": 1}, {"epoch": 0, "sequence": step})


def save_as_ranks(engine: Any, root: Location, step: int, ranks: int) -> str:
    """A checkpoint as `ranks` ranks of this engine would write it; its folder's name."""
    attempt, writers = "", []
    for rank in reversed(range(ranks)):
        writer, _ = writer_of(engine, root)
        attempt = attempt or writer.attempt
        writer.rank, writer.world_size, writer.attempt = rank, ranks, attempt
        writer.copy = HostCopy(sum(part.numel for part in writer._shares()) * len(KINDS), engine.device)
        torch.rand(1)  # every rank has random states of its own
        writer.take(about(step))
        writer.start()
        writers.append(writer)
    for writer in writers:
        assert writer.pending is not None
        writer.pending.done.wait()
        assert writer.pending.error is None
    return f"step-{step:08d}-{attempt}"
