"""Faults in the midst of a step of a run on Ray, for small_driver.py.

Flows in: {"rank": 1, "step": 3, "kinds": ["error", null]}, where the kind is that of the attempt (the last one of those
that follow), and the config of a rank. Flows out: what the rank's own function returns, or the failure, once the step
before is committed (checkpoint_every_steps must be 1).
"""

from __future__ import annotations

import os
import time
from typing import Any


def rank(fault: dict[str, Any], config: dict[str, Any]) -> int | None:
    """One rank, which fails as `fault` says."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported
    import torch.distributed as dist

    from ultralong_ray.train import loop, trainer
    from ultralong_ray.train.events import read_events
    from ultralong_ray.train.failures import last_committed_step

    stage = config["job"].stage
    begun = sum(event["event"] in ("start", "resume") for event in read_events(stage))
    kind = fault["kinds"][min(begun, len(fault["kinds"]) - 1)]
    learning_rate = loop.learning_rate

    def faulty(train: Any, step: int, num_steps: int) -> float:
        if kind is not None and dist.get_rank() == fault["rank"] and step == fault["step"]:
            while last_committed_step(read_events(stage)) < step - 1:  # it is written beside this step
                time.sleep(0.05)
            fail(kind)
        return learning_rate(train, step, num_steps)

    loop.learning_rate = faulty
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
