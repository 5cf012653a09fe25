"""The trials of [tune]: their table (`<workdir>/tune-*/tune.json`, see ultralong_ray/tune/trials.py) to the page.

Flows in: the recipe, whose fingerprint says which table is its own. Flows out: one part of report.json, and its charts.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ultralong_ray.config import Recipe
from ultralong_ray.report import words
from ultralong_ray.report.figures import Axis, Line, line_chart
from ultralong_ray.report.reading import StageReader
from ultralong_ray.stages import TRIALS_FILE, stage_directory

STYLES = {"best": "loss", "stopped": "rate"}  # classes of the page's style sheet; the others are plain
LOGARITHMIC_ABOVE = 20.0  # times from the smallest to the largest value of a key


def tuning_facts(recipe: Recipe, notes: list[str]) -> dict[str, Any] | None:
    """The table of this recipe's trials with the file it came from; None where the recipe has no [tune]."""
    if recipe.tune is None:
        return None
    reader = StageReader(stage_directory(recipe, "tune"), notes)
    found = reader.read_json(TRIALS_FILE)
    return None if found is None else {**found, "file": reader.name(TRIALS_FILE)}


def tuning_charts(tuning: dict[str, Any] | None) -> list[Markup]:
    """Loss by step of all trials, and the last loss against every searched key whose values are numbers."""
    if tuning is None:
        return []
    trials = [trial for trial in tuning["trials"] if trial["curve"]["step"]]
    across = Axis("optimizer step", "linear", words.tokens)
    up = Axis("loss, nats per token", "linear", words.tick)
    curves = [
        Line(trial["trial"], _style(tuning, trial), trial["curve"]["step"], trial["curve"]["loss"]) for trial in trials
    ]
    charts = [line_chart("tuning-loss", "Loss of the trials", curves, across, up)]
    for number, key in enumerate(tuning["keys"]):
        values = [trial["values"][key] for trial in trials]
        if key == "seed":  # its order means nothing
            continue
        if len(set(map(str, values))) < 2 or not all(_is_number(value) for value in values):
            continue
        wide = min(values) > 0 and max(values) / min(values) >= LOGARITHMIC_ABOVE
        axis = Axis(key, "log10" if wide else "linear", words.tick)
        points = [Line(t["trial"], _style(tuning, t), [t["values"][key]], [t["loss"]]) for t in trials]
        charts.append(line_chart(f"tuning-key-{number}", f"Last loss by {key}", points, axis, up, height=200))
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _style(tuning: dict[str, Any], trial: dict[str, Any]) -> str:
    return STYLES.get("best" if trial["trial"] == tuning["best"] else trial["status"], "")
