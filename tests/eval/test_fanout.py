"""The fan-out over real Ray workers: results stored at once, resumed, and kept when a worker dies or a cell fails."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ultralong_ray.config import Recipe
from ultralong_ray.eval.cells import Cell
from ultralong_ray.eval.fanout import evaluate, summarise
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def place(recipe: Recipe) -> tuple[StageDirectory, Path]:
    stage = stage_directory(recipe, "evaluate")
    return stage, Path(stage.location.path)


def write_holdout(path: Path) -> Location:
    table = pa.table(
        {"id": ["a"], "domain": ["d"], "input_ids": pa.array([list(range(10, 210))], pa.list_(pa.int32()))}
    )
    pq.write_table(table, path)
    return Location.of(path)


def test_whole_grid_then_only_what_is_missing(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    stage, folder = place(recipe)
    models = {"base": Location.of(tiny_llama), "final": Location.of(tiny_llama)}
    holdout = write_holdout(tmp_path / "holdout.parquet")
    summary = evaluate(recipe, models, holdout, stage)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    assert files == [
        *(f"cells/{m}/{n}-{d}.json" for m in ("base", "final") for n in (192, 256) for d in (0, 100)),
        "perplexity/base.json",
        "perplexity/final.json",
    ]
    assert summary["num_cells"] == 8 and summary["num_computed"] == 10
    assert summary["models"]["base"]["mean_within_base_window"] is None, "both lengths are beyond the 64-token window"
    curve = json.loads((folder / "perplexity/base.json").read_text())
    assert curve["bucket_end_tokens"][-1] == 200 and len(curve["loss"]) == recipe.evaluate.perplexity_buckets  # type: ignore[union-attr]

    marked = folder / "cells/base/192-0.json"
    marked.write_text(json.dumps(json.loads(marked.read_text()) | {"score": 0.125}))
    damaged = folder / "cells/final/256-100.json"
    whole = json.loads(damaged.read_text())
    damaged.write_bytes(damaged.read_bytes()[:100])
    again = evaluate(recipe, models, holdout, stage)
    assert again["num_computed"] == 1, "only the damaged cell"
    assert json.loads(marked.read_text())["score"] == 0.125, "a stored cell is not computed again"
    assert again["models"]["base"]["mean"] == pytest.approx(0.125 / 4)
    repaired = json.loads(damaged.read_text())
    assert {**repaired, "seconds": 0} == {**whole, "seconds": 0}


def test_failing_cells_are_named_and_the_others_kept(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(evaluate={"context_lengths": [20, 256], "depths_percent": [50]})
    stage, folder = place(recipe)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    models = {"base": Location.of(tiny_llama), "final": Location.of(broken)}
    with pytest.raises(UserError) as error:
        evaluate(recipe, models, None, stage)
    message = str(error.value)
    assert "3 of 4 work items failed" in message
    assert "base at 20 tokens, depth 50 %: evaluate.context_lengths: 20 tokens are too few" in message
    assert "final at 256 tokens, depth 50 %: SafetensorError" in message
    assert [path.name for path in folder.rglob("*.json")] == ["256-50.json"]


def test_a_killed_worker_costs_its_cell_only(local_ray: None, tiny_recipe: Make, tiny_llama: Path) -> None:
    recipe = tiny_recipe(evaluate={"context_lengths": [4096], "depths_percent": [0, 20, 40, 60, 80, 100]})
    stage, folder = place(recipe)
    result: dict[str, Any] = {}

    def run() -> None:
        result.update(evaluate(recipe, {"base": Location.of(tiny_llama)}, None, stage))

    thread = threading.Thread(target=run)
    thread.start()
    while not list(folder.rglob("*.json")):
        assert thread.is_alive()
        time.sleep(0.05)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    mine = [p for p in psutil.Process().children(recursive=True) if "EvaluationWorker.run" in " ".join(p.cmdline())]
    assert mine and thread.is_alive(), "a worker is killed in mid-run"
    mine[0].kill()
    thread.join(timeout=120)
    assert result["num_computed"] == 6 and len(list(folder.rglob("*.json"))) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before, "stored cells stay as they are"


def test_a_cluster_too_small_for_one_worker_is_refused(local_ray: None, tiny_recipe: Make, tiny_llama: Path) -> None:
    recipe = tiny_recipe(evaluate={"gpus_per_task": 64})
    with pytest.raises(UserError, match=r"gpus_per_task 64: the Ray cluster has \d+ GPU"):
        evaluate(recipe, {"base": Location.of(tiny_llama)}, None, place(recipe)[0])


def test_summary_splits_at_the_base_window() -> None:
    scores = {
        Cell("base", n, d, 0): s for n, d, s in [(64, 0.0, 1.0), (64, 1.0, 0.8), (128, 0.0, 0.2), (256, 0.0, 0.0)]
    }
    scores |= {Cell("base", None, 0.0, 0): 0.0, Cell("final", 64, 0.0, 0): 0.3}
    assert summarise(scores, "base", 64) == {
        "mean": 0.5,
        "min_cell": 0.0,
        "mean_within_base_window": 0.9,
        "mean_beyond_base_window": 0.1,
    }
