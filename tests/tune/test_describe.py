"""What a dry run says of the trials of a recipe."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from ultralong_ray import storage
from ultralong_ray.config import Recipe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_directory
from ultralong_ray.tune.describe import describe_trials
from ultralong_ray.tune.results import write_record
from ultralong_ray.tune.trials import plan_trials
from ultralong_ray.types import StorageOptions, UserError

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = ROOT / "jobs/recipes/reproduction/ablations.toml"


def ablations(workdir: Path | str, *more: str) -> Recipe:
    base = str(ROOT / "jobs/models/reproduction-base")
    return load_recipe(str(ABLATIONS), ["--workdir", str(workdir), "--model.base", base, *more])


def gpu_seconds(text: str) -> int:
    return int(re.findall(r"predicted ([\d,]+) GPU-seconds in steps;", text)[0].replace(",", ""))


def test_every_variant_has_a_line_and_what_is_over_costs_nothing(tmp_path: Path) -> None:
    recipe = ablations(tmp_path, "--cluster.gpu", "H200")
    text = describe_trials(recipe)
    assert text.startswith("tune        63 trials, 0 of them over")
    assert '  separator_none (prepare.separator = "none"): 3 trials, 3 to do; ' in text
    assert text.count("GPU-seconds in steps each") == 21
    (each,) = re.findall(r"separator_none .*; (\d+) GPU-seconds in steps each", text)
    trial = next(trial for trial in plan_trials(recipe) if trial.name == "separator_none-1")
    write_record(trial, stage_directory(recipe, "tune").location, "done")
    after = describe_trials(recipe)
    assert "63 trials, 1 of them over" in after and "3 trials, 2 to do" in after
    assert gpu_seconds(text) - gpu_seconds(after) == pytest.approx(int(each), abs=1)


def test_a_pretraining_that_trials_share_is_counted_once(tmp_path: Path) -> None:
    recipe = ablations(tmp_path, "--cluster.gpu", "H200")
    plain, tuned, both = (
        gpu_seconds(describe_trials(recipe, only)) for only in (("recipe",), ("sft_short",), ("recipe", "sft_short"))
    )
    assert plain < tuned == both


def test_without_a_gpu_there_is_no_prediction(tmp_path: Path) -> None:
    text = describe_trials(ablations(tmp_path), ("recipe", "rope_ntk"))
    assert "  recipe: 3 trials, 3 to do\n" in text and "GPU-seconds" not in text


def test_searched_values_are_named(tiny_recipe: Callable[..., Recipe]) -> None:
    text = describe_trials(tiny_recipe(tune={"search": {"pretrain.learning_rate": [1e-4, 2e-4]}}))
    assert "tune        2 trials" in text and "(pretrain.learning_rate = 0.0002): 1 trial, 1 to do" in text


def test_a_dry_run_refuses_a_search_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--only none: no such variant"):
        describe_trials(ablations(tmp_path), ("none",))
    command = [sys.executable, "jobs/tune.py", str(ABLATIONS), "--dry-run", "--workdir", str(tmp_path)]
    base = ["--model.base", "jobs/models/reproduction-base"]
    done = subprocess.run([*command, *base], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "63 trials" in done.stdout
    failed = subprocess.run([*command, *base, "--only", "none"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and "no such variant" in failed.stderr


def test_a_store_that_refuses_is_asked_once_and_spoils_no_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def refuses(root: str, options: StorageOptions) -> pafs.FileSystem:
        if not root:
            return pafs.LocalFileSystem()
        asked.append(options.max_attempts)
        raise OSError("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body.")

    monkeypatch.setattr(storage, "_filesystem_of", refuses)
    text = describe_trials(ablations("s3://bucket/run"))
    assert re.search("what is over is not known from here: .* the bucket lies in another region", text)
    assert asked == [1]
