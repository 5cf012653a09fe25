"""[tune]: which recipe keys and which named variants jobs/tune.py tries, and how it ends trials early.

[tune]
seeds = [1, 2, 3]
seed_fields = ["prepare.seed"]          # dotted keys of the recipe that take the seed
[tune.search]
"pretrain.learning_rate" = [1e-4, 2e-4]
[tune.variants.recipe]                  # an empty table is the recipe itself
[tune.variants.two_steps.first]         # trained before, and where the variant starts from
"model.target_context_length" = 32768
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from ultralong_ray.config.base import Positive, Section, operational

STAGED = "staged"  # the one key of [tune.search] that is no key of the recipe
FIRST = "first"  # the one key of a variant that is no key of the recipe
VARIANT_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"  # it names files


class RangeConfig(Section):
    """Numbers drawn at random, evenly between the ends, or evenly between their logarithms."""

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _ends_are_ordered(self) -> RangeConfig:
        if self.low >= self.high:
            raise ValueError(f"a range goes from low to high; low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range with log = true needs low above 0, not {self.low:g}")
        return self


class TuneConfig(Section):
    """Trials: every variant with every seed and every combination of values. A trial runs the recipe up to evaluate;
    without its SFT where evaluate.models does not ask for "final"."""

    variants: dict[str, dict[str, Any]] = operational({})  # which trials there are; each result says what it is of
    """Name -> dotted keys of the recipe and their values, which may be whole sections such as `sft`. The key "first"
    holds further values of a training before it, whose model the variant starts from."""
    seeds: tuple[int, ...] = operational(())
    seed_fields: tuple[str, ...] = ()
    """Dotted keys of the recipe that take the seed."""
    search: Annotated[dict[str, tuple[Any, ...] | RangeConfig], Field(default_factory=dict)]
    """Dotted key of the recipe -> list of values, or a range {low, high, log}. "staged": [false, true] tries the
    window in one step and in those of `staged`."""
    samples: Positive = 1
    """Draws from the ranges, each combined with every combination of the lists."""
    staged: tuple[dict[str, Any], ...] = ()
    """Overrides (dotted keys) of the steps before the last of a staged trial: each step trains on what the one before
    it made."""
    evaluate: bool = True
    """False: trials are compared by their loss alone."""
    stop_early: bool = True
    """Successive halving (ASHA, arXiv 1810.05934): a trial ends when its loss is among the worse of those that got as
    far. Losses are seen at checkpoints."""
    grace_steps: Positive = 1
    """Optimizer steps before a trial may be ended."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """One in so many trials goes on at each rung; rungs are so many times apart."""
    seed: int = 42
    trials_at_once: Positive | None = operational(None)
    """Default: as many as the cluster holds at the start."""

    @model_validator(mode="after")
    def _trials_have_names_and_values(self) -> TuneConfig:
        if not (self.search or self.variants or self.seeds):
            raise ValueError("tune has nothing to try; it needs tune.search, tune.variants or tune.seeds")
        if bool(self.seeds) != bool(self.seed_fields):
            raise ValueError(
                "tune.seeds and tune.seed_fields need each other: the seeds, and the keys of the recipe that take them"
            )
        twice = [seed for place, seed in enumerate(self.seeds) if self.seeds.index(seed) < place]
        if twice:
            raise ValueError(
                f"tune.seeds {list(self.seeds)} has {', '.join(map(str, twice))} more than once, which would make "
                f"trials of one name; give each seed once"
            )
        for name, values in self.variants.items():
            if not re.fullmatch(VARIANT_NAME, name):
                raise ValueError(f"tune.variants {name!r} names files; use letters, digits, '_', '.' and '-' alone")
            if not isinstance(values.get(FIRST, {}), dict):
                raise ValueError(
                    f"tune.variants.{name}.first is a table of dotted keys and values, not {values[FIRST]!r}"
                )
        return self

    @model_validator(mode="after")
    def _search_can_be_done(self) -> TuneConfig:
        for key, values in self.search.items():
            if not isinstance(values, RangeConfig) and not values:
                raise ValueError(f"tune.search {key!r} has no values")
        staged = self.search.get(STAGED, ())
        if isinstance(staged, RangeConfig) or not all(isinstance(value, bool) for value in staged):
            raise ValueError('tune.search "staged" takes true and false')
        if any(staged) and not self.staged:
            raise ValueError('tune.search "staged" needs tune.staged: the overrides of the steps before the last')
        if self.samples > 1 and not any(isinstance(values, RangeConfig) for values in self.search.values()):
            raise ValueError(f"tune.samples {self.samples} would repeat equal trials: tune.search has no range")
        return self
