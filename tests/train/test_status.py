"""What status says of runs whose records are made by hand: running, dead, restarted, done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.storage import Location
from ultralong_ray.train.events import EVENTS_FILE, read_events, record_event
from ultralong_ray.train.metrics import METRICS_FILE, _line
from ultralong_ray.train.status import LOST, describe_run, describe_stage, restarts_of
from ultralong_ray.types import StepMetrics, UserError

ROOT = Path(__file__).resolve().parents[2]


def metrics(step: int) -> StepMetrics:
    """Of 150 steps of 60 s, 1000 tokens/s."""
    return StepMetrics(step, 150, 2.5, 1.5, 1e-3, step, 1000.0, 60.0, 1e6, 2e6, 3e6, None, 0.5, 0, step)


def event(at_seconds: int, name: str, **facts: Any) -> dict[str, Any]:
    return {"time": float(at_seconds), "event": name, **facts}


def checkpoint(at_seconds: int, step: int) -> dict[str, Any]:
    return event(at_seconds, "checkpoint", step=step, checkpoint=f"step-{step:08d}-a", seconds=1.25)


def test_a_running_stage_says_progress_rate_time_left_and_checkpoint() -> None:
    events = [event(0, "start"), checkpoint(2400, 40)]
    text = describe_stage("pretrain-abc", [metrics(step) for step in range(1, 46)], events, 2710.0)
    assert text.splitlines() == [
        "pretrain-abc: running, or ended without an account; its last event, checkpoint, was 0:05:10 ago",
        "  step 45/150 (30%), loss 2.5000",
        "  1,000 tokens/s, 60.00 s a step, 1:45:00 of computing left",
        "  last checkpoint: step 40, 0:05:10 ago, written in 1.2 s, 5 steps since (step-00000040-a)",
        "  restarts: none",
    ]


def test_restarts_name_the_first_cause_and_lost_processes_as_such() -> None:
    resume = {"passed_over": []}
    events = [
        event(0, "start"),
        checkpoint(60, 10),
        event(90, "failure", rank=3, node="n1", cause="RuntimeError: NCCL"),
        event(91, "failure", rank=0, node="n0", cause="RuntimeError: connection closed"),
        event(100, "resume", step=10, **resume),
        checkpoint(160, 20),
        event(200, "resume", step=10, passed_over=["step-00000020-a: state-00000.bin is missing"]),
        event(300, "end", step=30),
    ]
    lines = restarts_of(events)
    assert lines == [
        "1970-01-01 00:01:40 UTC from step 10: rank 3 on n1: RuntimeError: NCCL",
        f"1970-01-01 00:03:20 UTC from step 10; step 20 was its last checkpoint: {LOST}; "
        "passed over step-00000020-a: state-00000.bin is missing",
    ]
    text = describe_stage("pretrain-abc", [], events, 360.0)
    assert text.startswith("pretrain-abc: done, 0:01:00 ago\n") and "  restarts: 2\n" in text


def test_a_stopped_stage_says_why() -> None:
    events = [
        event(0, "start"),
        event(50, "failure", rank=1, node="n0", cause="UserError: no space left"),
        event(60, "failure", rank=None, node=None, cause="TrainingFailedError: workers failed"),
    ]
    text = describe_stage("pretrain-abc", [], events, 3660.0)
    assert text.splitlines()[0] == "pretrain-abc: stopped 1:00:00 ago: rank 1 on n0: UserError: no space left"
    assert "last checkpoint: none" in text


def test_the_stages_of_a_workdir_are_found_and_a_half_written_event_is_left_out(tmp_path: Path) -> None:
    stage = Location.of(tmp_path / "pretrain-abc")
    record_event(stage, "start", layout={"world_size": 2})
    (stage / METRICS_FILE).write_bytes(_line(metrics(1)).encode())
    with (tmp_path / "pretrain-abc" / EVENTS_FILE).open("a") as sink:
        sink.write('{"event": "check')
    assert [found["event"] for found in read_events(stage)] == ["start"]
    assert "step 1/150" in describe_run(Location.of(tmp_path))
    assert describe_run(Location.of(tmp_path), 0.0) == describe_run(stage, 0.0)
    with pytest.raises(UserError, match="give a recipe's workdir"):
        describe_run(Location.of(tmp_path / "elsewhere"))


def test_the_script_prints_a_run_and_refuses_what_is_none(tmp_path: Path) -> None:
    record_event(Location.of(tmp_path / "sft-abc"), "start", layout={})

    def status(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "jobs" / "status.py"), str(folder)]
        return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})

    assert status(tmp_path).stdout.startswith("sft-abc: running")
    refused = status(tmp_path / "none")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr
