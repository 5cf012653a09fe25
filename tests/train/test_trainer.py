"""Training on a real Ray: an interrupted run continues from its checkpoint on re-submission and ends in a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from tests.train.made_jobs import NUM_SEQUENCES, job, recipe, write_inputs
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train import checkpoint, trainer
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.trainer import train
from ultralong_ray.types import LayerKeep, TrainPlan, UserError

NODE = {"Alive": True, "Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 2**40, "CPU": 64.0}}
ROOT = Path(__file__).resolve().parents[2]


def test_the_cluster_says_its_gpu_and_its_smallest_host(monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = {**NODE, "Resources": {**NODE["Resources"], "memory": 2**39, "object_store_memory": 2**38}}
    head = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 2**34}}
    gone = {"Alive": False, "Resources": {"GPU": 8.0, "accelerator_type:A100": 1.0, "memory": 1}}
    monkeypatch.setattr(ray, "nodes", lambda: [NODE, smaller, head, gone])
    assert trainer._found_on_cluster() == ("H100", 768.0)
    other = {**NODE, "Resources": {"GPU": 8.0, "accelerator_type:H200": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [NODE, other])
    assert trainer._found_on_cluster() == (None, None)


def test_a_layout_given_to_the_last_field_is_tried_against_the_prediction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_inputs(tmp_path)
    where = Location.of(tmp_path)
    monkeypatch.setattr(trainer, "_found_on_cluster", lambda: ("H100", 0.001))  # no host holds even the process
    workers = {"num_workers": 2, "gpus_per_worker": 1}
    with pytest.raises(UserError, match="of host memory per node"):
        trainer._plan(recipe(tmp_path, cluster=workers), "pretrain", where / "model", where)
    fields: dict[str, Any] = {
        "ulysses_degree": 2,
        "ring_degree": 1,
        "keep_inputs": "host",
        "keep_attention": "host",
        "keep_attention_rows": 0.5,
        "offload_optimizer": False,
        "mlp_tile_tokens": 16,
        "loss_tile_tokens": 8,
    }
    given = recipe(tmp_path, cluster=workers, sequence_parallel_degree=2, **fields)
    plan = trainer._plan(given, "pretrain", where / "model", where)
    assert plan == TrainPlan(2, 1, (LayerKeep("host", "host", 0.5),) * 2, 16, 8, False)
    assert "host memory per node" in (where / "plan.json").read_json()["refused"]


def test_what_a_killed_save_left_is_no_part_of_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    task, left = job(tmp_path, "pretrain-abc"), tmp_path / "pretrain-abc" / "model"
    (task.stage / "checkpoints" / "step-00000006-1f0c2a" / "manifest.json").write_bytes(b"{}")
    monkeypatch.setattr(checkpoint, "full_weights", lambda folder: iter([("w", torch.zeros(2))]))
    for name in ("tmp1a2b3c/model.safetensors", "model.safetensors.0a1b2c3d.tmp"):
        Location.of(left / name).write_bytes(b"half")
    trainer._consolidate(task)
    assert sorted(path.name for path in left.iterdir()) == ["config.json", "model.safetensors"]


def test_the_log_says_that_a_warm_up_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_inputs(tmp_path)
    trainer._warn_of_warmup(job(tmp_path, "pretrain-abc", warmup_steps=6))
    assert not caplog.records
    trainer._warn_of_warmup(job(tmp_path, "pretrain-abc", warmup_steps=12))
    assert "pretrain.warmup_steps 12 is more than the 6 steps: the learning rate ends at 0.005" in caplog.text


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    environment = {"env_vars": {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}}
    ray.init(address="local", num_cpus=3, include_dashboard=False, runtime_env=environment)
    yield
    ray.shutdown()


def test_what_stops_the_last_task_is_told_without_a_traceback(cluster: None, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with pytest.raises(UserError) as refusal:
        trainer._join(job(tmp_path, "pretrain-abc"))
    assert str(refusal.value).startswith(f"{tmp_path}/pretrain-abc/checkpoints: training ended without a checkpoint")
    assert type(refusal.value) is UserError


def test_an_interrupted_run_continues_and_a_finished_one_loads(cluster: None, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    where = Location.of(tmp_path)
    stage = StageDirectory("pretrain", "abc", where / "pretrain-abc")
    workers = {"num_workers": 2, "max_failures": 0}
    task = recipe(tmp_path, cluster=workers, sequence_parallel_degree=2)
    manifest = Location.of(tmp_path / "packed" / "manifest.json")
    described = manifest.read_json()
    manifest.write_json({**described, "files": [{**described["files"][0], "num_sequences": 8}]})
    with pytest.raises(UserError, match="names no file for sequence 8"):  # step 5 reads sequences 8 and 9
        train(task, "pretrain", where / "packed", where / "model", stage)
    assert [record.step for record in read_metrics(stage.location)] == [1, 2, 3, 4]
    manifest.write_json(described)
    summary = train(task, "pretrain", where / "packed", where / "model", stage)
    assert summary["resumed_from_step"] == 4 and summary["steps"] == NUM_SEQUENCES // 2
    assert summary["tokens"] == NUM_SEQUENCES * 32
    assert summary["last_loss"] < summary["first_loss"]
    written = (stage.location / "plan.json").read_json()
    assert written["plan"]["ulysses_degree"] == 2 and len(written["plan"]["keep"]) == 2
    assert [record.step for record in read_metrics(stage.location)] == [1, 2, 3, 4, 5, 6]
    events = read_events(stage.location)
    assert [event["event"] for event in events if event["event"] != "failure"] == [
        *("submit", "start", "checkpoint", "checkpoint", "breakdown", "stop"),
        *("submit", "resume", "checkpoint", "end"),
    ]
    first_failure = next(event for event in events if event["event"] == "failure")
    assert first_failure["rank"] in (0, 1) and "names no file for sequence 8" in first_failure["cause"]
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(os.fspath(tmp_path / "pretrain-abc" / "model"))
    assert trained.num_parameters() == 19424
