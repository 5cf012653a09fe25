"""Stage graph and fingerprints: what changes a stage's directory, and what is said when an input is missing."""

from pathlib import Path

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.report.page import write_report
from ultralong_ray.stages import inputs, require_inputs, stage_directory, stage_fingerprint, stages
from ultralong_ray.types import MissingInput

QUICKSTART = str(Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "quickstart.toml")


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, list(overrides))


def changed(*overrides: str) -> set[str]:
    before, after = recipe_with(), recipe_with(*overrides)
    return {stage for stage in stages(before) if stage_fingerprint(before, stage) != stage_fingerprint(after, stage)}


def test_inputs_come_before_the_stages_that_read_them():
    recipe = recipe_with()
    order = stages(recipe)
    for stage in order:
        assert all(order.index(name) < order.index(stage) for name in inputs(recipe, stage))


def test_a_change_reaches_its_stage_and_what_follows_and_nothing_else():
    after_training = {"sft", "export", "evaluate", "report"}
    assert changed("--pretrain.learning_rate", "1e-3") == {"pretrain"} | after_training
    assert changed("--prepare.seed", "1") == {"prepare", "pretrain"} | after_training
    assert changed("--model.rope.factor", "16") == {"extend", "pretrain"} | after_training
    assert changed("--model.rope.angles", "float32") == {"extend", "pretrain"} | after_training
    assert changed("--sft.max_sample_tokens", "512") == {"prepare_sft"} | after_training
    assert changed("--sft.long_samples_first", "true") == {"prepare_sft"} | after_training
    assert changed("--evaluate.samples_per_cell", "2") == {"evaluate", "report"}


def test_operational_fields_change_nothing():
    overrides = ["--pretrain.checkpoint_every_steps", "1", "--pretrain.sequence_parallel_degree", "1"]
    overrides += ["--cluster.num_workers", "4", "--prepare.num_workers", "3", "--evaluate.cpus_per_task", "2"]
    assert changed(*overrides) == set()


def test_missing_inputs_are_named_with_the_command_that_makes_them(tmp_path: Path):
    recipe = recipe_with("--workdir", str(tmp_path))
    with pytest.raises(MissingInput) as refusal:
        require_inputs(recipe, "pretrain", "r.toml")
    assert "prepare-" in str(refusal.value)
    assert "python jobs/extend.py r.toml" in str(refusal.value)
    for name in inputs(recipe, "pretrain"):
        stage_directory(recipe, name).mark_done({})
    with pytest.raises(
        MissingInput, match=r"extend-\w+ is done, but its model is gone: .*python jobs/extend\.py r\.toml"
    ):
        require_inputs(recipe, "pretrain", "r.toml")
    (stage_directory(recipe, "extend").location / "model" / "config.json").write_json({})
    require_inputs(recipe, "pretrain", "r.toml")


def test_a_report_needs_one_finished_stage_and_is_written_anew_until_all_are(tmp_path: Path):
    recipe = recipe_with("--workdir", str(tmp_path))
    with pytest.raises(MissingInput, match=r"evaluate\.py"):
        require_inputs(recipe, "report", "r.toml")
    for number, name in enumerate(inputs(recipe, "report"), start=1):
        stage_directory(recipe, name).mark_done({})
        require_inputs(recipe, "report", "r.toml")
        directories = {stage: stage_directory(recipe, stage) for stage in stages(recipe)}
        directories["report"].mark_done(write_report(recipe, directories, directories["report"]))
        assert directories["report"].done
        assert directories["report"].settled == (number == len(inputs(recipe, "report")))


def test_an_evaluation_needs_prepared_data_only_for_what_is_held_out(tmp_path: Path):
    place = ("--workdir", str(tmp_path), "--evaluate.models", '["base"]')
    with pytest.raises(MissingInput, match=r"prepare\.py"):
        require_inputs(recipe_with(*place), "evaluate", "r.toml")
    none = (*place, "--prepare.holdout_sequences", "0")
    require_inputs(recipe_with(*none), "evaluate", "r.toml")
    with pytest.raises(MissingInput, match=r"prepare\.py"):
        require_inputs(recipe_with(*none, "--prepare.holdout_ids", '["a book"]'), "evaluate", "r.toml")


def test_a_half_written_stage_is_not_done(tmp_path: Path):
    directory = stage_directory(recipe_with("--workdir", str(tmp_path)), "prepare")
    (directory.location / "manifest.json").write_json({})
    assert not directory.done
    directory.mark_done({"tokens": 3})
    assert directory.done
    assert directory.summary()["tokens"] == 3


def test_a_report_of_trials_alone_needs_their_table_and_no_stage(tmp_path: Path):
    search = {"search": {"pretrain.learning_rate": [1e-5, 3e-5]}}
    untuned = recipe_with("--workdir", str(tmp_path))
    recipe = Recipe.model_validate({**untuned.model_dump(), "tune": search})
    with pytest.raises(MissingInput):
        require_inputs(recipe, "report", "r.toml")
    (stage_directory(recipe, "tune").location / "tune.json").write_json({"keys": [], "trials": [], "best": None})
    require_inputs(recipe, "report", "r.toml")
    with pytest.raises(MissingInput):
        require_inputs(recipe, "export", "r.toml")
