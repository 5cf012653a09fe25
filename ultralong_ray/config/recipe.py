"""A whole recipe, and the rules that hold across its sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ultralong_ray.config.base import Section
from ultralong_ray.config.heads import heads_can_split, heads_message
from ultralong_ray.config.model import ModelConfig
from ultralong_ray.config.refine import RefineConfig
from ultralong_ray.config.screening import DecontaminateConfig
from ultralong_ray.config.sections import (
    ClusterConfig,
    CorpusConfig,
    EvaluateConfig,
    PrepareConfig,
    PretrainConfig,
    SftConfig,
    StorageConfig,
    TrainConfig,
)


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    workdir: str
    """Where stages write: local path or any pyarrow / fsspec URI (s3://bucket/prefix)."""
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

    @model_validator(mode="after")
    def _stages_agree(self) -> Recipe:
        _check_lengths(self)
        for name, train, length in self.train_stages():
            _check_parallelism(self, name, train, length)
        return self

    def train_stages(self) -> list[tuple[str, TrainConfig, int]]:
        """(section name, section, sequence length in tokens) of every training stage of the recipe."""
        stages: list[tuple[str, TrainConfig, int]] = [("pretrain", self.pretrain, self.prepare.sequence_length)]
        if self.sft is not None:
            stages.append(("sft", self.sft, self.sft.sequence_length))
        return stages

    def sequence_parallel_degree(self, train: TrainConfig) -> int:
        """The degree given, or for "auto" the largest that divides workers, heads and length."""
        if train.sequence_parallel_degree != "auto":
            return train.sequence_parallel_degree
        length = next(length for _, t, length in self.train_stages() if t is train)
        shape = self.model.architecture
        candidates = range(self.cluster.num_workers, 0, -1)
        return next(
            degree
            for degree in candidates
            if self.cluster.num_workers % degree == 0
            and length % degree == 0
            and (shape is None or heads_can_split(shape.num_attention_heads, shape.num_key_value_heads, degree))
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


def _check_parallelism(recipe: Recipe, name: str, train: TrainConfig, length: int) -> None:
    workers = recipe.cluster.num_workers
    if train.sequence_parallel_degree != "auto":
        degree = train.sequence_parallel_degree
        if workers % degree:
            raise ValueError(
                f"cluster.num_workers {workers} is not a multiple of {name}.sequence_parallel_degree {degree}"
            )
        if length % degree:
            raise ValueError(
                f"{name}: sequence length {length} is not divisible by {name}.sequence_parallel_degree {degree}; "
                f"the nearest lengths that are: {length // degree * degree} and {(length // degree + 1) * degree}"
            )
        shape = recipe.model.architecture
        if shape is not None:
            query_heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
            if not heads_can_split(query_heads, kv_heads, degree):
                raise ValueError(heads_message(name, query_heads, kv_heads, degree))
    groups = workers // recipe.sequence_parallel_degree(train)
    per_pass = groups * train.micro_batch_sequences
    if train.global_batch_sequences % per_pass:
        raise ValueError(
            f"{name}.global_batch_sequences {train.global_batch_sequences} is not a multiple of {per_pass} "
            f"({groups} sequence-parallel groups x {name}.micro_batch_sequences {train.micro_batch_sequences})"
        )
