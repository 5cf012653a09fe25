"""A study's file becomes trials; a trial runs its stages once, in order, and its numbers are collected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralong_ray.recipe import load_recipe
from ultralong_ray.trials import Trial, collect, read_study, result_file, run_trial
from ultralong_ray.types import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = """
recipe = "{recipe}"
seeds = [1, 2]
seed_fields = ["prepare.seed", "pretrain.seed"]
[variants.plain]
[variants.none]
"prepare.separator" = "none"
[variants.twice.first]
"pretrain.steps" = 3
"""
# A job that does what every stage's script does, as far as a study sees: it is done, and it leaves numbers.
STAGE = """
import sys
sys.path.insert(0, {repository!r})
from pathlib import Path
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_directory
recipe = load_recipe(sys.argv[1], sys.argv[2:])
directory = stage_directory(recipe, {stage!r})
with open({log!r}, "a") as log:
    print({stage!r}, recipe.prepare.separator, recipe.pretrain.steps, recipe.model.base, file=log)
if {stage!r} == "evaluate":
    for depth, score in ((0, 1.0), (100, 0.5)):
        cell = {{"model": "final", "context_length_tokens": 64, "depth_percent": depth, "score": score}}
        (directory.location / f"cells/final/64-{{depth}}.json").write_json(cell)
if {stage!r} == {failing!r}:
    sys.exit("no such luck")
directory.mark_done({{"last_loss": 2.5}})
"""


@pytest.fixture
def study(tmp_path: Path) -> list[Trial]:
    path = tmp_path / "study.toml"
    path.write_text(STUDY.format(recipe=REPOSITORY / "jobs/recipes/quickstart.toml"))
    return read_study(path, (f"--workdir={tmp_path / 'runs'}", "--sft=null"))


def jobs(tmp_path: Path, failing: str = "") -> Path:
    folder = tmp_path / "jobs"
    folder.mkdir(exist_ok=True)
    for stage in ("prepare", "extend", "pretrain", "export", "evaluate"):
        fields = {"repository": str(REPOSITORY), "stage": stage, "log": str(tmp_path / "log"), "failing": failing}
        (folder / f"{stage}.py").write_text(STAGE.format(**fields))
    return folder


def test_every_variant_is_tried_with_every_seed(study: list[Trial]) -> None:
    assert [trial.name for trial in study] == ["plain-1", "plain-2", "none-1", "none-2", "twice-1", "twice-2"]
    recipe = load_recipe(study[3].recipe, list(study[3].overrides))
    assert (recipe.prepare.separator, recipe.prepare.seed, recipe.pretrain.seed) == ("none", 2, 2)
    assert study[4].first is not None and "--pretrain.steps=3" in study[4].first


def test_a_trial_runs_what_is_not_done_and_leaves_its_numbers(study: list[Trial], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trial none-1: export ended with status 1\n(.|\n)*no such luck"):
        run_trial(study[2], jobs(tmp_path, failing="export"), str(tmp_path))
    assert collect(study) == []
    run_trial(study[2], jobs(tmp_path), str(tmp_path))
    ran = [line.split()[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert ran == ["prepare", "extend", "pretrain", "export", "export", "evaluate"]
    (found,) = collect(study)
    assert (found["variant"], found["seed"], found["training"]["last_loss"]) == ("none", 1, 2.5)
    assert found["scores"] == {"final/passkey/64": 0.75}
    assert json.loads(Path(result_file(study[2]).path).read_text()) == found


def test_the_second_step_starts_from_the_first(study: list[Trial], tmp_path: Path) -> None:
    run_trial(study[4], jobs(tmp_path), str(tmp_path))
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [line[0] for line in lines[:4]] == ["prepare", "extend", "pretrain", "prepare"]
    assert lines[2][2] == "3" and lines[2][3].endswith("tiny-512")
    assert "/pretrain-" in lines[3][3] and lines[3][3].endswith("/model")


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text("seeds = [1]")
    with pytest.raises(UserError, match="a study needs recipe, seeds, seed_fields"):
        read_study(tmp_path / "study.toml")


def test_the_ablations_of_the_reproduction_are_recipes() -> None:
    trials = read_study(REPOSITORY / "jobs/recipes/reproduction/ablations.toml")
    assert len({trial.name for trial in trials}) == len(trials) >= 54
