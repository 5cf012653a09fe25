"""[evaluate]: models, the passkey grid, further benchmarks, and the engine that answers."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ultralong_ray.config.base import Positive, Section, operational
from ultralong_ray.config.engines import EndpointEngine, EngineConfig, InProcessEngine, ShardedEngine
from ultralong_ray.config.read_tasks import PerplexityTask
from ultralong_ray.config.task_section import Depths
from ultralong_ray.config.tasks import Task

ModelName = Literal["base", "extended", "pretrained", "final"]
GRID_LENGTHS = 40  # of the default passkey grid, as in the paper's heat maps
GRID_DEPTHS = tuple(round(100 * step / 9, 1) for step in range(10))


class EvaluateConfig(Section):
    """NIAH passkey over lengths x depths, and the benchmarks of [[evaluate.tasks]]."""

    models: Annotated[tuple[ModelName, ...], Field(min_length=1)] = ("base", "pretrained", "final")
    """base: as given. extended: RoPE changed, not trained. pretrained: after CPT. final: the exported model."""
    passkey: bool = True
    """False: no passkey grid, so tasks alone, and the perplexity curve where prepare holds documents out."""
    context_lengths: tuple[Positive, ...] = ()
    """Of the passkey grid, in tokens, question and template included. Default: 40 even steps up to
    model.target_context_length."""
    depths_percent: Depths = GRID_DEPTHS
    """Of the passkey grid."""
    samples_per_cell: Positive = 5
    """Of the passkey grid."""
    chat_template: bool = True
    passkey_digits: Annotated[int, Field(ge=1, le=10)] = 5
    max_new_tokens: Positive = 8
    """Of a passkey answer; the benchmarks have their own."""
    tasks: tuple[Task, ...] = ()
    """Benchmarks beside the passkey grid."""
    samples_per_shard: Positive = 25
    """Samples of a task that one worker answers and stores together."""
    perplexity_buckets: Positive = 16
    """Points of the perplexity-by-position curve."""
    seed: int = 1234
    """Of passkeys."""
    engine: EngineConfig = InProcessEngine()
    prefill_chunk_tokens: Positive = operational(8192)
    precision: Literal["float32", "bfloat16"] = "float32"
    gpus_per_task: Annotated[float, Field(ge=0.0)] = operational(0.0)
    cpus_per_task: Annotated[float, Field(ge=0.0)] = operational(1.0)

    @property
    def gives_losses(self) -> bool:
        """Whether the engine gives the loss of every token, which perplexity takes."""
        return isinstance(self.engine, InProcessEngine | ShardedEngine)

    @field_validator("engine", mode="before")
    @classmethod
    def _is_in_process_unless_it_says_so(cls, value: Any) -> Any:
        return {"kind": "in_process", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _engine_has_the_models(self) -> EvaluateConfig:
        if isinstance(self.engine, EndpointEngine):
            unserved = [name for name in self.models if name not in self.engine.served]
            if unserved:
                raise ValueError(
                    f"evaluate.engine.served does not say what the server calls {unserved[0]!r}; add "
                    f'{unserved[0]} = "...", or take it out of evaluate.models'
                )
        return self

    @model_validator(mode="after")
    def _engine_gives_losses(self) -> EvaluateConfig:
        if any(isinstance(section, PerplexityTask) for section in self.tasks) and not self.gives_losses:
            raise ValueError(
                f"evaluate.tasks of kind perplexity need the loss of every token, which an engine of kind "
                f"{self.engine.kind} does not give; set evaluate.engine.kind to in_process or sharded, or remove them"
            )
        return self

    @model_validator(mode="after")
    def _asks_for_nothing_twice(self) -> EvaluateConfig:
        counts = Counter(work for section in self.tasks for work in section.works())
        twice = next((work for work, count in counts.items() if count > 1), None)
        if twice is not None:
            depth = "" if twice.depth_percent is None else f" and depth {twice.depth_percent:g} %"
            raise ValueError(
                f"evaluate.tasks asks for {twice.task} at {twice.context_length_tokens} tokens{depth} more than once; "
                f"remove the repeated section, name, length or depth"
            )
        return self


def even_lengths(target_tokens: int) -> tuple[int, ...]:
    """The lengths of the default passkey grid, in whole thousands (1,024) of tokens where the steps allow it."""
    unit = 1024 if target_tokens >= GRID_LENGTHS * 1024 else 1
    steps = [target_tokens * step / GRID_LENGTHS for step in range(1, GRID_LENGTHS)]
    return (*sorted({max(1, round(length / unit) * unit) for length in steps}), target_tokens)
