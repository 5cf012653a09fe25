"""Checkpoints beside the steps under the watchdog, and of an attempt that was given up: on two gloo ranks."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

from tests.machine import PATIENCE_SECONDS
from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS, committed
from ultralong_ray.train.events import read_events, record_event
from ultralong_ray.train.failures import kind_of
from ultralong_ray.train.notices import NONE, Interrupted
from ultralong_ray.train.status import describe_run, restarts_of
from ultralong_ray.train.watchdog import LEAST_CHECKPOINT_SECONDS, checkpoint_seconds
from ultralong_ray.types import UserError

LAYOUT: dict[str, Any] = {"cluster": {"num_workers": 2}, "sequence_parallel_degree": 2}
SLOW_SECONDS = 5.0
HANG_SECONDS = 4.0  # of the step that waits for an upload; below SLOW_SECONDS


def slow_uploads(folder: Path) -> list[Any]:
    """A run whose uploads take longer than a step may, then one in which rank 1 cannot write and rank 0 is slow."""
    import torch
    import torch.distributed as dist

    from ultralong_ray.train import checkpoint_write, watchdog
    from ultralong_ray.train.loop import run

    beat = watchdog.Watchdog.beat

    def hurry(self: watchdog.Watchdog, step: int) -> None:
        beat(self, step)
        if step == 5:  # the steps that wait for nothing may take their time
            self._limit_seconds = HANG_SECONDS

    watchdog.Watchdog.beat = hurry
    write_file, broken = checkpoint_write.write_file, [False]

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name == "checkpoint":
            if broken[0] and dist.get_rank() == 1:
                raise ValueError("the cable is out")
            time.sleep(SLOW_SECONDS / 2)  # two files
        return write_file(*arguments)

    checkpoint_write.write_file = slow
    fields = {**LAYOUT, "hang_timeout_seconds": PATIENCE_SECONDS, "checkpoint_every_steps": 3}
    found: list[Any] = [run(job(folder, "slow", **fields), torch.device("cpu"), lambda metrics: None)]
    broken[0] = True
    try:
        run(job(folder, "broken", **fields), torch.device("cpu"), lambda metrics: None)
    except RuntimeError as error:
        found.append((str(error), error.__dict__["step_in_flight"]))
    return found


def test_the_watchdog_waits_for_uploads_that_take_longer_than_a_step_may(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for start, (words, step) in run_distributed(slow_uploads, 2, tmp_path):
        assert start == 0 and 3 < step <= 6
        assert words == "the checkpoint of step 3 could not be written by rank 1: ValueError('the cable is out')"
    events = read_events(Location.of(tmp_path / "slow"))
    assert [event["event"] for event in events] == ["start", "checkpoint", "checkpoint", "end"]
    assert (
        events[0]["start_seconds"].keys() == {"build", "preflight", "restore"}
        and events[0]["start_seconds"]["build"] > 0
    )
    assert all(event["uploaded_seconds"] > HANG_SECONDS for event in events[1:3])
    assert committed(Location.of(tmp_path / "broken") / CHECKPOINTS) == []


def test_a_large_checkpoint_may_take_longer() -> None:
    assert checkpoint_seconds(10**9) == LEAST_CHECKPOINT_SECONDS
    assert checkpoint_seconds(10**11) == 2 * 10**11 / 5e6


def errors_beside_uploads(folder: Path) -> list[str]:
    """Step 5 fails for want of its data while the files of step 4 are written; then again, and rank 1 never has its.

    The checkpoint of step 2 was committed before.
    """
    import torch
    import torch.distributed as dist

    from ultralong_ray.train import checkpoint_write
    from ultralong_ray.train.loop import run

    write_file, stuck = checkpoint_write.write_file, [False]

    def slow(target: Location, pieces: Any) -> Any:
        if "step-00000004" in target.uri:
            time.sleep(60.0 if stuck[0] and dist.get_rank() == 1 else 1.0)
        return write_file(target, pieces)

    checkpoint_write.write_file = slow
    said = []
    for name in ("slow", "stuck"):
        try:
            run(job(folder, name, **LAYOUT, checkpoint_every_steps=2), torch.device("cpu"), lambda metrics: None)
        except UserError as error:
            said.append(str(error))
        stuck[0], checkpoint_write.FINISH_SECONDS = True, 2.0
    return said


def test_an_error_does_not_cost_the_checkpoint_on_its_way(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    manifest = Location.of(tmp_path / "packed" / "manifest.json")
    described = manifest.read_json()
    manifest.write_json({**described, "files": [{**described["files"][0], "num_sequences": 8}]})
    for words in run_distributed(errors_beside_uploads, 2, tmp_path):
        assert len(words) == 2 and all("names no file for sequence 8" in text for text in words)
    for name, kept in (("slow", 4), ("stuck", 2)):
        (newest, *_) = committed(Location.of(tmp_path / name) / CHECKPOINTS)
        assert newest.startswith(f"step-{kept:08d}-")


def given_up(folder: Path, name: str, later: str | None) -> str:
    """Another attempt begins while this one is in step 3, as when Ray gave it up but its processes live on.

    `later`: the submission that the other attempt is of; None for the same.
    """
    import torch
    import torch.distributed as dist

    from ultralong_ray.train.loop import run

    task, asked = job(folder, name, **LAYOUT, checkpoint_every_steps=2, keep_checkpoints=1), [0]
    if dist.get_rank() == 0:
        record_event(task.stage, "submit", driver=task.driver)

    def another_begins() -> int:
        asked[0] += 1
        if dist.get_rank() == 0 and asked[0] == 3:
            while not any(event["event"] == "checkpoint" for event in read_events(task.stage)):
                time.sleep(0.01)
            (task.stage / CHECKPOINTS / "step-00000001-07e700" / "state-00000.bin").write_bytes(b"on its way")
            if later is not None:
                record_event(task.stage, "submit", driver=later)
            record_event(task.stage, "resume", step=2, attempt="another", nodes=["n2"], driver=later or task.driver)
        return NONE

    try:
        run(task, torch.device("cpu"), lambda metrics: None, another_begins)
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__}: {error}"
    return "it went on"


def test_an_attempt_that_was_given_up_neither_commits_nor_removes(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for words in run_distributed(given_up, 2, tmp_path, "given-up", None):
        assert (
            "checkpoint of step 4 could not be written by rank 0: Superseded(" in words
            and "another attempt began" in words
        )
    stage = Location.of(tmp_path / "given-up")
    (name,) = committed(stage / CHECKPOINTS)
    assert name.startswith("step-00000002-")
    assert (stage / CHECKPOINTS / "step-00000001-07e700" / "state-00000.bin").exists()
    assert [event["event"] for event in read_events(stage)] == ["submit", "start", "checkpoint", "resume"]


def test_a_later_submission_keeps_the_stage_and_the_earlier_is_told(tmp_path: Path) -> None:
    """The earlier one commits no more, and does not begin again."""
    write_inputs(tmp_path)
    for words in run_distributed(given_up, 2, tmp_path, "taken", "later"):
        assert words.startswith(
            "UserError: the checkpoint of step 4 could not be written by rank 0: another submission"
        )
    stage = Location.of(tmp_path / "taken")
    assert [name[:13] for name in committed(stage / CHECKPOINTS)] == ["step-00000002"]
    assert [event["event"] for event in read_events(stage)] == ["submit", "start", "checkpoint", "submit", "resume"]
    for words in run_distributed(again, 2, tmp_path, read_events(stage)[0]["driver"]):
        assert "another submission trains this stage" in words
    assert read_events(stage)[-1]["attempt"] == "another"


def again(folder: Path, driver: str) -> str:
    """The next attempt of the submission `driver`."""
    import torch

    from ultralong_ray.train.loop import run

    task = dataclasses.replace(job(folder, "taken", **LAYOUT), driver=driver)
    try:
        run(task, torch.device("cpu"), lambda metrics: None)
    except UserError as error:
        return str(error)
    return "it went on"


def test_an_asked_leave_is_told_and_a_breakdown_of_another_kind_too() -> None:
    interrupted = {"time": 2.0, "event": "interrupted", "step": 3, "cause": "SIGTERM reached rank 1; step 3 is saved"}
    start: dict[str, Any] = {"time": 1.0, "event": "start", "attempt": "a"}
    asked = {"time": 3.0, "event": "breakdown", "kind": kind_of(Interrupted(1, 3, "SIGTERM")), "cause": "Interrupted"}
    lost = {"time": 3.0, "event": "breakdown", "kind": "lost", "cause": "it died", "rank": 1, "node": "n1"}
    after = {"time": 4.0, "event": "resume", "attempt": "b", "step": 3}
    (line,) = restarts_of([start, interrupted, {**asked, "steps_lost": 0}, after])
    assert line.endswith("SIGTERM reached rank 1; step 3 is saved")
    (line,) = restarts_of([start, interrupted, {**lost, "steps_lost": 0}, after])
    assert line.endswith("SIGTERM reached rank 1; step 3 is saved; then rank 1 on n1: it died")


def test_the_state_after_an_asked_leave(tmp_path: Path) -> None:
    stage = Location.of(tmp_path / "pretrain-1")
    record_event(stage, "start", attempt="a", nodes=["n1"])
    record_event(stage, "interrupted", step=3, cause="SIGTERM reached rank 0; step 3 is saved")
    assert "ago: SIGTERM reached rank 0; step 3 is saved" in describe_run(stage)
