"""A whole training job in miniature: recipe, model folder and packed sequences in a temporary directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ultralong_ray.config import Recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.packed import PackedFile, PackedManifest, chunking, file_name, write_placements, write_sequences
from ultralong_ray.planner.plan import plan_training
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS, committed, full_weights
from ultralong_ray.train.job import TrainJob
from ultralong_ray.types import PackedSequence, Placement

VOCAB = 61
LENGTH = 32
NUM_SEQUENCES = 12
ARCHITECTURE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
}


def recipe(folder: Path, cluster: dict[str, Any] | None = None, init: str = "random", **pretrain: Any) -> Recipe:
    """A recipe of 6 steps of 2 sequences whose pretrain fields can be changed."""
    values = {
        "name": "tiny",
        "workdir": str(folder),
        "model": {
            "base": str(folder / "model"),
            "init": init,
            "architecture": ARCHITECTURE,
            "original_context_length": LENGTH,
            "base_context_length": LENGTH,
            "target_context_length": LENGTH,
        },
        "corpus": {"sources": [{"uri": "corpus.jsonl"}]},
        "prepare": {"sequence_length": LENGTH, "token_budget": LENGTH * NUM_SEQUENCES},
        "pretrain": {
            "global_batch_sequences": 2,
            "learning_rate": 1e-2,
            "precision": "float32",
            "checkpoint_every_steps": 2,
            **pretrain,
        },
        "cluster": cluster or {},
    }
    return Recipe.model_validate(values)


def write_inputs(folder: Path, ids: list[np.ndarray] | None = None) -> None:
    """`folder/model/config.json` and `folder/packed`. Its sequences count up, so that there is something to learn.

    `ids`: the NUM_SEQUENCES sequences instead.
    """
    config = {
        "model_type": "llama",
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        **{key: value for key, value in ARCHITECTURE.items() if key != "rope_theta"},
        "rope_parameters": {"rope_type": "default", "rope_theta": ARCHITECTURE["rope_theta"]},
    }
    Location.of(folder / "model" / "config.json").write_json(config)
    packed = Location.of(folder / "packed")
    if ids is None:
        ids = [(np.arange(LENGTH) * (i % 3 + 1) + i) % VOCAB for i in range(NUM_SEQUENCES)]
    sequences = [PackedSequence(i, row.astype(np.int32)) for i, row in enumerate(ids)]
    write_sequences(packed / file_name(0), sequences, LENGTH, weights=False)
    write_placements(packed, [Placement(i, 0, LENGTH, str(i), "text", 0, 0, LENGTH) for i in range(NUM_SEQUENCES)])
    chunk_tokens, rows_per_group = chunking(LENGTH)
    files = (PackedFile(file_name(0), 0, NUM_SEQUENCES),)
    PackedManifest(LENGTH, NUM_SEQUENCES, chunk_tokens, rows_per_group, False, VOCAB, files).write(packed)


def job(folder: Path, stage: str, **changes: Any) -> TrainJob:
    """A job over `write_inputs(folder)` in stage directory `folder/stage`."""
    where, made = Location.of(folder), recipe(folder, **changes)
    plan = plan_training(made, "pretrain", None, ModelShape.from_config(ARCHITECTURE)).plan
    return TrainJob(made, "pretrain", where / "packed", where / "model", where / stage, stage, plan)


class Killed(Exception):
    pass


def train_to(task: TrainJob, last_step: int) -> int:
    """Run the job as if it were killed after `last_step` (then -1), or to its end: the step that it started from."""
    import torch

    from ultralong_ray.train.loop import run

    def report(metrics: dict[str, Any]) -> None:
        if metrics["step"] == last_step < task.num_steps(NUM_SEQUENCES):
            raise Killed

    try:
        return run(task, torch.device("cpu"), report)
    except Killed:
        return -1


def weights_of(stage: Location) -> dict[str, np.ndarray]:
    """Of a stage's newest checkpoint."""
    root = stage / CHECKPOINTS
    return {name: tensor.numpy().copy() for name, tensor in full_weights(root / committed(root)[0])}
