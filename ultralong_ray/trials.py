"""A study: one recipe in many variants and seeds, as trials of Ray Tune, each the project's own jobs one after another.

    recipe = "ablation_128k.toml"             beside the study's file
    seeds = [1, 2, 3]
    seed_fields = ["prepare.seed"]            dotted keys of the recipe that take the seed
    [variants.no_separator]                   dotted keys and their values; an empty table is the recipe itself
    "prepare.separator" = "none"
    [variants.two_steps.first]                trained before, and where the variant starts from
    "model.target_context_length" = 32768

A trial writes `<workdir>/trials/<variant>-<seed>.json`; one that has it is not run again, and one that was cut short
continues with the stage that it was in. Read against Ray 2.60 (Tune's function API).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import JOB_OF_STAGE, stage_directory, stages, workdir
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """One variant with one seed: the overrides of its recipe, and of the training before it where it has two steps."""

    variant: str
    seed: int
    recipe: str  # path
    overrides: tuple[str, ...]
    first: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


def read_study(path: Path, more: tuple[str, ...] = ()) -> list[Trial]:
    """The trials of a study's file, variant after variant. `more` overrides go to every trial.

    Raises UserError for a file that is no study, and what `load_recipe` raises for a variant that is no recipe.
    """
    try:
        study = tomllib.loads(path.read_text())
        recipe = str(path.parent / study["recipe"])
        seeds, fields, variants = study["seeds"], study["seed_fields"], study["variants"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        fields = "recipe, seeds, seed_fields and [variants]"
        raise UserError(f"study {path}: {type(error).__name__} {error}; a study needs {fields}") from None
    trials = []
    for variant, values in variants.items():
        for seed in seeds:
            seeded = [f"--{field}={seed}" for field in fields]
            first = values.get("first")
            own = {key: value for key, value in values.items() if key != "first"}
            overrides = (*seeded, *_overrides(own), *more)
            before = None if first is None else (*seeded, *_overrides(first), *more)
            trials.append(Trial(variant, seed, recipe, overrides, before))
    for trial in trials:
        load_recipe(trial.recipe, list(trial.overrides))
    return trials


def _overrides(values: dict[str, Any]) -> list[str]:
    return [f"--{key}={json.dumps(value)}" for key, value in values.items()]


def result_file(trial: Trial) -> Location:
    """Where a finished trial's numbers are."""
    recipe = load_recipe(trial.recipe, list(trial.overrides))
    return workdir(recipe) / "trials" / f"{trial.name}.json"


def run_study(trials: list[Trial], side_by_side: int, jobs: Path) -> None:
    """Run the trials that have no result yet, `side_by_side` at a time. Raises UserError naming those that failed."""
    from ray import tune

    todo = [trial for trial in trials if not result_file(trial).exists()]
    log.info("study: %d trials, %d of them done", len(trials), len(trials) - len(todo))
    if not todo:
        return
    by_name = {trial.name: trial for trial in todo}
    cwd = os.getcwd()

    def trainable(config: dict[str, Any]) -> dict[str, Any]:
        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        return run_trial(by_name[config["trial"]], jobs, cwd)

    root = workdir(load_recipe(todo[0].recipe, list(todo[0].overrides)))
    tuner = tune.Tuner(
        # The stages ask Ray for their own GPUs; the trial itself only waits for them.
        tune.with_resources(trainable, {"cpu": 0.1}),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(max_concurrent_trials=side_by_side),
        run_config=tune.RunConfig(name="study", storage_path=(root / "tune").path, verbose=0),
    )
    tuner.fit()
    failed = [trial.name for trial in todo if not result_file(trial).exists()]
    if failed:
        raise UserError(
            f"study: no result of {', '.join(failed)}; see their logs below {root / 'trials'}, and run again"
        )


def run_trial(trial: Trial, jobs: Path, cwd: str) -> dict[str, Any]:
    """The stages of a trial as child processes, then its numbers, which are also written. Raises UserError."""
    began = time.monotonic()
    if trial.first is not None:
        before = replace(trial, variant=f"{trial.variant}-first", overrides=trial.first, first=None)
        recipe = _run_stages(before, jobs, cwd, ("prepare", "extend", "pretrain"))
        base = (stage_directory(recipe, "pretrain").location / "model").path
        trial = replace(trial, overrides=(*trial.overrides, f"--model.base={base}"))
    recipe = _run_stages(trial, jobs, cwd, None)
    numbers = {**asdict(trial), **trial_numbers(recipe), "seconds": round(time.monotonic() - began, 1)}
    (workdir(recipe) / "trials" / f"{trial.name}.json").write_json(numbers)
    return {"last_loss": numbers["training"]["last_loss"]}


def _run_stages(trial: Trial, jobs: Path, cwd: str, wanted: tuple[str, ...] | None) -> Recipe:
    """Run the stages of the trial's recipe, up to evaluate, that are not done. Raises UserError with the log's end."""
    recipe = load_recipe(trial.recipe, list(trial.overrides))
    log_file = Path((workdir(recipe) / "trials" / f"{trial.name}.log").path)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    for stage in wanted or [name for name in stages(recipe) if name != "report"]:
        if stage_directory(recipe, stage).done:
            continue
        command = [sys.executable, str(jobs / f"{JOB_OF_STAGE.get(stage, stage)}.py"), trial.recipe, *trial.overrides]
        with log_file.open("a") as sink:
            status = subprocess.run(command, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT, check=False).returncode
        if status:
            end = "\n".join(log_file.read_text().splitlines()[-5:])
            raise UserError(f"trial {trial.name}: {stage} ended with status {status}\n{end}")
    return recipe


def trial_numbers(recipe: Recipe) -> dict[str, Any]:
    """What a finished trial is compared by: its training, mean scores by model, task and length, losses by position."""
    training = {name: stage_directory(recipe, name).summary() for name in ("pretrain", "sft") if name in stages(recipe)}
    evaluation = stage_directory(recipe, "evaluate").location
    scores: dict[str, list[float]] = defaultdict(list)
    curves = []
    for file in evaluation.files(recursive=True):
        if "/cells/" in file.uri and file.name.endswith(".json"):
            cell = file.read_json()
            key = "/".join((cell["model"], str(cell.get("task") or "passkey"), str(cell["context_length_tokens"])))
            scores[key].append(cell["score"])
        elif "/perplexity/" in file.uri and file.name.endswith(".json"):
            curves.append(file.read_json())
    means = {key: sum(values) / len(values) for key, values in sorted(scores.items())}
    return {"training": training["pretrain"], "sft": training.get("sft"), "scores": means, "perplexity": curves}


def collect(trials: list[Trial]) -> list[dict[str, Any]]:
    """The numbers of all finished trials, in the order of the study."""
    return [result_file(trial).read_json() for trial in trials if result_file(trial).exists()]
