"""Engines that the cluster or the installation cannot offer are refused with words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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
