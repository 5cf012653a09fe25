"""What the driver refuses before a cluster is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.made_jobs import LENGTH, NUM_SEQUENCES, VOCAB, job, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.job import check_inputs
from ultralong_ray.types import UserError


def change_config(folder: Path, **changes: Any) -> None:
    config = Location.of(folder / "model" / "config.json")
    config.write_json({**config.read_json(), **changes})


def test_inputs_that_fit_pass(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    check_inputs(job(tmp_path, "stage", cluster={"num_workers": 4}, sequence_parallel_degree=4))


@pytest.mark.parametrize(
    ("config", "section", "words"),
    [
        ({"num_attention_heads": 6}, {"ulysses_degree": 4}, "ulysses_degree 4 cannot split 6 query heads"),
        ({"vocab_size": VOCAB - 1}, {}, f"tokenised with {VOCAB} ids"),
        ({"max_position_embeddings": LENGTH // 2}, {}, f"max_position_embeddings {LENGTH // 2}"),
        ({}, {"global_batch_sequences": NUM_SEQUENCES + 4}, f"holds {NUM_SEQUENCES} sequences"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    tmp_path: Path, config: dict[str, Any], section: dict[str, Any], words: str
) -> None:
    write_inputs(tmp_path)
    change_config(tmp_path, **config)
    with pytest.raises(UserError, match=words):
        check_inputs(job(tmp_path, "stage", cluster={"num_workers": 4}, **{"global_batch_sequences": 4, **section}))


def test_steps_default_to_one_epoch(tmp_path: Path) -> None:
    assert job(tmp_path, "stage").num_steps(NUM_SEQUENCES) == NUM_SEQUENCES // 2
    assert job(tmp_path, "stage", steps=40).num_steps(NUM_SEQUENCES) == 40
