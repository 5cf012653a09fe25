"""A whole recipe, and the rules that hold across its sections."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ultralong_ray.config.base import Section
from ultralong_ray.config.degrees import DegreeRequest, Degrees, Heads, refuse_batch, resolve_degrees
from ultralong_ray.config.evaluate import EvaluateConfig, even_lengths
from ultralong_ray.config.model import ModelConfig
from ultralong_ray.config.refine import RefineConfig
from ultralong_ray.config.screening import DecontaminateConfig
from ultralong_ray.config.sections import (
    ClusterConfig,
    CorpusConfig,
    PrepareConfig,
    PretrainConfig,
    SftConfig,
    StorageConfig,
    TrainConfig,
)
from ultralong_ray.config.tune import TuneConfig


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    workdir: Annotated[str, Field(min_length=1)]
    """Where stages write: local path, s3://bucket/prefix, gs://bucket/prefix, or a scheme of fsspec that writes files
    by scheme://path alone."""
    storage: StorageConfig = StorageConfig()
    model: ModelConfig
    corpus: CorpusConfig
    prepare: PrepareConfig
    decontaminate: DecontaminateConfig | None = None
    """Default: nothing is compared with evaluation sets."""
    pretrain: PretrainConfig
    refine: RefineConfig | None = None
    """Read by jobs/refine.py alone: no stage of the pipeline."""
    sft: SftConfig | None = None
    evaluate: EvaluateConfig | None = None
    cluster: ClusterConfig = ClusterConfig()
    tune: TuneConfig | None = None
    """Read by jobs/tune.py alone: no stage of the pipeline."""

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        _check_lengths(self)
        for name, train, _ in self.train_stages():
            _legal_workers(self, name, train)
        return self

    @model_validator(mode="after")
    def _evaluation_asks_for_something(self) -> Recipe:
        evaluate = self.evaluate
        curve = evaluate is not None and evaluate.gives_losses and self.prepare.holds_out
        if evaluate is not None and not (evaluate.passkey or evaluate.tasks or curve):
            raise ValueError(
                "evaluate.passkey is false and there is no [[evaluate.tasks]]: nothing would be measured; perplexity "
                "by position alone takes prepare.holdout_sequences or holdout_ids and an engine in_process or sharded"
            )
        if evaluate is None or not evaluate.passkey or evaluate.context_lengths:
            return self
        lengths = even_lengths(self.model.target_context_length)
        # frozen: this is the one place where a default needs another section
        object.__setattr__(self, "evaluate", evaluate.model_copy(update={"context_lengths": lengths}))
        return self

    def train_stages(self) -> list[tuple[str, TrainConfig, int]]:
        """(section name, section, sequence length in tokens) of every training stage of the recipe."""
        stages: list[tuple[str, TrainConfig, int]] = [("pretrain", self.pretrain, self.prepare.sequence_length)]
        if self.sft is not None:
            stages.append(("sft", self.sft, self.sft.sequence_length))
        return stages

    def at_largest_size(self) -> Recipe:
        """The recipe for the most workers of its range that its training sections can use."""
        if self.cluster.min_workers is None:
            return self
        workers = min(_legal_workers(self, name, train) for name, train, _ in self.train_stages())
        cluster = self.cluster.model_copy(update={"num_workers": workers, "min_workers": None})
        return self.model_copy(update={"cluster": cluster})

    @property
    def heads(self) -> Heads | None:
        """(query, key-value) heads of the model, where the recipe itself describes it."""
        shape = self.model.architecture
        return None if shape is None else (shape.num_attention_heads, shape.num_key_value_heads)

    def degrees(
        self,
        train: TrainConfig,
        heads: Heads | None = None,
        sequence_length: int | None = None,
        workers: int | None = None,
    ) -> Degrees:
        """(ulysses_degree, ring_degree) of a training section, every "auto" decided. `workers`: num_workers.

        `heads` of the model's config.json and the length of the packed sequences may be given where they are known;
        the recipe's own otherwise. Raises ValueError that says what does not fit.
        """
        name, length = next((name, length) for name, section, length in self.train_stages() if section is train)
        total: int | Literal["auto"] = train.sequence_parallel_degree
        parts = [degree for degree in (train.ulysses_degree, train.ring_degree) if degree != "auto"]
        if "sequence_parallel_degree" not in train.model_fields_set and parts:
            total = math.prod(parts)
        request = DegreeRequest(name, total, train.ulysses_degree, train.ring_degree, train.mask_documents)
        return resolve_degrees(
            request, workers or self.cluster.num_workers, sequence_length or length, heads or self.heads
        )


def _check_lengths(recipe: Recipe) -> None:
    target = recipe.model.target_context_length
    if recipe.prepare.sequence_length > target:
        raise ValueError(
            f"prepare.sequence_length {recipe.prepare.sequence_length} is beyond model.target_context_length {target}"
        )
    if recipe.sft is not None:
        if recipe.sft.sequence_length > target:
            raise ValueError(
                f"sft.sequence_length {recipe.sft.sequence_length} is beyond model.target_context_length {target}"
            )
        if recipe.sft.max_sample_tokens > recipe.sft.sequence_length:
            raise ValueError(
                f"sft.max_sample_tokens {recipe.sft.max_sample_tokens} does not fit into sft.sequence_length "
                f"{recipe.sft.sequence_length}; a sample is never cut"
            )
    for number, task in enumerate(recipe.evaluate.tasks if recipe.evaluate is not None else ()):
        if max(task.context_lengths) > target:
            raise ValueError(
                f"evaluate.tasks.{number}.context_lengths {max(task.context_lengths)} is beyond "
                f"model.target_context_length {target}; no model of this recipe reads as far, ask for less"
            )


def _legal_workers(recipe: Recipe, name: str, train: TrainConfig) -> int:
    """The most workers of the recipe's range that fill whole groups and share the batch. Raises ValueError: none do."""
    most = recipe.cluster.num_workers
    objections: list[ValueError] = []
    for workers in range(most, (recipe.cluster.min_workers or most) - 1, -1):
        try:
            ulysses, ring = recipe.degrees(train, workers=workers)
            refuse_batch(name, train.global_batch_sequences, train.micro_batch_sequences, workers // (ulysses * ring))
            return workers
        except ValueError as error:
            objections.append(error)
    raise objections[0]
