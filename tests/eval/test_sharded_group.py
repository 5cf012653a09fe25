"""The sharded engine inside an evaluation: groups of Ray actors answer as one process does, and outlive a lost rank."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from ultralong_ray.config import EvaluateConfig, Recipe
from ultralong_ray.eval.fanout import evaluate
from ultralong_ray.eval.open_engine import open_engine
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def rows_of(recipe: Recipe, model: Path) -> list[Any]:
    stage = stage_directory(recipe, "evaluate")
    evaluate(recipe, {"final": Location.of(model)}, None, stage)
    files = sorted(Path(stage.location.path).glob("cells/final/*.json"))
    return [[row["answer"] for row in json.loads(file.read_text())["samples"]] for file in files]


def test_answers_are_the_in_process_ones_though_a_rank_is_lost(
    local_ray: None, tiny_recipe: Callable[..., Recipe], tiny_llama: Path, tmp_path: Path
) -> None:
    chosen = {"models": ["final"], "prefill_chunk_tokens": 64}
    alone = tiny_recipe(evaluate=chosen)
    expected = rows_of(alone, tiny_llama)
    assert len(expected) == 4 and any(answer for cell in expected for answer in cell)
    recipe = tiny_recipe(evaluate={**chosen, "engine": {"kind": "sharded", "degree": 2}})
    shared = recipe.model_copy(update={"workdir": str(tmp_path / "sharded")})
    killed: list[int] = []

    def kill_a_rank() -> None:
        deadline = time.monotonic() + 200
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                try:
                    if process.name().startswith("ray::ShardedRank.answer"):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.005)

    killer = threading.Thread(target=kill_a_rank, daemon=True)
    killer.start()
    assert rows_of(shared, tiny_llama) == expected
    killer.join(1)
    assert killed, "no rank was met at work"


def test_a_group_that_the_cluster_cannot_hold_is_refused(
    local_ray: None, tiny_recipe: Callable[..., Recipe], tiny_llama: Path
) -> None:
    recipe = tiny_recipe(evaluate={"models": ["final"], "engine": {"kind": "sharded", "degree": 8}})
    with pytest.raises(UserError, match=r"cpus_per_task 1 times evaluate.engine.degree 8: .* has 3 CPU in all"):
        evaluate(recipe, {"final": Location.of(tiny_llama)}, None, stage_directory(recipe, "evaluate"))


def test_vllm_is_refused_with_words_where_it_is_not_installed(tiny_llama: Path) -> None:
    pytest.importorskip("ray")
    config = EvaluateConfig.model_validate({"context_lengths": [64], "engine": {"kind": "vllm"}})
    try:
        import vllm  # noqa: F401  # type: ignore[import-not-found]
    except ImportError:
        with pytest.raises(UserError, match=r"pip install 'ultralong-ray\[vllm\]'"):
            open_engine(config, "final", tiny_llama)
