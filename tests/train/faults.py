"""Faults in the midst of a step of a run on Ray, and a gate that it stands at until it is killed, for small_driver.py.

Flows in: {"rank": 1, "step": 3, "kinds": ["error", null]}, where the kind is that of the attempt (the last one of those
that follow), and the config of a rank. Flows out: what the rank's own function returns, or the failure, once the step
before is committed (checkpoint_every_steps must be 1).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralong_ray.train.events import read_events
from ultralong_ray.train.failures import last_committed_step


def rank(fault: dict[str, Any], config: dict[str, Any]) -> int | None:
    """One rank, which fails as `fault` says."""
    import torch.distributed as dist

    stage = config["job"].stage
    begun = sum(event["event"] in ("start", "resume") for event in read_events(stage))
    kind = fault["kinds"][min(begun, len(fault["kinds"]) - 1)]

    def faulty(step: int) -> None:
        if kind is not None and dist.get_rank() == fault["rank"] and step == fault["step"]:
            while last_committed_step(read_events(stage)) < step - 1:  # it is written beside this step
                time.sleep(0.05)
            fail(kind)

    return _rank_with(faulty, config)


def gated_rank(gate: str, config: dict[str, Any]) -> int | None:
    """One rank, which takes no step beyond the one that stands in the file `gate`, and while there is a file
    `gate`.uploads seals no checkpoint whose files it has written."""
    from ultralong_ray.train import checkpoint_write

    file, uploads, write_file = Path(gate), Path(f"{gate}.uploads"), checkpoint_write.write_file

    def wait(step: int) -> None:
        while int(file.read_text()) < step:
            time.sleep(0.02)

    def held(*arguments: Any) -> Any:
        written = write_file(*arguments)
        while threading.current_thread().name == "checkpoint" and uploads.exists():
            time.sleep(0.02)
        return written

    checkpoint_write.write_file = held
    try:
        return _rank_with(wait, config)
    finally:
        checkpoint_write.write_file = write_file


def open_gate(gate: Path, step: int) -> None:
    """Let ranks go on to `step`."""
    new = gate.with_suffix(".new")
    new.write_text(str(step))
    new.rename(gate)


def _rank_with(before_step: Callable[[int], None], config: dict[str, Any]) -> int | None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported
    from ultralong_ray.train import loop, trainer

    learning_rate = loop.learning_rate

    def patched(train: Any, step: int, num_steps: int) -> float:
        before_step(step)
        return learning_rate(train, step, num_steps)

    loop.learning_rate = patched
    try:
        return trainer._worker(config)
    finally:
        loop.learning_rate = learning_rate


def fail(kind: str) -> None:
    """Raise as `kind` says."""
    import torch

    if kind == "cuda memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "host memory":
        torch.empty(2**60, dtype=torch.uint8)
    raise ValueError("a bad token")
