"""Trials of [tune]: which there are, which are refused, and the table that is made of what they left."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.config.tune import TuneConfig
from ultralong_ray.report.tuning import tuning_charts, tuning_facts
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location
from ultralong_ray.train.metrics import METRICS_FILE
from ultralong_ray.tune.trials import Trial, as_text, combinations, plan_trials, table
from ultralong_ray.types import StepMetrics, UserError

RATES = "pretrain.learning_rate"


def tuned(tiny_recipe: Callable[..., Recipe], search: dict[str, Any], **more: Any) -> tuple[Recipe, Location]:
    recipe = tiny_recipe(tune={"search": search, **more})
    return recipe, stage_directory(recipe, "tune").location


def test_every_combination_once_and_draws_that_repeat() -> None:
    search = {RATES: {"low": 1e-5, "high": 1e-3, "log": True}, "model.rope.factor": [4, 8]}
    first = combinations(TuneConfig.model_validate({"search": search, "samples": 3}))
    assert [row["model.rope.factor"] for row in first] == [4, 8] * 3
    rates = [row[RATES] for row in first]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and rates[0] == rates[1] and len(set(rates)) == 3
    assert combinations(TuneConfig.model_validate({"search": search, "samples": 3})) == first
    assert combinations(TuneConfig.model_validate({"search": search, "samples": 3, "seed": 1})) != first


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"search": {RATES: []}}, "has no values"),
        ({"search": {RATES: {"low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"search": {RATES: {"low": 0, "high": 1, "log": True}}}, "needs low above 0"),
        ({"search": {RATES: [1e-3]}, "samples": 2}, "would repeat equal trials"),
        ({"search": {"staged": [False, True]}}, "needs tune.staged"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tune: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TuneConfig.model_validate(tune)


def test_each_trial_is_the_recipe_with_its_values(tiny_recipe: Callable[..., Recipe]) -> None:
    search = {RATES: [1e-4, 2e-4], "pretrain.mask_documents": [False, True], "prepare.separator": ["<s>", "none"]}
    recipe, folder = tuned(tiny_recipe, search)
    planned = plan_trials(recipe, folder)
    assert len(planned) == 8
    last = planned[-1].recipe
    assert (last.pretrain.learning_rate, last.pretrain.mask_documents, last.prepare.separator) == (2e-4, True, "none")
    assert last.sft is None and last.evaluate is not None and last.evaluate.models == ("pretrained",)
    assert len({stage_directory(trial.recipe, "pretrain").location.uri for trial in planned}) == 8


def test_what_trials_cannot_be_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"(?s)trial-00.*pretrain\.learning_rat = .*unknown key"):
        plan_trials(*tuned(tiny_recipe, {"pretrain.learning_rat": [1e-4]}))
    with pytest.raises(UserError, match=r"(?s)trial-01.*prepare.sequence_length 1024 is beyond"):
        plan_trials(*tuned(tiny_recipe, {"prepare.sequence_length": [512, 1024]}))
    with pytest.raises(UserError, match="trial-00 and trial-01 train the same thing"):
        plan_trials(*tuned(tiny_recipe, {"evaluate.samples_per_cell": [1, 2]}))
    with pytest.raises(UserError, match=r"no \[tune\] section"):
        plan_trials(tiny_recipe(), Location.of("/nowhere"))


def test_a_staged_trial_trains_on_what_its_former_step_made(tiny_recipe: Callable[..., Recipe]) -> None:
    half = {"model.target_context_length": 256, "prepare.sequence_length": 256, "model.rope.factor": 4.0}
    recipe, folder = tuned(tiny_recipe, {"staged": [False, True], RATES: [1e-4, 2e-4]}, staged=[half])
    one, _, staged, other = plan_trials(recipe, folder)
    assert len(one.steps) == 1 and len(staged.steps) == 2
    first, last = staged.steps
    assert (first.prepare.sequence_length, first.model.rope.factor, first.evaluate) == (256, 4.0, None)
    assert last.prepare.sequence_length == 512
    assert last.model.base == (stage_directory(first, "pretrain").location / "model").uri
    # two trials may take their first steps at the same time
    assert not {step.workdir for step in staged.steps[:1]} & {step.workdir for step in other.steps[:1]}


def finish(trial: Trial, folder: Location, status: str, losses: list[float], beyond: float | None = None) -> None:
    """What a trial leaves: metrics, and its evaluation where it was made."""
    fields = dataclasses.fields(StepMetrics)
    rest = {field.name: 1 for field in fields} | {"num_steps": 4, "mfu": None, "step_seconds": 2.0}
    rows = [{**rest, "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (stage_directory(trial.recipe, "pretrain").location / METRICS_FILE).write_bytes("".join(lines).encode())
    trial.record(folder).write_json({"status": status, "cause": None})
    if beyond is not None:
        scores = {"mean_within_base_window": 1.0, "mean_beyond_base_window": beyond}
        stage_directory(trial.recipe, "evaluate").mark_done({"models": {"pretrained": scores}})


def test_the_table_is_ranked_and_whole(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, folder = tuned(tiny_recipe, {RATES: [1e-5, 1e-4, 1e-3, 1e-2]})
    planned = plan_trials(recipe, folder)
    finish(planned[0], folder, "done", [3.0, 2.0, 1.5, 1.4], beyond=0.2)
    finish(planned[1], folder, "done", [3.0, 2.5, 2.2, 2.0], beyond=0.9)
    finish(planned[2], folder, "stopped", [9.0])
    found = table(recipe, planned, folder)
    assert [row["trial"] for row in found["trials"]] == ["trial-01", "trial-00", "trial-02", "trial-03"]
    assert [row["status"] for row in found["trials"]] == ["done", "done", "stopped", "waiting"]
    assert found["best"] == "trial-01" and found["ranked_by"] == "passkey"
    assert found["trials"][1]["curve"] == {"step": [1, 2, 3, 4], "loss": [3.0, 2.0, 1.5, 1.4]}
    text = as_text(found)
    assert len(text.splitlines()) == 5 and "0.0001" in text and "1/4" in text
    (folder / "tune.json").write_json(found)
    notes: list[str] = []
    facts = tuning_facts(recipe, notes)
    assert facts is not None and not notes and facts["file"].startswith("tune-")
    loss, by_rate = tuning_charts(facts)
    assert all(f"trial-0{i}" in loss for i in range(3)) and by_rate.count("<circle") == 3
    assert tuning_facts(tiny_recipe(), notes) is None and tuning_charts(None) == []
