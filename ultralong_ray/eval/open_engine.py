"""Opens the engine that a recipe asks for: `[evaluate]` and a model folder in, an `engine.Engine` out."""

from __future__ import annotations

from pathlib import Path

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.engine import Engine


def open_engine(config: EvaluateConfig, folder: Path) -> Engine:
    """The engine of `config.engine.kind` with the model of a Hugging Face folder. Imports are local: torch is slow."""
    from ultralong_ray.eval.generate import Engine as InProcessEngine

    return InProcessEngine(folder, precision=config.precision, prefill_chunk_tokens=config.prefill_chunk_tokens)
