"""The trials of a recipe as a dry run prints them: how many, what each changes, what their steps will take. No Ray."""

from __future__ import annotations

import json
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.plan import num_steps_known, plan_stages
from ultralong_ray.planner.plan import Planned
from ultralong_ray.planner.words import SECONDS_PER_HOUR
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import refusals_in_words
from ultralong_ray.tune.results import is_over
from ultralong_ray.tune.trials import Trial, chosen_trials, plan_trials, section
from ultralong_ray.types import UserError

VALUE_CHARACTERS = 40


def describe_trials(recipe: Recipe, only: tuple[str, ...] = ()) -> str:
    """A line for each variant and combination of searched values, its seeds together.

    Raises UserError for a search that cannot be, as for values that make no recipe.
    """
    trials = chosen_trials(plan_trials(recipe), only)
    folder = stage_directory(recipe, "tune").location
    try:
        with refusals_in_words():
            over = {trial.name for trial in trials if is_over(trial, folder.asked_once)}
        known = f"{len(over)} of them over"
    except (UserError, OSError) as error:
        over, known = set(), f"what is over is not known from here: {error}"
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(_title(recipe, trial), []).append(trial)
    lines = [f"tune        {_trials(trials)}, {known}; {folder}"]
    to_do: dict[str, float | None] = {}
    for title, members in groups.items():
        left = [trial for trial in members if trial.name not in over]
        trainings = [_trainings(trial) for trial in left]
        to_do |= {name: seconds for found in trainings for name, seconds in found.items()}
        cost = _cost(trainings[0]) if trainings else ""
        each = cost if len(members) == 1 else f"{cost} each"
        lines.append(f"  {title}: {_trials(members)}, {len(left)} to do{cost and f'; {each}'}")
    total = _cost(to_do)
    return "\n".join([*lines, *([f"  predicted {total}; start-up and evaluation come on top"] if total else [])])


def _trials(trials: list[Trial]) -> str:
    return "1 trial" if len(trials) == 1 else f"{len(trials)} trials"


def _title(recipe: Recipe, trial: Trial) -> str:
    """Its variant, and what that or the search changes."""
    tune = section(recipe)
    changes: dict[str, Any] = {} if trial.variant is None else dict(tune.variants[trial.variant])
    changes |= {key: trial.values[key] for key in tune.search}
    words = ", ".join(f"{key} = {_short(value)}" for key, value in changes.items())
    return " ".join(filter(None, [trial.variant, f"({words})" if words else ""]))


def _short(value: Any) -> str:
    words = json.dumps(value, default=str)
    return words if len(words) <= VALUE_CHARACTERS else f"{words[:VALUE_CHARACTERS]}..."


def _trainings(trial: Trial) -> dict[str, float | None]:
    """Place of each of its trainings -> GPU-seconds of its steps, alone on its GPUs; None where they are not known."""
    found: dict[str, float | None] = {}
    for step in trial.steps:
        # what a former step makes is not there yet, and has the same shape
        model = step.model.model_copy(update={"base": trial.steps[0].model.base})
        outcomes = plan_stages(step.model_copy(update={"model": model}))
        for (name, _, _), outcome in zip(step.train_stages(), outcomes, strict=True):
            stage = "sft" if name == "sft" else "pretrain"
            found[stage_directory(step, stage).location.uri] = _gpu_seconds(step, stage, outcome)
    return found


def _gpu_seconds(step: Recipe, stage: str, outcome: Planned | UserError) -> float | None:
    steps = num_steps_known(step, stage)
    if steps is None or isinstance(outcome, UserError) or outcome.prediction is None:
        return None
    return steps * outcome.prediction.step_seconds * outcome.prediction.work.hardware.num_gpus


def _cost(trainings: dict[str, float | None]) -> str:
    """Their sum in words; empty where one is not known."""
    known = [seconds for seconds in trainings.values() if seconds is not None]
    if not known or len(known) < len(trainings):
        return ""
    seconds = sum(known)
    return (
        f"{seconds:,.0f} GPU-seconds in steps"
        if seconds < SECONDS_PER_HOUR
        else f"{seconds / SECONDS_PER_HOUR:,.1f} GPU-hours in steps"
    )
