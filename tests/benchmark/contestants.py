"""Modules with a `run` for the launcher's tests are named by path; this one does what its argument says."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.benchmark.launch import Unavailable


def run(argument: str, device: torch.device) -> dict[str, Any]:
    rank = dist.get_rank()
    if argument == "unavailable":
        raise Unavailable("the library is not installed")
    if argument == "rank 1 fails" and rank == 1:
        raise ValueError("no such luck")
    if argument == "hang":
        time.sleep(60)
    if argument == "timeout":
        backend: Any = dist.distributed_c10d._get_default_group()._get_backend(device)
        return {"seconds": backend.options._timeout.total_seconds()}
    if argument == "rank 1 fails":
        dist.barrier()  # rank 1 never comes
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    return {"rank": rank, "sum": total.item(), "device": device.type, "argument": argument}
