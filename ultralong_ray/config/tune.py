"""[tune]: which recipe keys jobs/tune.py tries, and how it ends trials early."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ultralong_ray.config.base import Positive, Section, operational

STAGED = "staged"  # the one key of [tune.search] that is no key of the recipe


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
    """Trials: extend, pretrain and, where the recipe has it, evaluate, once for every combination of values."""

    search: Annotated[dict[str, tuple[Any, ...] | RangeConfig], Field(min_length=1)]
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
