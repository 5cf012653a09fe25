"""A run folder becomes one part of the JSON: of the right training, with every sample counted once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import write_cell, write_json
from tests.report.reproduction.made_reproduction import (
    WINDOW,
    passkey_cell,
    write_evaluation,
    write_extension,
    write_task,
)
from ultralong_ray.report.intervals import wilson
from ultralong_ray.report.reproduction.runs import read_part
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import StageDirectory

LENGTHS = [1024, 4096, 131072]
DEPTHS = [0.0, 100.0]
TASKS = {"ruler/vt": [4096, 131072], "ruler/cwe": [4096, 131072], "short_skills/copying": [0]}


def _part(folder: Path) -> dict[str, Any]:
    part = read_part(folder)
    assert part is not None
    return part


def _as_if_later(stage: StageDirectory, seconds: float) -> None:
    file = Path(stage.location.path) / "_SUCCESS.json"
    later = file.stat().st_mtime + seconds
    os.utime(file, (later, later))


def test_trainings_machine_and_gpu_seconds_are_those_of_the_run(tmp_path: Path) -> None:
    write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS)
    part = _part(tmp_path)
    assert (part["base_window_tokens"], part["target_tokens"]) == (WINDOW, 131072)
    assert part["training"]["pretrain"]["steps"] == 5 and part["training"]["pretrain"]["step_seconds"] == 40.0
    assert part["training"]["sft"]["tokens"] == 3 * 8192
    assert part["machine"] == {
        "cluster": "2 x H200",
        "python": "3.12.3",
        "packages": {"torch": "2.11.0"},
        "git_commit": "abc",
    }
    # three stages on two GPUs; the others take none
    assert part["stages"]["prepare"]["gpus"] == 0 and part["gpu_seconds"] == 3 * 100 * 2
    assert part["notes"] == []


def test_seconds_before_a_resumption_are_added(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {})
    stage_directory(recipe, "pretrain").mark_done({"seconds": 30.0, "resumed_from_step": 2})
    assert _part(tmp_path)["stages"]["pretrain"]["seconds"] == 30 + 2 * 8


def test_grids_hold_every_cell_at_its_place(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {})
    cells = Path(stage_directory(recipe, "evaluate").location.path) / "cells"
    (cells / "final" / "1024-0.json").unlink()
    grids = {grid["model"]: grid for grid in _part(tmp_path)["passkey"]}
    assert grids["base"]["scores"] == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    assert grids["base"]["num_cells_all_right"] == 4 and grids["base"]["samples_per_cell"] == 5
    assert grids["final"]["scores"] == [[None, 1.0, 0.8], [1.0, 1.0, 0.8]] and grids["final"]["num_cells"] == 5


def test_means_are_over_tasks_by_length_and_over_lengths_to_each_bound(tmp_path: Path) -> None:
    write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS, models=("final",))
    found = _part(tmp_path)["benchmarks"]
    scores = {(s["task"], s["context_length_tokens"]): s["percent"] for s in found["scores"]}
    assert scores["ruler/vt", 4096] == 75.0 and scores["ruler/cwe", 4096] == 100.0
    means = {(m["suite"], m["context_length_tokens"]): m for m in found["means"]}
    assert means["ruler", 4096]["percent"] == 87.5 and means["ruler", 4096]["num_tasks"] == 2
    to = {(m["suite"], m["task"], m["to_tokens"]): m for m in found["means_to"]}
    assert to["ruler", None, 4096]["percent"] == 87.5 and to["ruler", None, 4096]["context_lengths_tokens"] == [4096]
    all_lengths = [scores[task, length] for task in ("ruler/vt", "ruler/cwe") for length in (4096, 131072)]
    assert to["ruler", None, 131072]["percent"] == pytest.approx(sum(all_lengths) / 4)
    assert to["short_skills", "short_skills/copying", 4096]["num_samples"] == 8


def test_documents_that_have_changed_make_no_mean_with_the_others(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {"perplexity/code": [2048]}, models=("base", "final"))
    made_from = {s["model"]: s["made_from"] for s in _part(tmp_path)["benchmarks"]["scores"]}
    assert made_from["base"] == made_from["final"] and made_from["base"].startswith("documents at 2048 tokens: ")
    file = stage_directory(recipe, "evaluate").location / "cells/final/perplexity/code/2048-shard0.json"
    stored = file.read_json()
    stored["samples"][0]["prompt_end"] = "another end"
    file.write_json(stored)
    found = _part(tmp_path)["benchmarks"]
    assert len({mean["made_from"] for mean in found["means_to"] if mean["to_tokens"] == WINDOW}) == 2


def test_one_task_over_lengths_has_an_interval_even_when_all_is_right(tmp_path: Path) -> None:
    write_extension(
        tmp_path, 131072, [1024], DEPTHS, {"short_skills/a": [1024], "ruler/vt": [1024, 2048, 4096]}, ("base",)
    )
    found = {m["task"]: m for m in _part(tmp_path)["benchmarks"]["means_to"] if m["to_tokens"] == WINDOW}
    low, high = wilson(round(24 * found["ruler/vt"]["percent"] / 100), 24)
    assert (found["ruler/vt"]["low"], found["ruler/vt"]["high"]) == (100 * low, 100 * high)


def test_a_newer_evaluation_of_the_same_model_counts_and_the_older_fills_in(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {"ruler/vt": [4096, 131072]}, models=("final",))
    assert recipe.evaluate is not None
    newer = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"seed": 7})})
    stage = stage_directory(newer, "evaluate")
    assert stage.location.name != stage_directory(recipe, "evaluate").location.name
    write_evaluation(stage, 131072, LENGTHS[:2], DEPTHS, {}, ("final",))
    write_json(stage, "plan.json", {"cells": [write_task(stage, "final", "ruler/vt", 4096, [0.0, 1.0])]})
    write_json(stage, "recipe.json", newer.model_dump(mode="json"))
    stage.mark_done({"seconds": 10.0})
    _as_if_later(stage, 60)
    part = _part(tmp_path)
    scores = {s["context_length_tokens"]: s for s in part["benchmarks"]["scores"]}
    assert scores[4096]["percent"] == 50.0 and scores[131072]["num_samples"] == 8
    (grid,) = part["passkey"]  # the recipe asks both for the same lengths
    assert grid["context_lengths_tokens"] == list(LENGTHS) and grid["num_missing"] == 0
    assert part["stages"]["evaluate"]["seconds"] == 110.0


def test_lengths_asked_by_two_evaluations_are_one_grid(tmp_path: Path) -> None:
    write_extension(tmp_path, 131072, LENGTHS[1:], DEPTHS, {}, models=("final",))
    other = write_extension(tmp_path, 131072, LENGTHS[:2], DEPTHS, {}, models=("final",))
    write_cell(stage_directory(other, "evaluate"), passkey_cell("final", LENGTHS[1], DEPTHS[0], 1))
    _as_if_later(stage_directory(other, "evaluate"), 60)
    (grid,) = _part(tmp_path)["passkey"]
    assert grid["context_lengths_tokens"] == list(LENGTHS) and grid["num_cells"] == len(LENGTHS) * len(DEPTHS)
    assert grid["scores"][0][1] == 0.2, "the newer one counts where both asked"
    cells = [score for row in grid["scores"] for score in row]
    assert grid["mean"] == pytest.approx(sum(cells) / len(cells))
    inside = [score for row in grid["scores"] for score, n in zip(row, LENGTHS, strict=True) if n <= 4096]
    assert grid["mean_within_base_window"] == pytest.approx(sum(inside) / len(inside))
    # other depths are another grid
    thinner = write_extension(tmp_path, 131072, LENGTHS[:1], DEPTHS[:1], {}, models=("final",))
    _as_if_later(stage_directory(thinner, "evaluate"), 120)
    assert [len(grid["depths_percent"]) for grid in _part(tmp_path)["passkey"]] == [len(DEPTHS), 1]


def test_an_evaluation_of_another_training_is_not_mixed_in(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS, models=("base", "final"))
    other = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS, models=("base", "final"), learning_rate=1e-3)
    # of the older run the base counts, which both share; its final model is another one
    older = stage_directory(recipe, "evaluate")
    _as_if_later(stage_directory(other, "evaluate"), 60)
    write_json(
        older, "plan.json", {"cells": [write_task(older, m, "ruler/fwe", 4096, [1.0]) for m in ("base", "final")]}
    )
    part = _part(tmp_path)
    asked = {(s["model"], s["task"]) for s in part["benchmarks"]["scores"]}
    assert ("base", "ruler/fwe") in asked and ("final", "ruler/fwe") not in asked
    assert stage_directory(recipe, "pretrain").location.name not in part["folders"]
    assert stage_directory(other, "pretrain").location.name in part["folders"]


def test_what_is_of_another_training_is_named(tmp_path: Path) -> None:
    older = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS)
    newer = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS, learning_rate=1e-3)
    _as_if_later(stage_directory(newer, "evaluate"), 60)
    (note,) = _part(tmp_path)["notes"]
    of_older, of_newer = ([stage_directory(r, s).location.name for s in ("pretrain", "sft")] for r in (older, newer))
    assert all(name in note for name in of_older) and not any(name in note for name in of_newer)
    assert f"pretrained and final of {stage_directory(older, 'evaluate').location.name}" in note


def test_the_newest_evaluation_is_the_one_that_says_so_wherever_it_was_copied(tmp_path: Path) -> None:
    older = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS)
    newer = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, TASKS, learning_rate=1e-3)
    for recipe, ended in ((older, 1_000.0), (newer, 2_000.0)):
        stage_directory(recipe, "evaluate").mark_done({"seconds": 1.0, "ended": ended})
    _as_if_later(stage_directory(older, "evaluate"), 60)  # as a copy has it
    assert stage_directory(newer, "pretrain").location.name in _part(tmp_path)["folders"]


def test_evaluations_on_other_numbers_of_gpus_each_count_their_own(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {})
    assert recipe.evaluate is not None
    asked = {"evaluate": recipe.evaluate.model_copy(update={"models": ("base",)})}
    alone = recipe.model_copy(update={**asked, "cluster": recipe.cluster.model_copy(update={"num_workers": 1})})
    stage = stage_directory(alone, "evaluate")
    write_evaluation(stage, 131072, LENGTHS, DEPTHS, {}, ("base",))
    write_json(stage, "recipe.json", alone.model_dump(mode="json"))
    stage.mark_done({"seconds": 10.0})
    _as_if_later(stage, 60)
    assert _part(tmp_path)["gpu_seconds"] == 3 * 100 * 2 + 10
    shares = alone.model_dump(mode="json")
    shares["cluster"]["evaluation_workers"] = 5  # with half a GPU each, three GPUs are at work
    write_json(stage, "recipe.json", shares)
    assert _part(tmp_path)["gpu_seconds"] == 3 * 100 * 2 + 3 * 10
    cpus = alone.model_dump(mode="json")
    cpus["evaluate"]["gpus_per_task"] = 0.0  # how it runs, not what it asks: the same stage
    write_json(stage, "recipe.json", cpus)
    assert _part(tmp_path)["gpu_seconds"] == 3 * 100 * 2


def test_a_folder_without_a_finished_training_is_no_part(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {})
    for success in tmp_path.glob("*/_SUCCESS.json"):
        success.unlink()
    assert read_part(tmp_path) is None
    stage_directory(recipe, "prepare").mark_done({"seconds": 1.0})
    assert read_part(tmp_path) is None


def test_a_recipe_of_another_version_is_named(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path, 131072, LENGTHS, DEPTHS, {})
    file = Path(stage_directory(recipe, "sft").location.path) / "recipe.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "unknown": 1}))
    part = _part(tmp_path)
    assert "sft" not in part["training"] and any(file.parent.name in note for note in part["notes"])
