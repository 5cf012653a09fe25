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
from ultralong_ray.config.made_tasks import RulerTask
from ultralong_ray.eval.cells import Cell, grid, run_cell, store_cell, stored_points
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
from ultralong_ray.eval.perplexity import bucket_means, run_perplexity
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.score import score
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
    again = CONFIG.model_copy(update={"depths_percent": CONFIG.depths_percent * 2})
    assert grid(again, ["base"], None) == grid(CONFIG, ["base"], None), "a depth that is named twice is asked once"


def test_bucket_means_cover_every_target_once() -> None:
    losses = [np.arange(1, 10, dtype=np.float32), np.arange(1, 10, dtype=np.float32) + 2]  # of tokens 1 to 9
    assert bucket_means(losses, 2) == ([5, 10], [3.5, 8.0])  # tokens 1-4 and 5-9, both sequences
    ends, means = bucket_means(losses, 9)
    assert ends == [2, 3, 4, 5, 6, 7, 8, 9, 10] and means == [2.0, 3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(UserError, match="perplexity_buckets 10 exceed the 9 targets"):
        bucket_means(losses, 10)


def test_stored_cells_are_used_only_when_whole_and_of_this_cell(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    cell = Cell("base", 128, 22.2, 256, num_samples=2)
    assert stored_points(CONFIG, cell, stage) is None
    good = CellResult("base", 128, 22.2, 0.5, [{"score": 1.0}, {"score": 0.0}], 1.0)
    store_cell(good, cell, stage)
    assert stored_points(CONFIG, cell, stage) == [1.0, 0.0]
    file = cell.result_file(stage)
    whole = file.read_bytes()
    for damaged in (b"", whole[:40], b"[]", b'{"model": "base"}', b"\xff\xfe"):
        file.write_bytes(damaged)
        assert stored_points(CONFIG, cell, stage) is None, damaged
    for other in (
        {"model": "final"},
        {"context_length_tokens": 129},
        {"depth_percent": 0.0},
        {"samples": []},
        {"samples": [{"score": None}, {"right": True}]},
        {"task": "ruler/vt"},
    ):
        file.write_json(asdict(good) | other)
        assert stored_points(CONFIG, cell, stage) is None, other


def test_a_cell_is_asked_and_kept_with_its_answers(tiny_llama: Path) -> None:
    engine: Any = Engine(tiny_llama, precision="float32", prefill_chunk_tokens=64, device="cpu")
    expected: list[str] = []

    def answer(ids: list[int], max_new_tokens: int, stop: tuple[str, ...], exact: bool) -> str:
        """Reads the key from the prompt, as a perfect model would; has no idea the first time."""
        expected.append(engine.tokenizer.decode(ids).split("The pass key is ", 1)[1][:5])
        return f" {expected[-1]}." if len(expected) > 1 else "no idea"

    engine.answer = answer
    result = run_cell(engine, CONFIG, Cell("base", 512, 22.2, 1024), Maker({}), _no_prompts)
    assert result.score == 0.5 and [sample["right"] for sample in result.samples] == [False, True]
    assert [sample["expected"] for sample in result.samples] == expected
    assert result.samples[1]["answer"] == f" {expected[1]}."
    assert result.samples[0]["prompt_end"].endswith("<|assistant|>\nThe pass key is")


def _no_prompts(chat_template: bool) -> Prompts:
    raise AssertionError("passkeys bring their own prompts")


class Parrot:
    """An engine that always says the same and keeps what it was asked."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.requests: list[Any] = []

    def answers(self, requests: Any) -> list[str]:
        self.requests = list(requests)
        return [self.answer] * len(self.requests)


SECTION = RulerTask(kind="ruler", names=("niah_multivalue", "qa_1"), context_lengths=(1024,), samples_per_cell=5)
TASKS = EvaluateConfig(passkey=False, tasks=(SECTION,), samples_per_shard=2)


def _tiny_prompts(tiny_llama: Path) -> Prompts:
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(tiny_llama), chat_template=True)


def test_task_cells_are_shards_that_hold_every_sample_once(tiny_llama: Path) -> None:
    cells = grid(TASKS, ["base"], None, Maker({}))
    spans = sorted((cell.task, cell.shard, cell.first_sample, cell.num_samples) for cell in cells)
    shards = [(0, 0, 2), (1, 2, 2), (2, 4, 1)]
    assert spans == [(f"ruler/{name}", *shard) for name in ("niah_multivalue", "qa_1") for shard in shards]
    assert len({cell.file for cell in cells}) == 6
    assert "cells/base/ruler/qa_1/1024-shard2.json" in {cell.file for cell in cells}
    assert [cell.tokens for cell in cells] == [2048] * 4 + [1024] * 2
    prompts = _tiny_prompts(tiny_llama)
    whole = TASKS.model_copy(update={"samples_per_shard": 5})
    texts: dict[int, list[str]] = {}
    for config in (TASKS, whole):
        parrot, found = Parrot(""), []
        for cell in sorted(grid(config, ["base"], None, Maker({})), key=lambda cell: (cell.task, cell.shard)):
            run_cell(parrot, config, cell, Maker({}), lambda chat: prompts)
            found += [request.text for request in parrot.requests]
        texts[config.samples_per_shard] = found
    assert texts[2] == texts[5] and len(set(texts[5])) == 10, "a sample does not depend on its shard"


def test_a_task_cell_stores_what_can_be_read_and_scored_again(tiny_llama: Path) -> None:
    prompts, cell = _tiny_prompts(tiny_llama), grid(TASKS, ["base"], None, Maker({}))[0]
    assert cell.task == "ruler/niah_multivalue"
    parrot = Parrot("nothing of it")
    assert run_cell(parrot, TASKS, cell, Maker({}), lambda chat: prompts).score == 0.0
    request = parrot.requests[0]
    assert request.text.startswith("<s><|user|>") and request.text.endswith("in the provided text are")
    assert (request.max_new_tokens, request.stop) == (128, ()) and request.ids == prompts.ids(request.text)
    values = run_cell(Parrot(""), TASKS, cell, Maker({}), lambda chat: prompts).samples[1]["expected"]
    half = run_cell(Parrot(f" {values[0]}, and\n{values[3]}."), TASKS, cell, Maker({}), lambda chat: prompts)
    assert [row["score"] for row in half.samples] == [0.0, 0.5] and half.score == 0.25
    row = half.samples[1]
    assert row["answer"] == f" {values[0]}, and\n{values[3]}.", "an answer is cut at nothing that the benchmark keeps"
    again = Sample("ruler/x", 1, "", "", "", tuple(row["expected"]), 1, row["metric"], facts=row["facts"])
    assert score(again, row["answer"]) == 0.5 and not row["right"]
    assert row["prompt_tokens"] + row["max_new_tokens"] <= 1024
    assert half.settings["section"]["seed"] == 42 and half.settings["decoding"] == "greedy"


@pytest.mark.parametrize("answer", ["", " \n\t ", "\x00\x01", "\ud800", "9" * 100_000, "\u202e{}[]</script>"])
def test_malformed_answers_score_nothing_and_are_kept(tiny_llama: Path, tmp_path: Path, answer: str) -> None:
    prompts, cell = _tiny_prompts(tiny_llama), grid(TASKS, ["base"], None, Maker({}))[0]
    result = run_cell(Parrot(answer), TASKS, cell, Maker({}), lambda chat: prompts)
    store_cell(result, cell, Location.of(tmp_path))
    assert stored_points(TASKS, cell, Location.of(tmp_path)) == [0.0] * cell.num_samples
    assert cell.result_file(Location.of(tmp_path)).read_json()["samples"][0]["answer"] == answer


def test_a_cell_of_documents_keeps_their_losses(tiny_llama: Path, tmp_path: Path) -> None:
    engine = Engine(tiny_llama, precision="float32", prefill_chunk_tokens=64, device="cpu")
    file = tmp_path / "a.txt"
    file.write_text("The grass is green. " * 60)
    fields = {"kind": "perplexity", "name": "grass", "documents": [str(file)], "context_lengths": [128]}
    config = EvaluateConfig.model_validate({"passkey": False, "tasks": [{**fields, "samples_per_cell": 1}]})
    maker = Maker({str(file): Location.of(file)})
    (cell,) = grid(config, ["base"], None, maker)
    assert (cell.task, cell.tokens) == ("perplexity/grass", 128)
    assert cell.file == "cells/base/perplexity/grass/128-shard0.json"
    (row,) = run_cell(engine, config, cell, maker, _no_prompts).samples
    losses = engine.token_losses(np.array(engine.tokenizer(file.read_text())["input_ids"][:128], np.int32))
    assert row["facts"]["loss"] == pytest.approx(losses.mean(), abs=1e-6)
    assert row["facts"]["bucket_end_tokens"] == [128]
    assert row["score"] == pytest.approx(np.exp(-losses.mean()), abs=1e-6)


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
