"""The trials of a recipe on a Ray cluster: several at a time, each a Ray Train run on nodes of its own.

Flows in: a recipe with [tune]. Flows out, below `<workdir>/tune-*/` and as tune/results.py says: `tune.json`, which the
report shows, and a record of each trial that is over. A trial runs the stages of the pipeline by the same functions, so
training goes on from its checkpoint when a trial was killed, and a trial that is over is not run again.

Read against Ray 2.60: a Tune trial is a driver of Ray Train V2, TuneReportCallback carries its reports.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from ultralong_ray.config import Recipe
from ultralong_ray.job import connect_to_ray, run_stage
from ultralong_ray.nodes import room_for
from ultralong_ray.plan import num_steps
from ultralong_ray.stages import TRIALS_FILE, stage_directory, stages
from ultralong_ray.storage import Location
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.tune.results import FINAL, as_text, is_over, table, write_record
from ultralong_ray.tune.trials import Trial, TrialQueue, before_pretraining, chosen_trials, plan_trials, section
from ultralong_ray.types import UserError

log = logging.getLogger("ultralong_ray")


def tune(recipe: Recipe, recipe_path: str, only: tuple[str, ...] = ()) -> None:
    """Run the trials that are not over, write the table and print it. `only`: variants to run; default all.

    Raises UserError for a search that cannot be, and at the end for the trials that failed.
    """
    planned = plan_trials(recipe)
    folder = stage_directory(recipe, "tune").location
    chosen = chosen_trials(planned, only)
    todo = _not_over(chosen, folder)
    if todo:
        connect_to_ray()
        _make_inputs(todo, recipe_path)
        _run(recipe, todo, folder, recipe_path)
    found = table(recipe, planned, folder)
    (folder / TRIALS_FILE).write_json(found)
    print(f"{as_text(found)}\ntable: {folder / TRIALS_FILE}", flush=True)
    names = {trial.name for trial in chosen}
    failed = [row for row in found["trials"] if row["trial"] in names and row["status"] not in FINAL]
    if failed:
        causes = "\n".join(f"  {row['trial']}: {row['cause'] or 'its process was lost'}" for row in failed)
        raise UserError(
            f"tune: {len(failed)} of {len(chosen)} trials are not over; submit again to go on from their last "
            f"checkpoints:\n{causes}"
        )


def prepare(recipe: Recipe, recipe_path: str, only: tuple[str, ...] = ()) -> None:
    """Pack what the first trainings of the trials that are not over read, and no more.

    `only` and UserError for a search that cannot be as in `tune`.
    """
    chosen = chosen_trials(plan_trials(recipe), only)
    for trial in _not_over(chosen, stage_directory(recipe, "tune").location):
        run_stage(trial.steps[0], "prepare", recipe_path)


def _not_over(chosen: list[Trial], folder: Location) -> list[Trial]:
    todo = [trial for trial in chosen if not is_over(trial, folder)]
    log.info("tune: %d trials, %d of them over; %s", len(chosen), len(chosen) - len(todo), folder)
    return todo


def _make_inputs(todo: list[Trial], recipe_path: str) -> None:
    """What the first steps of trials share is made once, before any starts: two would write the same folder."""
    for first in [trial.steps[0] for trial in todo]:
        for stage in before_pretraining(first):
            run_stage(first, stage, recipe_path)


def _run(recipe: Recipe, todo: list[Trial], folder: Location, recipe_path: str) -> None:
    tuning = section(recipe)
    at_once = tuning.trials_at_once or max(1, room_for(recipe, "pretrain"))
    work = ray_tune.with_parameters(_run_trial, trials=todo, folder=folder, recipe_path=recipe_path)
    # A trial's own process only waits for its training, so it sits on the head and takes nothing from the nodes.
    work = ray_tune.with_resources(work, {"node:__internal_head__": 0.001})
    # Trials read the recipe's relative paths as the driver does, not from a folder of Tune's.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # With a handler of its own for Ctrl-C Tune would end the trials and return as if they were over.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    storage = folder / "ray"
    ray_tune.Tuner(
        work,
        tune_config=ray_tune.TuneConfig(
            metric="loss",
            mode="min",
            scheduler=_scheduler(recipe, todo),
            search_alg=_InTurn(TrialQueue(todo)),
            num_samples=len(todo),
            max_concurrent_trials=min(at_once, len(todo)),
        ),
        run_config=ray_tune.RunConfig(
            name=f"trials-{int(time.time())}",
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.filesystem,
            failure_config=ray_tune.FailureConfig(max_failures=recipe.cluster.max_failures),
            callbacks=[_Recorder(todo, folder)],
            verbose=0,
        ),
    ).fit()


def _scheduler(recipe: Recipe, todo: list[Trial]) -> TrialScheduler:
    tuning = section(recipe)
    if not tuning.stop_early:
        return FIFOScheduler()
    steps = max(num_steps(trial.recipe.pretrain, trial.recipe.prepare.num_sequences) for trial in todo)
    grace = min(tuning.grace_steps, steps)
    # One step beyond the last, so that no trial is ended in the moment in which it is through.
    return _Halving(time_attr="step", max_t=steps + 1, grace_period=grace, reduction_factor=tuning.reduction_factor)


class _Halving(ASHAScheduler):
    """Ends trials on their way; one that is through its own steps goes on, to what comes after training."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result["step"] >= result["num_steps"] else decision


class _InTurn(Searcher):
    """Tells Tune which trial starts next."""

    def __init__(self, queue: TrialQueue) -> None:
        super().__init__(metric="loss", mode="min")
        self.queue = queue

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self.queue.is_empty:
            return Searcher.FINISHED
        number = self.queue.begin(trial_id)
        return None if number is None else {"trial": number}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        self.queue.end(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: an interrupted search is planned again, from the records of its trials."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class _Recorder(ray_tune.Callback):
    """Says of a trial that it is over when Tune ended it; trials that are through have said so themselves."""

    def __init__(self, trials: list[Trial], folder: Location) -> None:
        self.trials, self.folder = trials, folder

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = self.trials[trial.config["trial"]]
        if not ended.record(self.folder).exists():
            write_record(ended, self.folder, "stopped", "its loss was among the worse of those as far")


def _run_trial(config: Mapping[str, Any], trials: list[Trial], folder: Location, recipe_path: str) -> None:
    """One trial, in a process of its own. A mistake in its recipe is recorded; only a crash is tried again."""
    trial = trials[config["trial"]]
    record = trial.record(folder)
    if record.exists():  # a failure of an earlier submission, or another trial of this name
        record.delete_file()
    try:
        run_steps(trial, recipe_path)
    except UserError as error:
        write_record(trial, folder, "failed", str(error))
        return
    write_record(trial, folder, "done")
    final = read_metrics(stage_directory(trial.recipe, "pretrain").location)[-1]
    ray_tune.report({"step": final.step, "num_steps": final.num_steps, "loss": final.loss})


def run_steps(trial: Trial, recipe_path: str) -> None:
    """The stages of a trial that are not done, step after step; the last pretraining reports its losses to Tune."""
    for recipe in trial.steps:
        exported = recipe.evaluate is not None and "final" in recipe.evaluate.models
        for stage in [name for name in stages(recipe) if name != "report" and (name != "export" or exported)]:
            watched = (TuneReportCallback(),) if stage == "pretrain" and recipe is trial.recipe else ()
            run_stage(recipe, stage, recipe_path, callbacks=watched)
