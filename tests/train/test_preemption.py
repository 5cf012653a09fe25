"""Asked to leave, a run saves the step in flight and continues from exactly there: by notice, SIGTERM and stop."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS, committed
from ultralong_ray.train.events import read_events
from ultralong_ray.train.failures import breakdowns_in_a_row, kind_of
from ultralong_ray.train.job import stop_file
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.notices import NONE, PREEMPTED, STOPPED, TERMINATED, Interrupted, cause_of
from ultralong_ray.train.preemption import stopped_by_sigterm

ROOT = Path(__file__).resolve().parents[2]
STEPS = 150
LAYOUT: dict[str, Any] = {"cluster": {"num_workers": 2}, "sequence_parallel_degree": 2, "checkpoint_every_steps": 1000}


def unbroken_and_asked(folder: Path) -> list[Any]:
    """On two ranks: a run to its end; one in which rank 1 alone is asked to leave in step 3, and its continuation."""
    import torch
    import torch.distributed as dist

    from ultralong_ray.train.loop import run

    found: list[Any] = [run(job(folder, "unbroken", **LAYOUT), torch.device("cpu"), lambda metrics: None)]
    asked, reports = [0], []

    def ask() -> int:
        asked[0] += 1
        return TERMINATED if dist.get_rank() == 1 and asked[0] == 3 else NONE

    try:
        run(job(folder, "asked", **LAYOUT), torch.device("cpu"), reports.append, ask)
    except Interrupted as interrupted:
        found.append([interrupted.notice, interrupted.step, str(interrupted)])
    found += [[report["step"] for report in reports]]
    return [*found, run(job(folder, "asked", **LAYOUT), torch.device("cpu"), lambda metrics: None)]


def test_a_notice_to_one_rank_is_obeyed_by_all_after_the_step_in_flight(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    words = "SIGTERM reached rank 1; step 3 is saved"
    assert run_distributed(unbroken_and_asked, 2, tmp_path) == [[0, [TERMINATED, 3, words], [3], 3]] * 2
    unbroken, asked = (Location.of(tmp_path / name) for name in ("unbroken", "asked"))
    records = read_metrics(asked)
    assert [(r.step, r.loss, r.grad_norm) for r in records] == [
        (r.step, r.loss, r.grad_norm) for r in read_metrics(unbroken)
    ]
    assert [r.checkpoint_seconds > 0 for r in records] == [False, False, True, False, False, True]
    events = read_events(asked)
    assert [event["event"] for event in events] == [
        *("start", "checkpoint", "interrupted", "resume", "checkpoint", "end")
    ]
    assert events[2]["cause"] == words and events[2]["step"] == 3 and events[3]["step"] == 3
    facts = {"seconds", "waited_seconds", "written_seconds", "uploaded_seconds", "num_bytes"}
    assert facts <= events[1].keys() and events[1]["num_bytes"] > 12 * 19424


def test_the_strongest_notice_counts_and_its_ranks_are_named() -> None:
    assert cause_of([NONE, TERMINATED, PREEMPTED, PREEMPTED]).endswith("will be taken away, to ranks 2, 3")
    assert cause_of([STOPPED, TERMINATED]).endswith("to rank 0")


def test_the_controller_gets_what_a_rank_raised_and_does_not_count_it() -> None:
    error = pickle.loads(pickle.dumps(Interrupted(PREEMPTED, 3, "drained")))
    assert (error.notice, error.step, str(error)) == (PREEMPTED, 3, "drained; step 3 is saved")
    assert kind_of(error) == "preempted"


@pytest.mark.parametrize(
    ("grace", "echo", "signals", "ends"), [(0.2, 60.0, 1, True), (600.0, 0.0, 2, True), (600.0, 600.0, 2, False)]
)
def test_sigterm_is_heard_once_and_kills_after_the_grace_or_a_second_one(
    grace: float, echo: float, signals: int, ends: bool
) -> None:
    program = (
        "import threading, time, sys; from ultralong_ray.train import preemption\n"
        "heard, grace, preemption.ECHO_SECONDS = threading.Event(), *map(float, sys.argv[1:])\n"
        "preemption._on_sigterm(heard, threading.Event(), grace)\n"
        "print('ready', flush=True)\n"
        "heard.wait(); print('heard', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(grace), str(echo)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        if signals == 2:  # with so short a grace the end may come before the word of it
            assert process.stdout.readline() == "heard\n"
            process.terminate()
        if ends:
            assert process.wait(PATIENCE_SECONDS) == -signal.SIGTERM
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)
        process.kill()


def test_a_drivers_sigterm_becomes_a_file_and_its_handler_comes_back(tmp_path: Path) -> None:
    stage, former = Location.of(tmp_path), signal.getsignal(signal.SIGTERM)
    mine, other = (stop_file(stage, driver) for driver in ("mine", "other"))
    with stopped_by_sigterm(mine, 2 * PATIENCE_SECONDS):
        assert not mine.exists()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(mine.exists, PATIENCE_SECONDS, "the request to stop")
        assert not other.exists(), "another submission of the stage is asked for nothing"
        (grace,) = (thread for thread in threading.enumerate() if thread.name == "grace")
    grace.join(PATIENCE_SECONDS)
    assert not grace.is_alive(), "the grace does not outlast the block"
    assert not mine.exists() and signal.getsignal(signal.SIGTERM) == former


def driver(folder: Path, name: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "300"  # the default of 60 s is short on a busy machine
    command = [sys.executable, "-m", "tests.train.run_train", str(folder), name, str(STEPS)]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
def test_sigterm_to_a_worker_and_to_the_driver_on_ray(tmp_path: Path) -> None:
    """One worker gets SIGTERM, then the driver; submitted again the run ends as one that nobody disturbed."""
    write_inputs(tmp_path)

    stage = Location.of(tmp_path / "asked")

    def until(condition: Callable[[], bool], what: str) -> None:
        log = tmp_path / "log.txt"
        wait_for(condition, PATIENCE_SECONDS, what, process=first, said=lambda: log.read_text()[-3000:])

    first = driver(tmp_path, "asked")
    until(lambda: len(read_metrics(stage)) > 3, "step 4")
    children = psutil.Process(first.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)
    until(lambda: any(event["event"] == "resume" for event in read_events(stage)), "the next attempt")
    events = [event for event in read_events(stage) if event["event"] in ("interrupted", "resume")]
    assert "SIGTERM reached rank" in events[0]["cause"] and events[0]["step"] == events[1]["step"] > 3
    assert breakdowns_in_a_row(read_events(stage)) == [], "asked to leave is no failure"
    until(lambda: len(read_metrics(stage)) > events[1]["step"] + 2, "three more steps")
    first.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
    last = read_events(stage)[-1]
    assert last["event"] == "interrupted" and "a stop of the whole run" in last["cause"]
    assert committed(stage / CHECKPOINTS)[0].startswith(f"step-{last['step']:08d}") and last["step"] < STEPS
    assert len(read_metrics(stage)) == last["step"]
    run_distributed(straight, 2, tmp_path)
    assert driver(tmp_path, "asked").wait(PATIENCE_SECONDS) == 0
    wanted, found = (read_metrics(Location.of(tmp_path / name)) for name in ("unbroken", "asked"))
    assert [(r.step, r.loss, r.grad_norm) for r in found] == [(r.step, r.loss, r.grad_norm) for r in wanted]
    assert [event["step"] for event in read_events(stage) if event["event"] == "resume"][1] == last["step"]


def straight(folder: Path) -> int:
    import torch

    from ultralong_ray.train.loop import run

    return run(job(folder, "unbroken", **{**LAYOUT, "steps": STEPS}), torch.device("cpu"), lambda metrics: None)
