"""A healthy step is never taken for a hang, however long it lasts: by the watchdog, nor by a collective's timeout."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, write_inputs
from ultralong_ray.flops import ModelShape, ledger
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.planner.hardware import peak_flops
from ultralong_ray.planner.plan import hardware_of, plan_training
from ultralong_ray.recipe import load_recipe
from ultralong_ray.train import trainer
from ultralong_ray.train.controller import BreakdownRecorder
from ultralong_ray.train.patience import LEAST_FIRST_STEP_SECONDS, collective_timeout, longest_step_seconds

WORKERS = {"num_workers": 4, "gpus_per_worker": 1, "peak_tflops_per_worker": 1e-12}
RECIPES = Path(__file__).resolve().parents[2] / "jobs" / "recipes"


@pytest.mark.parametrize("name", ["llama31_8b_1m", "llama31_8b_2m", "llama31_8b_4m"])
def test_the_planned_step_of_the_8b_recipes_is_no_hang(name: str) -> None:
    recipe = load_recipe(str(RECIPES / f"{name}.toml"), [])
    assert recipe.pretrain is not None and recipe.pretrain.hang_timeout_seconds is None
    planned = plan_training(recipe, "pretrain", hardware_of(recipe))
    assert planned.prediction is not None
    step_seconds = planned.prediction.step_seconds
    assert step_seconds > LEAST_FIRST_STEP_SECONDS, "else this says nothing"
    flops = planned.prediction.flops.model_flops_causal
    longest = longest_step_seconds(flops, recipe.cluster.num_workers, peak_flops(recipe.cluster.gpu, None))
    assert longest > 5 * step_seconds
    assert collective_timeout(longest).total_seconds() > longest, "the watchdog speaks first"


def test_without_a_known_peak_and_for_short_steps_it_is_half_an_hour() -> None:
    assert longest_step_seconds(1e30, 8, None) == longest_step_seconds(1.0, 8, 1e15) == LEAST_FIRST_STEP_SECONDS


def test_the_driver_reckons_with_the_fewest_workers_of_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.setattr(trainer, "_found_on_cluster", lambda: ("H100", 2048.0))
    made = job(tmp_path, "slow", global_batch_sequences=4, cluster=WORKERS)
    shape = ModelShape.from_config((made.model / "config.json").read_json())
    flops = 4 * ledger(shape, 32, made.plan).model_flops_causal  # four sequences a step
    assert trainer._longest_step_seconds(made) == pytest.approx(flops / (4 * 0.05))
    elastic = dataclasses.replace(made, plans={2: made.plan, 4: made.plan})
    assert trainer._longest_step_seconds(elastic) == pytest.approx(flops / (2 * 0.05))


def test_a_given_timeout_counts_and_reaches_every_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    made = dataclasses.replace(job(tmp_path, "long"), longest_step_seconds=20_000.0)
    assert made.first_step_seconds == 20_000.0
    assert job(tmp_path, "given", hang_timeout_seconds=900).first_step_seconds == 9000.0
    recorder = BreakdownRecorder(made.stage, 0, lambda step: [], made.driver)
    backend: Any = trainer._trainer(made, recorder, ()).backend_config
    assert backend.timeout_s == 20_600
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(dist, "new_group", lambda ranks, **named: asked.append(named))
    create_mesh(Topology(8, 0, 2, 2), timedelta(seconds=20_600))
    assert asked == [{"timeout": timedelta(seconds=20_600)}] * 8  # four Ulysses pairs, four rings


def timeouts(folder: Path) -> list[timedelta]:
    """Of this rank's groups: the mesh's, and the one in which DeepSpeed reduces gradients."""
    import torch
    from deepspeed.utils import groups

    from ultralong_ray.train.loop import Trainer

    made = job(folder, "groups", cluster={"num_workers": 2}, sequence_parallel_degree=2)
    trainer = Trainer(dataclasses.replace(made, longest_step_seconds=20_000.0), torch.device("cpu"))
    found: list[Any] = [trainer.mesh.ulysses, groups._get_data_parallel_group()]
    assert found[1] is not dist.group.WORLD
    given = [group._get_backend(torch.device("cpu")).options._timeout for group in found]
    trainer.close()
    return given


def test_no_group_of_a_training_keeps_the_default_timeout(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    assert run_distributed(timeouts, 2, tmp_path) == [[timedelta(seconds=20_600)] * 2] * 2
