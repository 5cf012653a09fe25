"""Work items: their order, their files, batching, perplexity buckets, and which stored results are used again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.config import EvaluateConfig, Recipe
from ultralong_ray.eval.cells import (
    Cell,
    bucket_means,
    grid,
    run_passkey,
    run_perplexity,
    store_cell,
    stored_score,
)
from ultralong_ray.eval.generate import Engine
from ultralong_ray.storage import Location
from ultralong_ray.types import CellResult, UserError

CONFIG = EvaluateConfig(context_lengths=(128, 512), depths_percent=(0.0, 22.2), samples_per_cell=2)


def test_grid_is_longest_first_and_complete(tmp_path: Path) -> None:
    holdout = tmp_path / "holdout.parquet"
    pq.write_table(pa.table({"input_ids": pa.array([[1] * 300, [2] * 300], pa.list_(pa.int32()))}), holdout)
    cells = grid(CONFIG, ["base", "final"], Location.of(holdout))
    assert [cell.tokens for cell in cells] == [1024] * 4 + [600] * 2 + [256] * 4
    files = {cell.result_file(Location.of("/s")).uri for cell in cells}
    assert len(files) == 10 and "/s/cells/final/512-22.2.json" in files and "/s/perplexity/base.json" in files
    assert len(grid(CONFIG, ["base"], None)) == 4


def test_bucket_means_cover_every_target_once() -> None:
    losses = [np.arange(1, 10, dtype=np.float32), np.arange(1, 10, dtype=np.float32) + 2]  # of tokens 1 to 9
    assert bucket_means(losses, 2) == ([5, 10], [3.5, 8.0])  # tokens 1-4 and 5-9, both sequences
    ends, means = bucket_means(losses, 9)
    assert ends == [2, 3, 4, 5, 6, 7, 8, 9, 10] and means == [2.0, 3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(UserError, match="perplexity_buckets 10 exceed the 9 targets"):
        bucket_means(losses, 10)


def test_stored_cells_are_used_only_when_whole_and_of_this_cell(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    cell = Cell("base", 128, 22.2, 256)
    assert stored_score(CONFIG, cell, stage) is None
    good = CellResult("base", 128, 22.2, 0.5, [{"right": True}, {"right": False}], 1.0)
    store_cell(good, cell, stage)
    assert stored_score(CONFIG, cell, stage) == 0.5
    file = cell.result_file(stage)
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], b"[]", b'{"model": "base"}', b"\xff\xfe"):
        file.write_bytes(damaged)
        assert stored_score(CONFIG, cell, stage) is None, damaged
    for other in ({"model": "final"}, {"context_length_tokens": 129}, {"depth_percent": 0.0}, {"samples": []}):
        file.write_json(asdict(good) | other)
        assert stored_score(CONFIG, cell, stage) is None, other


def test_a_cell_is_asked_and_kept_with_its_answers(tiny_llama: Path) -> None:
    engine: Any = Engine(tiny_llama, precision="float32", prefill_chunk_tokens=64, device="cpu")
    expected: list[str] = []

    def answer(ids: list[int], max_new_tokens: int) -> str:
        """Reads the key from the prompt, as a perfect model would; has no idea the first time."""
        expected.append(engine.tokenizer.decode(ids).split("The pass key is ", 1)[1][:5])
        return f" {expected[-1]}." if len(expected) > 1 else "no idea"

    engine.answer = answer
    result = run_passkey(engine, CONFIG, Cell("base", 512, 22.2, 1024))
    assert result.score == 0.5 and [sample["right"] for sample in result.samples] == [False, True]
    assert [sample["expected"] for sample in result.samples] == expected
    assert result.samples[1]["answer"] == f" {expected[1]}."
    assert result.samples[0]["prompt_end"].endswith("<|assistant|>\nThe pass key is")


def test_perplexity_curve(tiny_llama: Path, tmp_path: Path, tiny_recipe: Callable[..., Recipe]) -> None:
    config = tiny_recipe(evaluate={"perplexity_buckets": 4}).evaluate
    assert config is not None
    ids = np.random.default_rng(0).integers(10, 300, (3, 160), dtype=np.int32)
    holdout = tmp_path / "holdout.parquet"
    pq.write_table(pa.table({"input_ids": pa.array(list(ids), pa.list_(pa.int32()))}), holdout)
    engine = Engine(tiny_llama, precision="float32", prefill_chunk_tokens=64, device="cpu")
    curve = run_perplexity(engine, config, "base", Location.of(holdout))
    assert curve["bucket_end_tokens"] == [40, 80, 120, 160] and curve["num_sequences"] == 3
    losses = np.stack([engine.token_losses(row) for row in ids])
    np.testing.assert_allclose(curve["loss"][1], losses[:, 39:79].mean(), rtol=1e-5)
