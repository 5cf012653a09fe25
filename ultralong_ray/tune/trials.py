"""[tune] of a recipe to its trials. No Ray.

A trial is a recipe, so its stages have directories of their own and are found again. What it came to: tune/results.py.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.config.tune import FIRST, STAGED, RangeConfig, TuneConfig
from ultralong_ray.recipe import with_values
from ultralong_ray.stages import stage_directory, stage_fingerprint, stages
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError


@dataclass(frozen=True, slots=True)
class Trial:
    """A variant with a seed and one combination of searched values.

    `values`: what a table names it by. `changes`: the keys of the recipe that each step changes, without paths.
    `steps`: the recipes to train one after the other; the last one is compared.
    """

    name: str
    variant: str | None
    values: dict[str, Any]
    changes: tuple[dict[str, Any], ...]
    steps: tuple[Recipe, ...]

    @property
    def recipe(self) -> Recipe:
        return self.steps[-1]

    @property
    def outcome(self) -> str:
        """The model that the trial is compared by, as [evaluate] calls it."""
        return "final" if self.recipe.sft is not None else "pretrained"

    def record(self, folder: Location) -> Location:
        return folder / "trials" / f"{self.name}.json"


def section(recipe: Recipe) -> TuneConfig:
    if recipe.tune is None:
        raise UserError(
            "the recipe has no [tune] section, which says what to try; its fields: ultralong_ray/config/tune.py"
        )
    return recipe.tune


def table_keys(tune: TuneConfig) -> list[str]:
    """What tells trials apart: keys of `Trial.values`."""
    return [*(["variant"] if tune.variants else []), *(["seed"] if tune.seeds else []), *tune.search]


def combinations(tune: TuneConfig) -> list[dict[str, Any]]:
    """Every combination of the lists, for each draw from the ranges. The same seed draws the same."""
    lists = {key: values for key, values in tune.search.items() if not isinstance(values, RangeConfig)}
    ranges = {key: values for key, values in tune.search.items() if isinstance(values, RangeConfig)}
    found = []
    for sample in range(tune.samples):
        drawn = {key: _draw(limits, f"{tune.seed}-{sample}-{key}") for key, limits in ranges.items()}
        for values in itertools.product(*lists.values()):
            chosen = {**dict(zip(lists, values, strict=True)), **drawn}
            found.append({key: chosen[key] for key in tune.search})
    return found


def _draw(limits: RangeConfig, seed: str) -> float:
    share = random.Random(seed).random()
    if not limits.log:
        return limits.low + share * (limits.high - limits.low)
    return math.exp(math.log(limits.low) + share * (math.log(limits.high) - math.log(limits.low)))


def plan_trials(recipe: Recipe) -> list[Trial]:
    """The trials of a recipe: its variants, with each seed, with each combination.

    Raises UserError for values that make no valid recipe, and for trials that would train the same thing.
    """
    tune = section(recipe)
    found = [
        _trial(recipe, variant, seed, number if tune.search else None, values)
        for variant in tune.variants or (None,)
        for seed in tune.seeds or (None,)
        for number, values in enumerate(combinations(tune))
    ]
    by_training: dict[str, str] = {}
    for trial in found:
        other = by_training.setdefault(_last_training(trial), trial.name)
        if other != trial.name:
            raise UserError(
                f"tune: {other} and {trial.name} train the same thing, since training does not depend on all that they "
                f"differ in ({', '.join(table_keys(tune))}); take out values, keys or variants that change nothing"
            )
    return found


def _last_training(trial: Trial) -> str:
    return stage_fingerprint(trial.recipe, "pretrain" if trial.recipe.sft is None else "sft")


def chosen_trials(planned: list[Trial], only: tuple[str, ...]) -> list[Trial]:
    """The trials of the variants `only`, or all. Raises UserError for a variant that there is not."""
    known = dict.fromkeys(trial.variant for trial in planned if trial.variant is not None)
    unknown = [name for name in only if name not in known]
    if unknown:
        there = ", ".join(known) or "none: the recipe has no [tune.variants]"
        raise UserError(f"--only {' '.join(unknown)}: no such variant; there are {there}")
    return [trial for trial in planned if not only or trial.variant in only]


class TrialQueue:
    """Trials in their order, given out when nothing that they share is under way.

    Of trials that share a pretraining that is not done, as before different SFTs, one alone runs until it is done: the
    others find it then. So it is with what a later step reads, which trials of one first training share; what the first
    step reads is made before any trial starts. Those behind them in the queue do not wait.
    """

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left = {
            number: {found.location.uri: found for found in _made_once(trial)} for number, trial in enumerate(trials)
        }
        self._running: dict[str, dict[str, StageDirectory]] = {}

    @property
    def is_empty(self) -> bool:
        return not self._left

    def begin(self, run: str) -> int | None:
        """The number of the first trial that may run now, as `run`; None when all that are left have to wait."""
        under_way = {key: found for own in self._running.values() for key, found in own.items()}
        wanted = {key for own in self._left.values() for key in own}
        undone = {key for key in wanted & under_way.keys() if not under_way[key].done}
        number = next((number for number, own in self._left.items() if undone.isdisjoint(own)), None)
        if number is not None:
            self._running[run] = self._left.pop(number)
        return number

    def end(self, run: str) -> None:
        """`run` is over, whatever came of it."""
        self._running.pop(run, None)


def _made_once(trial: Trial) -> list[StageDirectory]:
    """What two trials must not make at the same time: see `TrialQueue`."""
    later = [stage_directory(step, stage) for step in trial.steps[1:] for stage in before_pretraining(step)]
    return [*map(_pretraining, trial.steps), *later]


def before_pretraining(step: Recipe) -> list[str]:
    """The stages that come before its pretraining, in order."""
    return stages(step)[: stages(step).index("pretrain")]


def _pretraining(step: Recipe) -> StageDirectory:
    return stage_directory(step, "pretrain")


def _trial(recipe: Recipe, variant: str | None, seed: int | None, number: int | None, found: dict[str, Any]) -> Trial:
    tune = section(recipe)
    own = {} if variant is None else tune.variants[variant]
    counts = [] if number is None else [f"{number:02d}"]
    name = "-".join([variant or "trial", *([] if seed is None else [str(seed)]), *counts])
    labels = {"variant": variant, "seed": seed}
    values = {**{key: value for key, value in labels.items() if value is not None}, **found}
    what = f"tune, {name} ({', '.join(f'{key} = {value}' for key, value in values.items())})"
    changed = {
        **{key: value for key, value in own.items() if key != FIRST},
        **{field: seed for field in tune.seed_fields},  # after whole sections, which have the seed in them
        **{key: value for key, value in found.items() if key != STAGED},
    }
    trained = {key: value for key, value in changed.items() if not _is_of_sft(key)}
    before = [{**trained, **first} for first in ([own[FIRST]] if FIRST in own else [])]
    before += [{**trained, **step} for step in (tune.staged if found.get(STAGED) else ())]
    earlier = _earlier_steps(recipe, before, what)
    last = _last_recipe(recipe, changed, {**trained, "tune": None, "sft": None, **_starting_from(earlier)}, what)
    return Trial(name, variant, values, (*before, changed), (*earlier, last))


def _earlier_steps(recipe: Recipe, changes: list[dict[str, Any]], what: str) -> list[Recipe]:
    """Recipes that end with pretraining, each of the model that the one before it made."""
    found: list[Recipe] = []
    for changed in changes:
        own = {**changed, **_starting_from(found), "tune": None, "sft": None, "evaluate": None}
        found.append(with_values(recipe, own, what))
    return found


def _is_of_sft(key: str) -> bool:
    return key.split(".", 1)[0] == "sft"


def _starting_from(earlier: list[Recipe]) -> dict[str, Any]:
    if not earlier:
        return {}
    made = _pretraining(earlier[-1]).location / "model"
    return {"model.base": made.uri, "model.revision": None, "model.init": "pretrained"}


def _last_recipe(recipe: Recipe, changed: dict[str, Any], trained: dict[str, Any], what: str) -> Recipe:
    """With its SFT where that is evaluated, and with those models alone evaluated that the trial trains.

    `changed`: the trial's own keys; `trained`: all of them, and no SFT.
    """
    pretrained = with_values(recipe, trained, what)
    if pretrained.evaluate is None or not section(recipe).evaluate:
        return with_values(pretrained, {"evaluate": None}, what)
    tuned = {key: value for key, value in changed.items() if _is_of_sft(key)}
    # other trials are evaluated at the same time
    workers = pretrained.cluster.evaluation_workers or pretrained.cluster.num_workers
    compared = {"evaluate.models": ["pretrained"], "cluster.evaluation_workers": workers}
    if "final" in pretrained.evaluate.models and (recipe.sft is not None or "sft" in tuned):
        sft = None if recipe.sft is None else recipe.sft.model_dump(mode="json", exclude_unset=True)
        models = [name for name in pretrained.evaluate.models if name in ("pretrained", "final")]
        compared = {**compared, "evaluate.models": models, "sft": sft, **tuned}
    return with_values(pretrained, compared, what)
