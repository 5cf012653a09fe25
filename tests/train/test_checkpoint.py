"""Checkpoints on gloo ranks: whatever layout wrote one, another continues it; damage is found; others are refused."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS, committed, forget_others, full_weights, refuse_other
from ultralong_ray.train.checkpoint_files import MANIFEST_FILE, Damaged, Manifest, damage_of
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.types import UserError

# One run of six steps, checkpointed every other one, continued from step 2 and again from step 4 in other layouts.
UNBROKEN = {"zero_stage": 3, "cluster": {"num_workers": 4}, "sequence_parallel_degree": 4}
# (ranks, degree, ZeRO stage) of steps 1-2, 3-4 and 5-6
CHAINS = {
    "4-2-4 ranks": [(4, 4, 3), (2, 2, 3), (4, 4, 3)],
    "degrees and stages": [(4, 2, 1), (2, 1, 2), (1, 1, 0)],
    "back from one": [(1, 1, 3), (2, 2, 0), (4, 4, 1)],
}


def train_to(folder: Path, stage: str, last_step: int, changes: dict[str, Any]) -> int:
    """Run the job of `stage` as if it were killed after `last_step`; the step it started from."""
    import torch

    from ultralong_ray.train.loop import run

    class Killed(Exception):
        pass

    def report(metrics: dict[str, Any]) -> None:
        if metrics["step"] == last_step < 6:
            raise Killed

    task = job(folder, stage, **changes)
    try:
        return run(task, torch.device("cpu"), report)
    except Killed:
        return -1


def layout(ranks: int, degree: int, zero_stage: int) -> dict[str, Any]:
    return {"zero_stage": zero_stage, "cluster": {"num_workers": ranks}, "sequence_parallel_degree": degree}


def weights_of(stage: Location) -> dict[str, np.ndarray]:
    root = stage / CHECKPOINTS
    return {name: tensor.numpy() for name, tensor in full_weights(root / committed(root)[0])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and stage `unbroken`: six steps at degree 4."""
    made = tmp_path_factory.mktemp("checkpoint")
    write_inputs(made)
    assert run_distributed(train_to, 4, made, "unbroken", 6, UNBROKEN) == [0] * 4
    return made


@pytest.mark.parametrize("name", CHAINS)
def test_other_ranks_degrees_and_stages_continue_the_run(folder: Path, name: str) -> None:
    started = []
    for (ranks, degree, zero_stage), last_step in zip(CHAINS[name], (2, 4, 6), strict=True):
        stage = name.replace(" ", "-")
        started.append(run_distributed(train_to, ranks, folder, stage, last_step, layout(ranks, degree, zero_stage)))
    assert started[-1] == [4] * CHAINS[name][-1][0]
    expected, found = (read_metrics(Location.of(folder / s)) for s in ("unbroken", stage))
    assert [record.step for record in found] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert (one.learning_rate, one.tokens, one.epoch, one.sequence) == (
            (other.learning_rate, other.tokens, other.epoch, other.sequence)
        )
    assert found[-1].loss < found[0].loss - 0.3
    wanted, have = weights_of(Location.of(folder / "unbroken")), weights_of(Location.of(folder / stage))
    assert wanted.keys() == have.keys()
    assert all(np.allclose(wanted[key], have[key], atol=1e-4) for key in wanted)
    assert [event["event"] for event in read_events(Location.of(folder / stage))] == [
        *("start", "checkpoint", "resume", "checkpoint", "resume", "checkpoint", "end")
    ]
