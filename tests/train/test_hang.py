"""A rank that stands still is named with its stack, all ranks end."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.train.made_jobs import job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train import watchdog
from ultralong_ray.train.events import read_events


def rank_that_may_stop(rank: int, folder: Path, port: int, how: str) -> None:
    """The loop on two ranks, of which rank 1 waits for a signal, or is stopped as by SIGSTOP, before step 4."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ULTRALONG_RAY_NODE": "n1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from ultralong_ray.train import loop

    set_rate = loop.set_learning_rate

    def sleepy(engine: Any, rate: float) -> None:
        if rank == 1 and engine.global_steps == 3:
            signal.pause() if how == "waits" else os.kill(os.getpid(), signal.SIGSTOP)
        set_rate(engine, rate)

    loop.set_learning_rate = sleepy
    task = job(folder, "hung", cluster={"num_workers": 2}, sequence_parallel_degree=2, hang_timeout_seconds=4)
    loop.run(task, torch.device("cpu"), lambda metrics: None)


@pytest.mark.parametrize("how", ["waits", "is stopped"])
def test_a_rank_that_stands_still_is_named_and_all_processes_end(tmp_path: Path, how: str) -> None:
    write_inputs(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("spawn")
    processes = [context.Process(target=rank_that_may_stop, args=(rank, tmp_path, port, how)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    last = watchdog.HUNG_STATUS if how == "waits" else -signal.SIGKILL
    assert [process.exitcode for process in processes] == [watchdog.HUNG_STATUS, last]
    stage = Location.of(tmp_path / "hung")
    (failure,) = [event for event in read_events(stage) if event["event"] == "failure"]
    assert (failure["rank"], failure["node"], failure["step"], failure["kind"]) == (1, "n1", 4, "hung")
    if how == "is stopped":
        assert "rank 1 gives no sign though its host answers" in failure["cause"]
        return
    assert "sleepy" in failure["cause"] and "others wait" in failure["cause"]
    stacks = (Location.of(failure["stacks"]) / "rank-00001.txt").read_bytes().decode()
    assert "sleepy" in stacks and "Thread" in stacks


@pytest.mark.parametrize("timeout", [None, 7.0])
def test_the_time_allowed_follows_the_steps(tmp_path: Path, timeout: float | None) -> None:
    watch = object.__new__(watchdog.Watchdog)
    watch.timeout_seconds, watch._seconds, watch._phase, watch._since = timeout, [], "its first step", 0.0
    watch.first_seconds = 9000.0
    watch.beat(1)
    assert watch._limit_seconds == (timeout or 9000.0), "there is no median yet"
    watch._seconds = [60.0, 62.0, 400.0]
    watch._phase = "elsewhere"
    watch.beat(2)
    assert (watch._step, watch._phase, watch._limit_seconds) == (3, "the step", timeout or 620.0)
    watch.allow("a checkpoint", 50.0)
    assert len(watch._seconds) == 4 and watch._limit_seconds == 50.0
