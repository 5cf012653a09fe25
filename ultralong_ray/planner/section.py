"""A training section of a recipe as the planner sees it: what is given, what is "auto"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ultralong_ray.config import Recipe, TrainConfig
from ultralong_ray.flops import ModelShape
from ultralong_ray.types import UserError

# Fields of TrainConfig that the planner decides where they are "auto".
PLANNED = (
    "sequence_parallel_degree",
    "ulysses_degree",
    "ring_degree",
    "keep_inputs",
    "keep_attention",
    "keep_attention_rows",
    "offload_optimizer",
    "mlp_tile_tokens",
    "loss_tile_tokens",
    "checkpoint_snapshot",
)


@dataclass(frozen=True, slots=True)
class Section:
    """`name` of a recipe, its fields and the shape and length that they are about."""

    name: str
    train: TrainConfig
    shape: ModelShape
    sequence_length: int

    @property
    def given(self) -> dict[str, object]:
        """The planned fields that are not "auto"."""
        fields = {**{name: getattr(self.train, name) for name in PLANNED}, "sequence_parallel_degree": self.total}
        return {name: value for name, value in fields.items() if value != "auto"}

    @property
    def total(self) -> int | Literal["auto"]:
        """Ranks of a group as asked for. The default of 1 does not count beside one of its two factors."""
        parts = (self.train.ulysses_degree, self.train.ring_degree)
        if "sequence_parallel_degree" not in self.train.model_fields_set and parts != ("auto", "auto"):
            return "auto"
        return self.train.sequence_parallel_degree

    @property
    def least_snapshot(self) -> Literal["memory", "disk", "none"]:
        """Where a checkpoint's snapshot goes when no memory is left for it, or as the field says."""
        if self.train.checkpoint_snapshot != "auto":
            return self.train.checkpoint_snapshot
        return "none" if self.train.local_checkpoint_folder is None else "disk"

    def changed(self, **fields: object) -> Section:
        return replace(self, train=self.train.model_copy(update=fields))

    def degrees_given(self, ulysses: int, ring: int) -> bool:
        """Are these the degrees that the fields ask for?"""
        wanted = (
            (self.total, ulysses * ring),
            (self.train.ulysses_degree, ulysses),
            (self.train.ring_degree, ring),
        )
        return all(field in ("auto", value) for field, value in wanted)


def section_of(recipe: Recipe, name: Literal["pretrain", "sft"], shape: ModelShape | None = None) -> Section:
    """The section, with the shape given or that of [model.architecture]. Raises UserError where neither is known."""
    known = shape
    if known is None and recipe.model.architecture is not None:
        known = ModelShape.from_architecture(recipe.model.architecture)
    if known is None:
        raise UserError(
            "the model's shape is not known from here: give [model.architecture], or model.base as a folder on this "
            "disk with a config.json"
        )
    for section, train, length in recipe.train_stages():
        if section == name:
            return Section(name, train, known, length)
    raise UserError(f"the recipe has no [{name}] section")
