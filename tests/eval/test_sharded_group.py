"""The sharded engine in an evaluation: a lost rank costs the cell under way; what cannot be had is refused in words."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from ultralong_ray.config import EvaluateConfig, Recipe
from ultralong_ray.eval import sharded_group
from ultralong_ray.eval.fanout import evaluate
from ultralong_ray.eval.open_engine import open_engine
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_group_that_the_cluster_cannot_hold_is_refused(
    local_ray: None, tiny_recipe: Callable[..., Recipe], tiny_llama: Path
) -> None:
    recipe = tiny_recipe(evaluate={"models": ["final"], "engine": {"kind": "sharded", "degree": 8}})
    with pytest.raises(UserError, match=r"cpus_per_task 1 times evaluate.engine.degree 8: .* has 3 CPU in all"):
        evaluate(recipe, {"final": Location.of(tiny_llama)}, None, stage_directory(recipe, "evaluate"))


def test_a_neighbours_error_is_told_from_the_loss_behind_it(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gloo the ranks beside a lost one fail at once, and their errors may come before Ray's word of the loss."""
    monkeypatch.setattr(sharded_group, "LOSS_SEEN_SECONDS", 20.0)
    actor: Any = ray.remote(num_cpus=0)(Rank)
    neighbour, lost = actor.remote(), actor.remote()
    loss = sharded_group._loss_among([neighbour.fail.remote(), lost.die.remote()])
    assert isinstance(loss, RayActorError)
    assert sharded_group._loss_among([neighbour.fail.remote()]) is None


class Rank:
    def fail(self) -> None:
        raise RuntimeError("Connection closed by peer")

    def die(self) -> None:
        time.sleep(0.5)
        os._exit(1)


@pytest.mark.slow
def test_degrees_that_do_not_fit_the_model_are_refused_in_words(
    local_ray: None, tiny_recipe: Callable[..., Recipe], tiny_llama: Path
) -> None:
    engine = {"kind": "sharded", "degree": 2, "ulysses_degree": 4}
    asked = {"models": ["final"], "context_lengths": [192], "depths_percent": [0]}
    recipe = tiny_recipe(evaluate={**asked, "engine": engine})
    stage = stage_directory(recipe, "evaluate")
    with pytest.raises(UserError, match="ulysses_degree 4 cannot split 2 ranks") as refusal:
        evaluate(recipe, {"final": Location.of(tiny_llama)}, None, stage)
    assert "Traceback" not in str(refusal.value) and "all 1 work items failed" in str(refusal.value)


def _cells(folder: Path) -> dict[str, Any]:
    """Every stored cell without its time and without the engine's name."""
    found = {}
    for path in sorted((folder / "cells").rglob("*.json")):
        cell = json.loads(path.read_text())
        cell["settings"].pop("engine")
        found[path.relative_to(folder).as_posix()] = {**cell, "seconds": 0}
    return found


@pytest.mark.slow
def test_a_killed_rank_costs_the_cell_under_way_and_the_table_is_the_same(
    local_ray: None,
    tiny_recipe: Callable[..., Recipe],
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "ultralong_ray.eval.fanout")
    asked = {"models": ["final"], "context_lengths": [2048], "depths_percent": [0, 20, 40, 60, 80, 100]}
    recipe = tiny_recipe(evaluate={**asked, "engine": {"kind": "sharded", "degree": 2}, "prefill_chunk_tokens": 256})
    models, stage = {"final": Location.of(tiny_llama)}, stage_directory(recipe, "evaluate")
    folder, result = Path(stage.location.path), {}
    thread = threading.Thread(target=lambda: result.update(evaluate(recipe, models, None, stage)))
    thread.start()
    while not (before := {path: path.stat().st_mtime_ns for path in (folder / "cells").rglob("*.json")}):
        assert thread.is_alive()
        time.sleep(0.01)
    ranks = [p for p in psutil.Process().children(recursive=True) if "ray::ShardedRank" in " ".join(p.cmdline())]
    assert len(ranks) == 2 and thread.is_alive(), "a rank is killed in mid-run"
    ranks[-1].kill()
    thread.join(timeout=300)
    assert (result["num_computed"], result["num_failed"]) == (6, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "stored cells stay as they are"
    assert caplog.text.count("was lost; the cell is tried again") == 1

    plain = tiny_recipe(evaluate=asked)
    alone = StageDirectory("evaluate", "alone", Location.of(tmp_path / "alone"))
    assert evaluate(plain, models, None, alone)["models"] == result["models"]
    assert _cells(folder) == _cells(tmp_path / "alone") and len(_cells(folder)) == 6


def test_vllm_is_refused_with_words_where_it_is_not_installed(tiny_llama: Path) -> None:
    pytest.importorskip("ray")
    config = EvaluateConfig.model_validate({"context_lengths": [64], "engine": {"kind": "vllm"}})
    try:
        import vllm  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'ultralong-ray\[vllm\]'"):
            open_engine(config, "final", tiny_llama)
