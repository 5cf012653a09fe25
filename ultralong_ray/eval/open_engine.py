"""Opens the engine that a recipe asks for: `[evaluate]` and a model folder in, an `engine.Engine` out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import EndpointEngine, ShardedEngine, VllmEngine
from ultralong_ray.eval.engine import Engine


def open_engine(config: EvaluateConfig, model: str, folder: Path, room: Any = None) -> Engine:
    """The engine of `config.engine.kind` with a model of the recipe, whose Hugging Face folder is given.

    `room`: the placement group of a sharded engine (`sharded_group.reserve_group`). Imports are local: torch is slow,
    and an endpoint needs none.
    """
    if isinstance(config.engine, EndpointEngine):
        from ultralong_ray.eval.openai_engine import OpenAIEngine

        return OpenAIEngine(folder, config.engine, model)
    if isinstance(config.engine, ShardedEngine):
        from ultralong_ray.eval.sharded_group import ShardedGroup

        return ShardedGroup(config, folder, room)
    if isinstance(config.engine, VllmEngine):
        from ultralong_ray.eval.vllm_engine import VllmEngine as OnVllm

        return OnVllm(config, folder)
    from ultralong_ray.eval.generate import Engine as InProcessEngine

    return InProcessEngine(
        folder,
        precision=config.precision,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        batch_tokens=config.engine.batch_tokens,
    )
