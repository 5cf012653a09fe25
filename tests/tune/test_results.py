"""What trials leave: a record each, which stands for the trial on any machine, and the table made of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.report.tuning import tuning_charts, tuning_facts
from ultralong_ray.stages import stage_directory, stages
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train.metrics import METRICS_FILE
from ultralong_ray.tune import run
from ultralong_ray.tune.results import as_text, is_over, record_of, table, write_record
from ultralong_ray.tune.trials import Trial, plan_trials
from ultralong_ray.types import StepMetrics, UserError

RATES = "pretrain.learning_rate"
VARIANTS: dict[str, Any] = {
    "plain": {"evaluate.models": ["pretrained"]},
    "twice": {"pretrain.steps": 5, "first": {"pretrain.steps": 3}},
}


def planned_trials(tiny_recipe: Callable[..., Recipe], tune: dict[str, Any]) -> tuple[Recipe, Location, list[Trial]]:
    recipe = tiny_recipe(tune=tune)
    folder = stage_directory(recipe, "tune").location
    return recipe, folder, plan_trials(recipe)


def write_metrics(recipe: Recipe, losses: list[float]) -> None:
    fields = dataclasses.fields(StepMetrics)
    rest = {field.name: 1 for field in fields} | {"num_steps": 4, "mfu": None, "step_seconds": 2.0}
    rows = [{**rest, "step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (stage_directory(recipe, "pretrain").location / METRICS_FILE).write_bytes("".join(lines).encode())


def finish(trial: Trial, folder: Location, status: str, losses: list[float], beyond: float | None = None) -> None:
    """What a trial leaves: metrics, its evaluation where it was made, and its record."""
    write_metrics(trial.recipe, losses)
    if beyond is not None:
        scores = {"mean_within_base_window": 1.0, "mean_beyond_base_window": beyond}
        stage_directory(trial.recipe, "evaluate").mark_done({"models": {trial.outcome: scores}})
    write_record(trial, folder, status)


def test_the_table_is_ranked_and_whole(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe, folder, planned = planned_trials(tiny_recipe, {"search": {RATES: [1e-5, 1e-4, 1e-3, 1e-2]}})
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


@pytest.fixture
def stages_ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Recipe]]:
    """Stages are done at once, with numbers as the real ones leave them; each is noted. "export" fails the first time.

    What Ray does is left out: a trial runs here, and its report to Tune goes nowhere.
    """
    ran: list[tuple[str, Recipe]] = []

    def run_stage(recipe: Recipe, stage: str, recipe_path: str, **_: Any) -> StageDirectory:
        directory = stage_directory(recipe, stage)
        if directory.done:
            return directory
        ran.append((stage, recipe))
        if stage == "export" and [name for name, _ in ran].count("export") == 1:
            raise UserError("no such luck")
        if stage == "pretrain":
            write_metrics(recipe, [3.0, 2.5])
        if stage == "evaluate":
            for depth, score in ((0, 1.0), (100, 0.5)):
                samples: list[dict[str, Any]] = [{"facts": {"words": "built in"}}, {}]
                cell = {"model": "final", "task": "passkey", "context_length_tokens": 64, "score": score}
                cell |= {"samples": samples}
                (directory.location / f"cells/final/64-{depth}.json").write_json(cell)
            (directory.location / "perplexity/final.json").write_json({"model": "final", "loss": [2.0, 1.0]})
        scores = {"mean_within_base_window": 1.0, "mean_beyond_base_window": 0.75}
        models = {"models": {"pretrained": scores, "final": scores}} if stage == "evaluate" else {}
        directory.mark_done({**models, "last_loss": 2.5, "seconds": 4.0})
        return directory

    monkeypatch.setattr(run, "run_stage", run_stage)
    monkeypatch.setattr(run, "TuneReportCallback", object)
    monkeypatch.setattr(run.ray_tune, "report", lambda metrics: None)
    return ran


def test_a_trial_runs_what_is_not_done_and_leaves_its_numbers(
    tiny_recipe: Callable[..., Recipe], stages_ran: list[tuple[str, Recipe]]
) -> None:
    _, folder, planned = planned_trials(tiny_recipe, {"variants": VARIANTS})
    twice = planned[1]
    run._run_trial({"trial": 1}, planned, folder, "recipe.toml")
    failed = record_of(twice, folder)
    assert failed is not None and (failed["status"], failed["cause"]) == ("failed", "no such luck")
    assert not is_over(twice, folder)
    run._run_trial({"trial": 1}, planned, folder, "recipe.toml")
    first, last = ["prepare", "extend", "pretrain"], ["prepare", "prepare_sft", "extend", "pretrain", "sft", "export"]
    assert [name for name, _ in stages_ran] == [*first, *last, "export", "evaluate"]
    assert stages_ran[2][1].pretrain.steps == 3
    assert stages_ran[6][1].model.base.endswith(f"{stage_directory(twice.steps[0], 'pretrain').location.name}/model")
    record = twice.record(folder).read_json()
    assert (record["status"], record["values"], record["loss"]) == ("done", {"variant": "twice"}, 2.5)
    assert record["scores"] == {"final/passkey/64": 0.75} and record["made_from"] == ["words: built in"]
    assert record["perplexity"] == [{"model": "final", "loss": [2.0, 1.0]}]
    assert [sorted(step) for step in record["training"]] == [["pretrain"], ["pretrain", "sft"]]
    assert record["training"][1]["sft"]["last_loss"] == 2.5
    assert sum(sum(step.values()) for step in record["stage_seconds"]) == 4.0 * 10


def test_a_trial_without_sft_is_neither_tuned_nor_exported(
    tiny_recipe: Callable[..., Recipe], stages_ran: list[tuple[str, Recipe]]
) -> None:
    _, folder, planned = planned_trials(tiny_recipe, {"variants": VARIANTS})
    run._run_trial({"trial": 0}, planned, folder, "recipe.toml")
    assert [name for name, _ in stages_ran] == ["prepare", "extend", "pretrain", "evaluate"]
    assert is_over(planned[0], folder)


def test_records_alone_stand_for_the_trials_on_another_machine(
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No stage is there, and nothing may connect to Ray: only the records are."""
    tune = {"variants": VARIANTS, "seeds": [1], "seed_fields": ["prepare.seed"]}
    recipe, folder, planned = planned_trials(tiny_recipe, tune)
    for trial, beyond in zip(planned, (0.4, 0.8), strict=True):
        finish(trial, folder, "done", [3.0, 2.0], beyond)
    here = table(recipe, planned, folder)
    moved = recipe.model_copy(update={"workdir": str(tmp_path / "elsewhere")})
    there = stage_directory(moved, "tune").location
    shutil.copytree((folder / "trials").path, (there / "trials").path)
    arrived = [
        name
        for trial in plan_trials(moved)
        for name in stages(trial.recipe)
        if stage_directory(trial.recipe, name).done
    ]
    assert arrived == []
    monkeypatch.setattr(run, "connect_to_ray", lambda: pytest.fail("a trial that is over would run again"))
    run.tune(moved, "recipe.toml")
    assert "twice-1" in capsys.readouterr().out
    assert (there / "tune.json").read_json() == json.loads(json.dumps(here))
    assert here["keys"] == ["variant", "seed"] and [row["trial"] for row in here["trials"]] == ["twice-1", "plain-1"]


def test_a_record_of_other_values_is_not_this_trial(tiny_recipe: Callable[..., Recipe]) -> None:
    _, folder, planned = planned_trials(tiny_recipe, {"variants": VARIANTS})
    finish(planned[1], folder, "done", [3.0])
    changed = {**VARIANTS, "twice": {"pretrain.steps": 5, "first": {"pretrain.steps": 4}}}
    _, same, others = planned_trials(tiny_recipe, {"variants": changed})
    assert same == folder and is_over(planned[1], folder) and not is_over(others[1], folder)
