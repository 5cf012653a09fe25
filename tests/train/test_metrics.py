"""metrics.jsonl after restarts, and what a step that must not count looks like."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ultralong_ray.storage import Location
from ultralong_ray.train.bad_steps import refuse_broken
from ultralong_ray.train.metrics import METRICS_FILE, MetricsWriter, log_line, read_metrics
from ultralong_ray.types import StepMetrics, UserError

NO_CHECKPOINTS = Location("/nowhere")


def record(step: int, loss: float = 2.0) -> StepMetrics:
    return StepMetrics(step, 9, loss, 1.5, 1e-3, step * 64, 32.0, 2.0, 1e6, 2e6, 3e6, None, 0.5, 0, step * 2)


def write(stage: Location, restored: int, steps: list[int], loss: float) -> None:
    writer = MetricsWriter(stage, restored, "pretrain")
    for step in steps:
        writer.write(record(step, loss))
    writer.close()


def test_lines_after_the_restored_step_are_replaced(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    write(stage, 0, [1, 2, 3, 4, 5], loss=2.0)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "num_st')  # killed while writing
    write(stage, 3, [4, 5, 6], loss=1.0)
    assert [(r.step, r.loss) for r in read_metrics(stage)] == [(1, 2), (2, 2), (3, 2), (4, 1), (5, 1), (6, 1)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_step_is_on_disk_before_the_writer_is_closed(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    writer = MetricsWriter(stage, 0, "pretrain")
    writer.write(record(1))
    assert read_metrics(stage) == [record(1)]
    writer.close()


def test_log_line_tells_the_time_left_from_the_median_step() -> None:
    line = log_line(record(3), [record(1), record(2), record(3)])
    assert "step 3/9" in line and "0:00:12 left" in line and "MFU" not in line


@pytest.mark.parametrize(
    ("sums", "norm", "words"),
    [
        ([[1.0, 2.0, 0.1], [math.nan, 2.0, 0.1]], 1.0, r"step 7: the loss on ranks \[1\] is not finite.*\[4, 9\]"),
        ([[1.0, 2.0, 0.1], [1.0, 2.0, 0.1]], math.inf, r"step 7: the gradient norm \(inf\) is not finite"),
        ([[0.0, 0.0, 0.1], [0.0, 0.0, 0.1]], 0.0, r"no token of sequences \[4, 9\] is a target"),
    ],
)
def test_a_broken_step_is_named(sums: list[list[float]], norm: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        refuse_broken(7, sums, norm, [4, 9], NO_CHECKPOINTS, "pretrain")
    refuse_broken(7, [[1.0, 2.0, 0.1], [0.0, 0.0, 0.1]], 1.0, [4, 9], NO_CHECKPOINTS, "pretrain")
