"""Training on a real Ray: an interrupted run continues from its checkpoint on re-submission and ends in a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tests.train.made_jobs import NUM_SEQUENCES, recipe, write_inputs
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.trainer import train
from ultralong_ray.types import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}})
    yield
    ray.shutdown()


def test_an_interrupted_run_continues_and_a_finished_one_loads(cluster: None, tmp_path: Path) -> None:
    pytest.importorskip("ultralong_ray.model.save")
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
    assert [record.step for record in read_metrics(stage.location)] == [1, 2, 3, 4, 5, 6]
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(os.fspath(tmp_path / "pretrain-abc" / "model"))
    assert trained.num_parameters() == 19424
