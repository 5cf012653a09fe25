"""Whoever starts a process with a GPU starts it with expandable segments, as the planner reckons."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from tests.train.made_jobs import job, write_inputs
from ultralong_ray.benchmark import launch
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval import fanout, sharded_group
from ultralong_ray.parallel.allocator import VARIABLES, allocator_environment
from ultralong_ray.storage import Location
from ultralong_ray.train import trainer
from ultralong_ray.train.controller import BreakdownRecorder

EXPECTED = {"env_vars": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_what_the_environment_says_counts() -> None:
    assert allocator_environment({}) == EXPECTED["env_vars"]
    given = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "HOME": "/root"}
    assert allocator_environment(given) == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}


@pytest.mark.parametrize("gpus", [0, 1])
def test_training_workers(gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    made = job(tmp_path, "run", cluster={"gpus_per_worker": gpus})
    built = trainer._trainer(made, BreakdownRecorder(made.stage, 0, lambda step: [], made.driver), ())
    assert built.run_config.worker_runtime_env == (EXPECTED if gpus else {})


class _Asked(Exception):
    """With the options of an actor that was about to be made."""


def _refuse(**options: Any) -> Any:
    raise _Asked(options.get("runtime_env"))


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("kind", ["in_process", "sharded"])
def test_evaluation_workers(gpus: int, kind: str, tmp_path: Path, tiny_llama: Path, monkeypatch: Any) -> None:
    engine = {"kind": "sharded", "degree": 2} if kind == "sharded" else {"kind": "in_process"}
    config = EvaluateConfig.model_validate({"context_lengths": [64], "gpus_per_task": gpus, "engine": engine})
    room: Any = SimpleNamespace(wait=lambda seconds: True)
    monkeypatch.setattr(fanout, "_REMOTE_WORKER", SimpleNamespace(options=_refuse))
    monkeypatch.setattr(ray, "remote", lambda _: SimpleNamespace(options=_refuse))
    monkeypatch.setattr(sharded_group, "PlacementGroupSchedulingStrategy", lambda *_: None)
    with pytest.raises(_Asked) as asked:
        if kind == "sharded":
            sharded_group.ShardedGroup(config, tiny_llama, room)
        fanout._Pool(fanout._Inputs(config, {}, None, Location.of(tmp_path), {}), fanout.deque())._new_worker()
    assert asked.value.args[0] == (EXPECTED if gpus else None)


def test_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "environ", {})
    launch.set_environment("cuda")
    assert launch.os.environ == EXPECTED["env_vars"]
