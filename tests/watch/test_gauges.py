"""What a training rank shows, with Ray's gauges replaced by a list."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.made_jobs import job
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.storage import Location
from ultralong_ray.train import gauges
from ultralong_ray.train.events import record_event
from ultralong_ray.types import StepMetrics
from ultralong_ray.watch import metrics

STEP = StepMetrics(2, 6, 1.5, 0.5, 1e-3, 128, 64.0, 2.0, 4e12, 5e12, 6e12, None, 0.5, 0, 4)
CPU = torch.device("cpu")


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """(name without its prefix, values of the labels in order) -> value."""
    values: dict[tuple[str, ...], float] = {}

    def show(name: str, value: float, **labels: str) -> None:
        assert set(labels) == set(metrics.BY_NAME[name].labels)
        values[(name.removeprefix("ultralong_train_"), *(labels[key] for key in metrics.BY_NAME[name].labels))] = value

    monkeypatch.setattr(gauges, "show", show)
    return values


def test_rank_0_shows_all_and_others_their_memory(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    made = job(tmp_path, "stage")
    other = gauges.TrainGauges(made, Topology(2, 1, 2, 1), CPU, (0, 6))
    other.step(STEP, 0.1, None)
    other.committed(2)
    assert {key[0] for key in shown} == {"memory_gib"} and ("memory_gib", "pretrain", "1", "host") in shown
    rank0 = gauges.TrainGauges(made, Topology(2, 0, 2, 1), CPU, (0, 6))
    rank0.step(dataclasses.replace(STEP, checkpoint_seconds=1.0), 0.1, {"gemm": 1.0, "other": 0.5})
    rank0.committed(2)
    assert shown["checkpoint_step", "pretrain"] == 2
    assert shown["sequences", "pretrain"] == 4 and shown["planned_sequences", "pretrain"] == 12
    assert shown["time_left_seconds", "pretrain"] == 8.0
    assert shown["model_tflops_per_second", "pretrain"] == pytest.approx(1.0)
    assert shown["mfu_ratio", "pretrain", "measured"] > 0
    parts = {key[2]: value for key, value in shown.items() if key[0] == "step_part_seconds"}
    assert parts == {"data wait": 0.1, "gemm": 1.0, "other": pytest.approx(0.4), "checkpoint": 0.5}
    rank0.step(dataclasses.replace(STEP, mfu=0.4), 0.1, None)
    assert shown["mfu_ratio", "pretrain", "nominal"] == 0.4


def test_the_plan_is_shown_beside(tmp_path: Path, shown: dict[tuple[str, ...], float]) -> None:
    made = job(tmp_path, "stage")
    prediction = {"device_allocated_gib": 60.0, "host_rank_gib": 90.0, "step_parts_seconds": {"matrices": 3.0}}
    (made.stage / "plan.json").write_json({"prediction": prediction})
    gauges.TrainGauges(made, Topology(1, 0, 1, 1), CPU, (0, 6))
    assert shown["planned_memory_gib", "pretrain", "device"] == 60.0
    assert shown["step_part_seconds", "pretrain", "gemm", "predicted"] == 3.0


def test_a_failure_is_counted_by_its_first_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[dict[str, Any]] = []
    monkeypatch.setattr(gauges, "count", lambda name, **labels: counted.append(labels))
    stage = Location.of(tmp_path)
    gauges.count_failure(stage, "pretrain")
    record_event(stage, "failure", rank=1, node="a", cause="NotFinite: step 2: the loss")
    record_event(stage, "failure", rank=0, node="a", cause="RuntimeError: connection closed")
    record_event(stage, "failure", rank=None, node=None, cause="WorkerGroupError: workers failed")
    gauges.count_failure(stage, "pretrain")
    assert [labels["kind"] for labels in counted] == ["unknown", "NotFinite"]


def test_every_metric_has_a_name_with_its_unit_and_is_known() -> None:
    assert len(metrics.BY_NAME) == len(metrics.METRICS)
    for metric in metrics.METRICS:
        assert metric.name.startswith(("ultralong_train_", "ultralong_data_", "ultralong_eval_")) and metric.unit
    with pytest.raises(KeyError):
        metrics.show("ultralong_train_no_such_thing", 1.0)
