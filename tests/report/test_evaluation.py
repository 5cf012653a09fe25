"""Cells and curves become grids, means and a verdict; what is missing or damaged is never a 0."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.report.made_run import made_cell, made_recipe, write_cell, write_json, write_run
from ultralong_ray.report.evaluation import evaluation_facts, verdict
from ultralong_ray.report.reading import StageReader


def _facts(workdir: Path, **evaluate: object):
    recipe = made_recipe(workdir, **evaluate)
    return recipe, write_run(recipe)["evaluate"]


def test_grid_holds_the_stored_scores_by_depth_and_length(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    passkey = evaluation_facts(recipe, StageReader(stage))["passkey"]
    base, final = passkey["models"]
    assert [grid["model"] for grid in passkey["models"]] == ["base", "final"]
    assert [[cell["score"] for cell in row] for row in base["cells"]] == [[1.0, 1.0, 0.0, 0.0]] * 3
    assert [[cell["score"] for cell in row] for row in final["cells"]] == [[1.0] * 4, [1.0, 1.0, 1.0, 0.8], [1.0] * 4]
    cell = final["cells"][1][3]
    assert (cell["context_length_tokens"], cell["depth_percent"], cell["num_right"], cell["num_samples"]) == (
        4096,
        50.0,
        4,
        5,
    )
    assert (stage.location.parent / cell["file"]).read_json()["score"] == 0.8


def test_means_split_at_the_base_window_which_belongs_to_the_window(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    write_cell(stage, made_cell("base", 512, 0.0, 2))
    base, final = evaluation_facts(recipe, StageReader(stage))["passkey"]["models"]
    assert base["mean_within_base_window"] == pytest.approx(5.4 / 6)
    assert base["mean_beyond_base_window"] == 0.0
    assert base["mean"] == pytest.approx(5.4 / 12)
    assert final["mean_beyond_base_window"] == pytest.approx(5.8 / 6)
    assert final["mean"] == pytest.approx(11.8 / 12)
    assert (final["min_cell"], final["min_cell_context_length_tokens"], final["min_cell_depth_percent"]) == (
        0.8,
        4096,
        50.0,
    )


def test_missing_and_damaged_cells_are_none_and_leave_the_mean_alone(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    (tmp_path / stage.location.name / "cells/final/4096-50.json").unlink()
    (stage.location / "cells/final/4096-100.json").write_bytes(b'{"model": "final", "context_')
    write_json(stage, "cells/final/4096-0.json", {**made_cell("final", 4096, 0.0, 5), "score": 1.2})
    write_json(stage, "cells/final/1024-0.json", {"model": "final", "score": 1.0})
    reader = StageReader(stage)
    final = evaluation_facts(recipe, reader)["passkey"]["models"][1]
    assert [row[3] for row in final["cells"]] == [None, None, None]
    assert (final["num_cells"], final["num_missing"], final["mean"]) == (8, 4, 1.0)
    for name in ("4096-100.json is not valid JSON", "4096-0.json has score 1.2", "1024-0.json is no passkey cell"):
        assert any(name in note for note in reader.notes), (name, reader.notes)


def test_a_failed_cell_counts_0_and_says_why(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    file = "cells/final/4096-50.json"
    (tmp_path / stage.location.name / file).unlink()
    place = {"model": "final", "task": "passkey", "context_length_tokens": 4096, "depth_percent": 50, "section": -1}
    write_json(stage, "plan.json", {"cells": [{**place, "file": file}]})
    write_json(stage, "failed.json", {file: "its worker was lost 3 times"})
    facts = evaluation_facts(recipe, StageReader(stage))
    final = facts["passkey"]["models"][1]
    cell = final["cells"][1][3]
    assert (cell["score"], cell["failed"]) == (0.0, "its worker was lost 3 times")
    assert (final["num_failed"], final["num_missing"], final["mean"]) == (1, 0, pytest.approx(11 / 12))
    assert facts["benchmarks"] is None and "1 cell failed and counted as 0." in verdict(facts["passkey"])


def test_a_model_without_cells_is_a_grid_of_missing_cells(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path, models=["base", "extended", "final"])
    extended = evaluation_facts(recipe, StageReader(stage))["passkey"]["models"][1]
    assert (extended["mean"], extended["min_cell"], extended["num_missing"]) == (None, None, 12)


def test_verdict_says_the_computed_numbers(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    passkey = evaluation_facts(recipe, StageReader(stage))["passkey"]
    text = " ".join(verdict(passkey)).replace("\N{NO-BREAK SPACE}", " ")
    assert (
        "base model, whose window is 512 tokens, finds the passkey in 100 % of the questions within 512 tokens" in text
    )
    assert "and in 0 % beyond." in text
    assert "The final model finds it in 100 % of the questions within 512 tokens and in 96.7 % beyond" in text
    assert "up to 4,096 tokens or 8 times the window, in 98.3 %" in text
    assert "weakest cell is 80 %, at 4,096 tokens and depth 50 %" in text
    assert "missing" not in text
    assert verdict(None) == []


def test_verdict_names_missing_cells_and_skips_what_was_not_measured(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path, context_lengths=[256, 512])
    for path in (tmp_path / stage.location.name / "cells").glob("*/[14]*.json"):
        path.unlink()
    (tmp_path / stage.location.name / "cells/base/256-50.json").unlink()
    text = " ".join(verdict(evaluation_facts(recipe, StageReader(stage))["passkey"]))
    assert "beyond" not in text
    assert "1 cell is missing" in text


def test_perplexity_is_exp_of_the_stored_loss_and_not_finite_is_none(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    path = tmp_path / stage.location.name / "perplexity/base.json"
    path.write_text('{"model": "base", "bucket_end_tokens": [512, 1024, 2048], "loss": [2.0, NaN, 800.0]}')
    base, final = evaluation_facts(recipe, StageReader(stage))["perplexity"]["models"]
    assert base["perplexity"] == [math.exp(2.0), None, None]
    assert final["perplexity"] == [math.exp(x) for x in (2.0, 1.9, 1.8, 1.7)]


def test_a_curve_of_unequal_lengths_is_a_note(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    write_json(stage, "perplexity/base.json", {"model": "base", "bucket_end_tokens": [512], "loss": [1.0, 2.0]})
    reader = StageReader(stage)
    models = evaluation_facts(recipe, reader)["perplexity"]["models"]
    assert [curve["model"] for curve in models] == ["final"]
    assert any("1 bucket ends and 2 losses" in note for note in reader.notes)


def test_cells_outside_the_recipe_are_shown(tmp_path: Path) -> None:
    recipe, stage = _facts(tmp_path)
    write_cell(stage, made_cell("final", 8192, 25.0, 3))
    passkey = evaluation_facts(recipe, StageReader(stage))["passkey"]
    assert passkey["context_lengths_tokens"] == [256, 512, 1024, 4096, 8192]
    assert passkey["depths_percent"] == [0.0, 25.0, 50.0, 100.0]
    assert passkey["models"][1]["cells"][1][4]["score"] == 0.6
