"""Fresh processes, one per GPU, that form a process group, run one module and leave their answers as JSON.

Flows in: the name of a module with a function `run`, and its argument. Flows out: what it returned on each rank. Every
contestant gets processes of its own: peers patch libraries for a whole process, and only an ended process gives all its
memory back. The module is imported by the children alone, so the parent never touches a GPU.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ultralong_ray.parallel.allocator import allocator_environment
from ultralong_ray.types import UserError

POLL_SECONDS = 0.1
LEAST_TIMEOUT_SECONDS = 600.0  # of a collective: torch's own for NCCL
ERROR_LINES = 12  # of a traceback that go into the record


class Unavailable(Exception):
    """A contestant cannot run here; the message says why."""


class RunFailed(Exception):
    """A contestant's process failed; the message says what the first of its ranks said."""


def run_ranks(
    module: str, num_ranks: int, device: str, argument: Any, seconds: float, ranks_per_gpu: int = 1
) -> list[Any]:
    """`module.run(argument, torch device)` on every rank of a new process group; the JSON-ready answers by rank.

    With more than one rank per GPU, rank r computes on GPU r % GPUs, and results are right while times mean nothing.
    Raises Unavailable when it said so, RunFailed for any other error or after `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        set_environment(device)
        context = multiprocessing.get_context("spawn")
        # this process keeps the store in which the ranks meet, at a port that nobody else can have by now
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        processes = [
            context.Process(target=_rank, args=(module, argument, device, place, store.port, folder, seconds))
            for place in (Place(rank, num_ranks, num_ranks // ranks_per_gpu) for rank in range(num_ranks))
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, Path(folder), seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [json.loads((Path(folder) / f"answer-{rank}.json").read_text()) for rank in range(num_ranks)]


def _wait(processes: list[Any], folder: Path, seconds: float) -> None:
    """Until every process ended well. The first that fails ends the wait: the others hang in a collective."""
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        if time.monotonic() > deadline:
            raise RunFailed(f"not done after {seconds:.0f} s")
        time.sleep(POLL_SECONDS)
    time.sleep(POLL_SECONDS)
    errors = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime)
    if errors:
        error = json.loads(errors[0].read_text())
        raise (Unavailable if error["kind"] == "Unavailable" else RunFailed)(error["message"])
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RunFailed(f"processes ended with {codes} (negative: the signal that killed them)")


def set_environment(device: str) -> None:
    """What the children inherit: torch and DeepSpeed read these when they are imported."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        os.environ |= allocator_environment()


def group_timeout(seconds: float) -> timedelta:
    """Of the collectives of a command that may last `seconds`: none ends it sooner. NCCL counts from the queueing, and
    a long step is queued as a whole before the GPU has begun."""
    return timedelta(seconds=max(seconds, LEAST_TIMEOUT_SECONDS))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among the others. Every `num_gpus` ranks are a host of their own to NCCL 2.28, which lets
    no two ranks of one host share a GPU; such hosts speak over the loopback interface."""

    rank: int
    num_ranks: int
    num_gpus: int

    @property
    def gpu(self) -> int:
        return self.rank % self.num_gpus

    @property
    def environment(self) -> dict[str, str]:
        """What torch, DeepSpeed and NCCL read."""
        found = {"RANK": str(self.rank), "WORLD_SIZE": str(self.num_ranks)}
        found |= {"LOCAL_RANK": str(self.gpu), "LOCAL_WORLD_SIZE": str(self.num_gpus)}
        if self.num_gpus < self.num_ranks:
            found |= {"NCCL_HOSTID": f"share-{self.rank // self.num_gpus}", "NCCL_SOCKET_IFNAME": "lo"}
        return found


def _rank(module: str, argument: Any, device_type: str, place: Place, port: int, folder: str, seconds: float) -> None:
    rank, num_ranks, gpu = place.rank, place.num_ranks, place.gpu
    os.environ |= {**place.environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        device = torch.device("cpu")
        if device_type == "cuda":
            if gpu >= torch.cuda.device_count():
                raise UserError(f"rank {rank} has no GPU, torch sees {torch.cuda.device_count()} here; --device cpu?")
            device = torch.device("cuda", gpu)
            torch.cuda.set_device(device)
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))  # an optimizer on the host uses them
        else:
            torch.set_num_threads(1)
        store = TCPStore("127.0.0.1", port, is_master=False)
        backend, timeout = "nccl" if device_type == "cuda" else "gloo", group_timeout(seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
        answer = importlib.import_module(module).run(argument, device)
        answer["device"] = torch.cuda.get_device_name(device) if device_type == "cuda" else "cpu"
        (Path(folder) / f"answer-{rank}.json").write_text(json.dumps(answer))
        gc.collect()
        dist.barrier()
    except BaseException as error:
        (Path(folder) / f"error-{rank}.json").write_text(json.dumps(_described(error, rank)))
        os._exit(1)  # the other ranks wait in a collective that this one will never enter
    # No tidy end: communicators need minutes to be taken down at times, and everything is on disk.
    os._exit(0)


def _described(error: BaseException, rank: int) -> dict[str, str]:
    if isinstance(error, Unavailable | UserError):
        return {"kind": type(error).__name__, "message": str(error)}
    if isinstance(error, torch.OutOfMemoryError):
        return {"kind": "OutOfMemory", "message": f"rank {rank} is out of GPU memory: {error}"}
    return {"kind": type(error).__name__, "message": "\n".join(traceback.format_exc().splitlines()[-ERROR_LINES:])}
