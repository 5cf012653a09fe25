"""The loop on one gloo rank: resuming changes nothing, weights come out whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS, committed, full_weights
from ultralong_ray.train.metrics import read_metrics

STAGES = [
    ("stage0", {"zero_stage": 0}),
    ("stage1", {"zero_stage": 1}),
    ("stage2", {"zero_stage": 2}),
    ("stage3", {"zero_stage": 3}),
    ("stage0-bfloat16", {"zero_stage": 0, "precision": "bfloat16"}),
    ("stage2-bfloat16", {"zero_stage": 2, "precision": "bfloat16"}),
    ("stage3-bfloat16", {"zero_stage": 3, "precision": "bfloat16"}),
]


def straight_and_resumed(folder: Path) -> dict[str, dict[str, Any]]:
    """Each stage: six steps in one go, then steps 5 and 6 again from the checkpoint of step 4."""
    import torch

    from ultralong_ray.train.loop import run

    found = {}
    for stage, changes in STAGES:
        task = job(folder, stage, **changes)
        root = task.stage / CHECKPOINTS
        entry = found.setdefault(stage, {})
        for how in ("straight", "resumed"):
            start = run(task, torch.device("cpu"), lambda metrics: None)
            newest = committed(root)[0]
            weights = {name: tensor.numpy().copy() for name, tensor in full_weights(root / newest)}
            entry[how] = (start, read_metrics(task.stage), weights)
            (root / newest).delete_dir()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("loop")
    write_inputs(folder)
    return run_distributed(straight_and_resumed, 1, folder)[0]


@pytest.mark.parametrize("name", [name for name, _ in STAGES])
def test_a_resumed_run_continues_identically(runs: dict[str, dict[str, Any]], name: str) -> None:
    started, straight, weights = runs[name]["straight"]
    resumed_at, resumed, resumed_weights = runs[name]["resumed"]
    assert (started, resumed_at) == (0, 4)
    assert [record.step for record in resumed] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(straight, resumed, strict=True):
        assert (one.loss, one.grad_norm, one.learning_rate) == (other.loss, other.grad_norm, other.learning_rate)
        assert (one.tokens, one.epoch, one.sequence) == (other.tokens, other.epoch, other.sequence)
    assert weights.keys() == resumed_weights.keys()
    assert all(np.array_equal(weights[key], resumed_weights[key]) for key in weights)


@pytest.mark.parametrize("name", [name for name, _ in STAGES])
def test_every_stage_and_precision_trains_alike(runs: dict[str, dict[str, Any]], name: str) -> None:
    _, straight, weights = runs[name]["straight"]
    _, expected, expected_weights = runs["stage0"]["straight"]
    # the head of a random model sees float32 and bfloat16 alike to three digits; six steps of Adam spread them
    relative = 5e-6 if "bfloat16" not in name else 0.02
    assert [r.loss for r in straight] == pytest.approx([r.loss for r in expected], rel=relative)
    assert [r.grad_norm for r in straight] == pytest.approx([r.grad_norm for r in expected], rel=relative * 5)
    assert straight[-1].loss < straight[0].loss - 0.3
    assert sorted(weights) == sorted(expected_weights)
    assert "model.layers.0.self_attn.q_proj.weight" in weights and "lm_head.weight" in weights


FAR = [1_048_575, 4_194_303]  # positions


def build_rotary(folder: Path) -> tuple[str, list[float], list[list[float]]]:
    import torch

    from ultralong_ray.train.loop import Trainer

    trainer = Trainer(job(folder, "rotary", zero_stage=3, precision="bfloat16"), torch.device("cpu"))
    module: Any = trainer.engine.module
    rotary = module.causal_lm.model.rotary_emb
    _, sin = rotary(torch.zeros(1), position_ids=torch.tensor([FAR]))  # [1, 2, head_dim]
    return str(rotary.inv_freq.dtype), rotary.inv_freq.tolist(), sin[0, :, :4].tolist()


def test_rope_stays_exact_in_a_bfloat16_model_under_zero3(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    config = Location.of(tmp_path / "model" / "config.json")
    config.write_json({**config.read_json(), "rotary_angles": "exact"})
    dtype, frequencies, far_sin = run_distributed(build_rotary, 1, tmp_path)[0]
    exact = [10000.0 ** (-i / 4) for i in range(4)]
    assert dtype == "torch.float32"
    assert frequencies == pytest.approx(exact, rel=1e-6)
    for position, row in zip(FAR, far_sin, strict=True):
        assert row == pytest.approx([math.sin(position * frequency) for frequency in exact], abs=1e-6)
