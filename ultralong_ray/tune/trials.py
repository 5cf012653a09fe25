"""[tune] of a recipe to its trials, and what trials left behind to one table. No Ray.

A trial is a recipe, so its stages have directories of their own and are found again. Beside them, in the folder of the
search, `trials/<name>.json` says that a trial is over: {"status": "done" | "stopped" | "failed", "cause"}.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.config.tune import STAGED, RangeConfig, TuneConfig
from ultralong_ray.recipe import with_values
from ultralong_ray.stages import stage_directory, stage_fingerprint
from ultralong_ray.storage import Location
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.types import UserError

TABLE_FILE = "tune.json"  # report/tuning.py shows it
FINAL = ("done", "stopped")  # a failed trial is tried again by the next submission


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination of values. `steps`: the recipes to train one after the other; the last one is compared."""

    name: str
    values: dict[str, Any]
    steps: tuple[Recipe, ...]

    @property
    def recipe(self) -> Recipe:
        return self.steps[-1]

    def record(self, folder: Location) -> Location:
        return folder / "trials" / f"{self.name}.json"


def section(recipe: Recipe) -> TuneConfig:
    if recipe.tune is None:
        raise UserError(
            "the recipe has no [tune] section, which says what to try; its fields: ultralong_ray/config/tune.py"
        )
    return recipe.tune


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


def plan_trials(recipe: Recipe, folder: Location) -> list[Trial]:
    """The trials of a recipe whose search writes to `folder`.

    Raises UserError for values that make no valid recipe, and for trials that would train the same thing.
    """
    tune = section(recipe)
    found = [_trial(recipe, f"trial-{i:02d}", values, folder) for i, values in enumerate(combinations(tune))]
    by_training: dict[str, str] = {}
    for trial in found:
        other = by_training.setdefault(stage_fingerprint(trial.recipe, "pretrain"), trial.name)
        if other != trial.name:
            raise UserError(
                f"tune.search: {other} and {trial.name} train the same thing, since training does not depend on every "
                f"key of {', '.join(tune.search)}; take out values or keys that change nothing"
            )
    return found


def _trial(recipe: Recipe, name: str, values: dict[str, Any], folder: Location) -> Trial:
    tune = section(recipe)
    chosen = {"tune": None, "sft": None, **{key: value for key, value in values.items() if key != STAGED}}
    earlier: list[Recipe] = []
    what = f"tune, {name} ({', '.join(f'{key} = {value}' for key, value in values.items())})"
    for number, overrides in enumerate(tune.staged if values.get(STAGED) else (), start=1):
        # a folder of its own: the first steps of two trials may be equal, and both may run at once
        own = {"workdir": (folder / name / f"step-{number}").uri, "evaluate": None}
        earlier.append(with_values(recipe, {**chosen, **_starting_from(earlier), **overrides, **own}, what))
    last = {**chosen, **_starting_from(earlier), **_comparison(recipe, tune)}
    return Trial(name, values, (*earlier, with_values(recipe, last, what)))


def _starting_from(earlier: list[Recipe]) -> dict[str, Any]:
    if not earlier:
        return {}
    made = stage_directory(earlier[-1], "pretrain").location / "model"
    return {"model.base": made.uri, "model.revision": None, "model.init": "pretrained"}


def _comparison(recipe: Recipe, tune: TuneConfig) -> dict[str, Any]:
    if recipe.evaluate is None or not tune.evaluate:
        return {"evaluate": None}
    workers = recipe.cluster.evaluation_workers or recipe.cluster.num_workers  # other trials run at the same time
    return {"evaluate.models": ["pretrained"], "cluster.evaluation_workers": workers}


def status_of(trial: Trial, folder: Location) -> dict[str, Any]:
    """{"status", "cause"}; status "waiting" for a trial that is not over."""
    record = trial.record(folder)
    return record.read_json() if record.exists() else {"status": "waiting", "cause": None}


def table(recipe: Recipe, planned: list[Trial], folder: Location) -> dict[str, Any]:
    """What tune.json holds: the trials, best first, each with its values, numbers and loss curve."""
    tune = section(recipe)
    rows = [_row(trial, folder) for trial in planned]
    ranked_by = "passkey" if any(row["passkey_beyond_base_window"] is not None for row in rows) else "loss"
    rows.sort(key=lambda row: _rank(row, ranked_by))
    best = rows[0]["trial"] if rows and rows[0]["status"] == "done" else None
    return {"keys": list(tune.search), "ranked_by": ranked_by, "best": best, "trials": rows}


def _row(trial: Trial, folder: Location) -> dict[str, Any]:
    records = read_metrics(stage_directory(trial.recipe, "pretrain").location)
    evaluated = _passkey(trial.recipe)
    return {
        "trial": trial.name,
        "values": trial.values,
        **status_of(trial, folder),
        "steps": records[-1].step if records else 0,
        "num_steps": records[-1].num_steps if records else None,
        "tokens": records[-1].tokens if records else 0,
        "loss": records[-1].loss if records else None,
        "seconds": sum(record.step_seconds for record in records),
        "passkey_within_base_window": evaluated.get("mean_within_base_window"),
        "passkey_beyond_base_window": evaluated.get("mean_beyond_base_window"),
        "curve": {"step": [record.step for record in records], "loss": [record.loss for record in records]},
    }


def _passkey(recipe: Recipe) -> dict[str, Any]:
    if recipe.evaluate is None:
        return {}
    directory = stage_directory(recipe, "evaluate")
    return directory.summary()["models"]["pretrained"] if directory.done else {}


def _rank(row: dict[str, Any], ranked_by: str) -> tuple[Any, ...]:
    """Finished trials first, by what they were measured by; the others by how far they got."""
    loss = math.inf if row["loss"] is None else row["loss"]
    if row["status"] != "done":
        return (1, -row["steps"], loss)
    beyond = row["passkey_beyond_base_window"]
    return (0, -(beyond or 0.0), loss) if ranked_by == "passkey" else (0, loss)


def as_text(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    heads = ["trial", *found["keys"], "status", "steps", "loss", "passkey within", "passkey beyond"]
    lines = [heads]
    for row in found["trials"]:
        numbers = [row["loss"], row["passkey_within_base_window"], row["passkey_beyond_base_window"]]
        shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
        values = [_short(row["values"][key]) for key in found["keys"]]
        lines.append([row["trial"], *values, row["status"], f"{row['steps']}/{row['num_steps'] or '-'}", *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
