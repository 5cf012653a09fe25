"""The fan-out over real Ray workers: results stored at once, resumed, and kept when a worker dies or a cell fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.eval.served import serve
from ultralong_ray import job
from ultralong_ray.config import Recipe
from ultralong_ray.eval import fanout
from ultralong_ray.eval.cells import Cell
from ultralong_ray.eval.fanout import EvaluationWorker, _Inputs, evaluate
from ultralong_ray.eval.progress import Progress
from ultralong_ray.eval.summaries import summarise, summarise_tasks
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

Make = Callable[..., Recipe]
ONE_WORKER = {"evaluation_workers": 1}  # each takes seconds to import torch


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
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
    assert files[8:] == ["failed.json", "perplexity/base.json", "perplexity/final.json", "plan.json"]
    assert files[:8] == [
        *(f"cells/{m}/{n}-{d}.json" for m in ("base", "final") for n in (192, 256) for d in (0, 100)),
    ]
    assert summary["num_cells"] == 8 and summary["num_computed"] == 10
    assert summary["models"]["base"]["mean_within_base_window"] is None, "both lengths are beyond the 64-token window"
    curve = json.loads((folder / "perplexity/base.json").read_text())
    assert curve["bucket_end_tokens"][-1] == 200 and len(curve["loss"]) == recipe.evaluate.perplexity_buckets  # type: ignore[union-attr]

    marked = folder / "cells/base/192-0.json"
    stored = json.loads(marked.read_text())
    samples = [sample | {"score": 0.125} for sample in stored["samples"]]
    marked.write_text(json.dumps(stored | {"score": 0.125, "samples": samples}))
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
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(evaluate={"context_lengths": [20, 256], "depths_percent": [50]}, cluster=ONE_WORKER)
    stage, folder = place(recipe)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    models = {"base": Location.of(tiny_llama), "final": Location.of(broken)}
    summary = evaluate(recipe, models, None, stage)
    assert (summary["num_cells"], summary["num_computed"], summary["num_failed"]) == (4, 1, 3)
    failed = json.loads((folder / "failed.json").read_text())
    assert set(failed) == {"cells/base/20-50.json", "cells/final/20-50.json", "cells/final/256-50.json"}
    assert "evaluate.context_lengths: 20 tokens are too few" in failed["cells/base/20-50.json"]
    assert "SafetensorError" in failed["cells/final/256-50.json"]
    assert [path.name for path in (folder / "cells").rglob("*.json")] == ["256-50.json"]
    assert summary["models"]["final"]["mean"] == 0.0, "a failed cell counts 0, it is not dropped"
    stage.mark_done(summary)
    assert stage.done and not stage.settled, "the next submission tries the failed cells again"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fanout._Pool, "run", stop)
        evaluate(recipe, models, None, stage)
    assert json.loads((folder / "failed.json").read_text()) == {}, "what is tried again has not failed yet"

    shutil.copy(tiny_llama / "model.safetensors", broken)
    whole = tiny_recipe(evaluate={"context_lengths": [256], "depths_percent": [50]})
    mended = evaluate(whole, models, None, stage)
    assert (mended["num_computed"], mended["num_failed"]) == (1, 0) and json.loads(
        (folder / "failed.json").read_text()
    ) == {}


def test_without_any_result_the_evaluation_is_refused(local_ray: None, tiny_recipe: Make, tiny_llama: Path) -> None:
    recipe = tiny_recipe(evaluate={"context_lengths": [20], "depths_percent": [50]})
    with pytest.raises(UserError, match=r"all 1 work items failed:\n  base at 20 tokens, depth 50 %: evaluate.context"):
        evaluate(recipe, {"base": Location.of(tiny_llama)}, None, place(recipe)[0])


RULER = {"kind": "ruler", "names": ["vt", "qa_1"], "context_lengths": [512], "samples_per_cell": 3}


def test_tasks_run_in_shards_beside_the_grid_and_are_summed_up(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [{"input": "Who?", "context": "text " * n, "answers": ["Al"], "answer_keywords": "Al"} for n in (5, 900)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/loogle_SD_mixup_16k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lveval = {"kind": "lveval", "names": ["loogle_SD_mixup"], "levels": ["16k"], "context_lengths": [512]}
    tasks = [RULER, {**lveval, "data_folder": str(tmp_path / "data")}]
    recipe = tiny_recipe(evaluate={"passkey": False, "tasks": tasks, "samples_per_shard": 2}, cluster=ONE_WORKER)
    stage, folder = place(recipe)
    summary = evaluate(recipe, {"base": Location.of(tiny_llama)}, None, stage)
    assert summary["num_cells"] == 5 and summary["num_failed"] == 0
    assert set(summary["tasks"]["base"]) == {"ruler/vt", "ruler/qa_1", "lveval/loogle_SD_mixup_16k"}
    files = {path.relative_to(folder / "cells/base").as_posix() for path in (folder / "cells").rglob("*.json")}
    assert files == {
        *(f"ruler/{name}/512-shard{shard}.json" for name in ("vt", "qa_1") for shard in (0, 1)),
        "lveval/loogle_SD_mixup_16k/512-shard0.json",
    }
    cut = json.loads((folder / "cells/base/lveval/loogle_SD_mixup_16k/512-shard0.json").read_text())["samples"]
    assert [row["facts"]["cut"] for row in cut] == [False, True] and cut[1]["prompt_tokens"] <= 512 - 64
    plan = json.loads((folder / "plan.json").read_text())["cells"]
    assert {f"cells/base/{name}" for name in files} == {cell["file"] for cell in plan}
    (said,) = [line for line in caplog.messages if "published scores" in line]
    assert said.startswith("evaluate: ruler is not made from") and "(questions from: made up)" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"context_lengths": [192, 512]},
            r"evaluate.tasks.0 \(ruler/vt at 192 tokens\): ruler/vt: 192 tokens are too few",
        ),
        ({"squad": "/nowhere/dev.json"}, r"evaluate.tasks.0.squad: there is no /nowhere/dev.json"),
        ({"words": "wonder"}, r"evaluate.tasks.0.words: there is no .*/wonder; .*, name 'wonderwords' or 'built in',"),
    ],
)
def test_what_no_worker_could_do_is_refused_at_once(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, change: dict[str, Any], words: str
) -> None:
    recipe = tiny_recipe(evaluate={"passkey": False, "tasks": [{**RULER, **change}]}, cluster=ONE_WORKER)
    stage, folder = place(recipe)
    with pytest.raises(UserError, match=words):
        evaluate(recipe, {"base": Location.of(tiny_llama)}, None, stage)
    assert not (folder / "cells").exists()


def test_a_benchmark_file_with_a_bad_line_names_the_line(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "factrecall_en_16k.jsonl").write_text('{"input": "a", "context": "b", "answers": ["c"]}\n{"input": \n')
    lveval = {"kind": "lveval", "names": ["factrecall_en"], "levels": ["16k"], "context_lengths": [512]}
    recipe = tiny_recipe(evaluate={"tasks": [{**lveval, "data_folder": str(tmp_path)}]}, cluster=ONE_WORKER)
    stage, folder = place(recipe)
    stored = folder / "cells/base/192-0.json"
    stored.parent.mkdir(parents=True)
    stored.write_text("{}")
    with pytest.raises(UserError, match=r"factrecall_en_16k.jsonl:2: not JSON .*; mend or remove the line"):
        evaluate(recipe, {"base": Location.of(tiny_llama)}, None, stage)
    assert stored.exists()


@pytest.mark.parametrize("stored", [False, True], ids=["before it stores", "after it stored"])
def test_a_killed_worker_costs_its_cell_at_most(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
) -> None:
    """One dies in its second cell: in mid-work, or between that cell's file and its answer to the driver."""
    begun = tmp_path / "begun"
    begun.mkdir()

    class Dying(EvaluationWorker):
        cells = 0

        def run(self, cell: Cell) -> list[float]:
            self.cells += 1
            (begun / f"{cell.depth_percent:g}-{os.getpid()}").touch()
            dies = self.cells == 2 and not (begun / "dead").exists()
            points: list[float] = [] if dies and not stored else super().run(cell)
            if dies:
                (begun / "dead").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return points

    monkeypatch.setattr(fanout, "_REMOTE_WORKER", ray.remote(Dying))
    # one worker at a time, on both CPUs
    recipe = tiny_recipe(evaluate={"context_lengths": [192], "depths_percent": [0, 40, 60, 100], "cpus_per_task": 2})
    stage, folder = place(recipe)
    written: dict[Path, int] = {}
    collect = fanout._Pool._collect

    def noted(pool: Any, *finished: Any) -> None:
        written.update({path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")} | written)
        collect(pool, *finished)

    monkeypatch.setattr(fanout._Pool, "_collect", noted)
    summary = evaluate(recipe, {"base": Location.of(tiny_llama)}, None, stage)
    assert (summary["num_computed"], summary["num_failed"]) == (4, 0)
    found = {path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")}
    assert len(found) == 4 and found == written, "stored cells stay as they are"
    depths = [name.name.split("-")[0] for name in begun.iterdir() if name.name != "dead"]
    assert len(depths) == (4 if stored else 5) and len(set(depths)) == 4, "and nothing but what was lost is done again"


def test_a_server_that_fails_now_and_then_costs_what_it_failed_and_no_more(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path
) -> None:
    with serve() as server:
        engine = {"kind": "openai", "base_url": server.address, "served": {"base": "m"}, "concurrency": 1}
        engine |= {"max_attempts": 2, "backoff_seconds": 0.01, "timeout_seconds": 60}
        asked = {"models": ["base"], "engine": engine, "tasks": [{**RULER, "names": ["vt"]}]}
        recipe = tiny_recipe(evaluate=asked, cluster=ONE_WORKER)
        stage, folder = place(recipe)
        models = {"base": Location.of(tiny_llama)}
        server.reply, server.window = (lambda body: ""), 300
        server.fault = lambda: (500, "too busy") if len(server.bodies[-1]["prompt"]) > 200 else None
        summary = evaluate(recipe, models, None, stage)
        assert (summary["num_computed"], summary["num_failed"]) == (2, 3)
        failed = json.loads((folder / "failed.json").read_text())
        assert "HTTP 500: too busy (2 attempts). Look at the server" in failed["cells/base/256-0.json"]
        assert "'m' reads 300 tokens at most" in failed["cells/base/ruler/vt/512-shard0.json"]
        kept = _answers(folder)
        assert {row["answer"] for row in kept["cells/base/192-0.json"]["samples"]} == {""}, "empty is an answer"

        server.fault, server.window = (lambda: None), None
        server.finish_reason, server.completion_tokens = "length", 3
        asked = len(server.bodies)
        again = evaluate(recipe, models, None, stage)
        assert (again["num_computed"], again["num_failed"]) == (3, 0)
        assert all(len(body["prompt"]) > 200 for body in server.bodies[asked:]), "what is stored is not asked again"
        now = _answers(folder)
        assert {name: now[name] for name in kept} == kept
        cut = [row["finish_reason"] for row in now["cells/base/ruler/vt/512-shard0.json"]["samples"]]
        assert cut == ["length, after 3 of 30 tokens"] * 3


def _answers(folder: Path) -> dict[str, Any]:
    """Every stored cell without its time."""
    files = sorted((folder / "cells").rglob("*.json"))
    return {path.relative_to(folder).as_posix(): {**json.loads(path.read_text()), "seconds": 0} for path in files}


def test_stopped_twice_it_ends_with_the_answers_of_an_undisturbed_run(
    local_ray: None, tiny_recipe: Make, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM and Ctrl-C reach the driver as KeyboardInterrupt (ultralong_ray.job)."""
    sections = {"tasks": [{**RULER, "names": ["vt", "fwe"]}], "samples_per_shard": 1}
    recipe = tiny_recipe(evaluate=sections)
    models = {"base": Location.of(tiny_llama)}
    finished, limits = Progress.finished, iter([2, 3, 99])
    counted = [0, 0]

    def interrupted(self: Progress, cell: Cell, answered: bool) -> None:
        finished(self, cell, answered)
        counted[0] += 1
        if counted[0] == counted[1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "finished", interrupted)
    stage, folder = place(recipe)
    summary: dict[str, Any] = {}
    for limit in limits:
        counted[:] = [0, limit]
        try:
            summary = evaluate(recipe, models, None, stage)
        except KeyboardInterrupt:
            assert 0 < len(_answers(folder)) < 10
    assert summary["num_computed"] <= 5, "what was stored before is not computed again"
    monkeypatch.undo()
    undisturbed = StageDirectory("evaluate", "undisturbed", Location.of(tmp_path / "undisturbed"))
    once = evaluate(tiny_recipe(evaluate=sections, cluster=ONE_WORKER), models, None, undisturbed)
    assert _answers(folder) == _answers(tmp_path / "undisturbed") and len(_answers(folder)) == 10
    assert (summary["models"], summary["tasks"]) == (once["models"], once["tasks"])


class Broken:
    """An engine that fails in a way that nobody planned for, and then as planned."""

    tokenizer = None

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_an_engine_in_an_unknown_state_answers_no_other_cell(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _Inputs(tiny_recipe().evaluate, {"base": Location.of(tmp_path)}, None, Location.of(tmp_path), {})  # type: ignore[arg-type]
    opened: list[Broken] = []
    errors = iter([UserError("a bad line"), RuntimeError("out of memory"), UserError("a bad line")])

    def run_cell(*_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(fanout, "run_cell", run_cell)
    monkeypatch.setattr(fanout, "open_engine", lambda *_: opened.append(Broken()) or opened[-1])
    worker, cell = EvaluationWorker(inputs), Cell("base", 192, 0.0, 192, num_samples=2)
    with pytest.raises(UserError):
        worker.run(cell)
    with pytest.raises(RuntimeError):
        worker.run(cell)
    assert [engine.closed for engine in opened] == [1], "mistakes of the user leave it as it is"
    with pytest.raises(UserError):
        worker.run(cell)
    assert [engine.closed for engine in opened] == [1, 0]


def test_a_base_model_on_the_hub_is_fetched_where_it_is_asked(
    tiny_recipe: Make, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(model={"base": "owner/name"}, evaluate={"models": ["base"]})
    given: dict[str, Any] = {}
    monkeypatch.setattr(fanout, "evaluate", lambda recipe, models, *_: given.update(models))
    job.compute(recipe, "evaluate", stage_directory(recipe, "evaluate"))
    assert recipe.evaluate is not None
    monkeypatch.setattr("ultralong_ray.model.folder._from_hub", lambda model: tiny_llama)
    worker = EvaluationWorker(_Inputs(recipe.evaluate, given, None, place(recipe)[0].location, {}))
    worker.check("base")
    assert worker._engine("base").tokenizer.get_vocab()


def test_a_cluster_too_small_for_one_worker_is_refused(local_ray: None, tiny_recipe: Make, tiny_llama: Path) -> None:
    recipe = tiny_recipe(evaluate={"gpus_per_task": 64})
    with pytest.raises(UserError, match=r"gpus_per_task 64: the Ray cluster has \d+ GPU"):
        evaluate(recipe, {"base": Location.of(tiny_llama)}, None, place(recipe)[0])


def test_summary_splits_at_the_base_window() -> None:
    means = [(64, 0.0, 1.0), (64, 1.0, 0.8), (128, 0.0, 0.2), (256, 0.0, 0.0)]
    points = {Cell("base", length, depth, 0): [mean, mean] for length, depth, mean in means}
    points |= {Cell("base", None, 0.0, 0): [], Cell("final", 64, 0.0, 0): [0.3]}
    assert summarise(points, "base", 64) == {
        "mean": 0.5,
        "min_cell": 0.0,
        "mean_within_base_window": 0.9,
        "mean_beyond_base_window": 0.1,
    }


def test_task_summary_weighs_shards_by_their_samples() -> None:
    def cell(task: str, length: int, shard: int, samples: int) -> Cell:
        return Cell("base", length, None, 1, task, 0, shard, 2 * shard, samples)

    points = {cell("ruler/vt", 512, 1, 1): [0.0], cell("ruler/vt", 512, 0, 2): [0.5, 0.5]}
    points |= {cell("ruler/vt", 1024, 0, 2): [1.0, 1.0], Cell("base", 64, 0.0, 0): [1.0]}
    points |= {cell("infinitebench/passkey", 512, 0, 3): [1.0, 0.0, 0.0]}
    assert summarise_tasks(points, "base") == {
        "infinitebench/passkey": {"512": pytest.approx(100 / 3)},
        "ruler/vt": {"512": 33.33, "1024": 100.0},
    }
    assert summarise_tasks(points, "final") == {}


def test_a_half_is_rounded_as_the_benchmark_does_it() -> None:
    points = [0.2] * 46 + [0.0] * 18  # 14.375 %, in floating point a little less; by way of the shards' means more
    shards = {
        Cell("base", 512, None, 1, "ruler/vt", 0, shard, first, 25): points[first : first + 25]
        for shard, first in enumerate((0, 25, 50))
    }
    official = round(sum(points) / len(points) * 100, 2)  # NVIDIA/RULER, scripts/eval/synthetic/constants.py
    assert official == 14.37 and summarise_tasks(shards, "base") == {"ruler/vt": {"512": official}}
