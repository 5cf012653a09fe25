"""What `jobs/tune.py` refuses before it asks for a cluster, and how Ctrl-C ends it."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune as ray_tune
from ray.tune.tune import _setup_signal_catching

from ultralong_ray.config import Recipe
from ultralong_ray.stages import stage_directory
from ultralong_ray.tune import run
from ultralong_ray.tune.results import write_record
from ultralong_ray.tune.trials import TrialQueue, plan_trials
from ultralong_ray.types import UserError


def test_a_recipe_without_the_section_is_told_where_its_fields_are(tiny_recipe: Callable[..., Recipe]) -> None:
    for action in (run.tune, run.prepare):
        with pytest.raises(UserError, match=r"has no \[tune\] section.*config/tune.py"):
            action(tiny_recipe(), "recipe.toml")


def test_prepare_alone_packs_what_trials_that_are_not_over_read(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = {"prepare.separator": "none", "first": {"prepare.separator": "bos_eos"}}
    recipe = tiny_recipe(
        tune={"variants": {"plain": {}, "two_steps": twice, "none": {"prepare.separator": "none"}}, "evaluate": False}
    )
    plain, *_ = plan_trials(recipe)
    write_record(plain, stage_directory(recipe, "tune").location, "stopped", "by hand")
    ran: list[tuple[str, str]] = []
    monkeypatch.setattr(run, "run_stage", lambda step, stage, _: ran.append((stage, step.prepare.separator)))
    run.prepare(recipe, "recipe.toml")
    assert ran == [("prepare", "bos_eos"), ("prepare", "none")]
    ran.clear()
    run.prepare(recipe, "recipe.toml", ("none",))
    assert ran == [("prepare", "none")]


def test_ctrl_c_ends_the_command_and_not_its_trials_alone(
    tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tuner:
        """Ray's own answer to Ctrl-C, around no trial."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            _setup_signal_catching()
            signal.raise_signal(signal.SIGINT)

    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    monkeypatch.setattr(ray_tune, "Tuner", Tuner)
    monkeypatch.delenv("TUNE_DISABLE_SIGINT_HANDLER", raising=False)
    recipe = tiny_recipe(tune={"search": {"pretrain.learning_rate": [1e-4, 1e-3]}, "trials_at_once": 1})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run._run(recipe, plan_trials(recipe), stage_directory(recipe, "tune").location, "recipe.toml")
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def test_no_trial_is_ended_for_having_more_steps_than_the_recipe_or_when_it_is_through(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    search = {"pretrain.steps": [3, 9], "pretrain.learning_rate": [1e-4, 1e-3]}
    recipe = tiny_recipe(pretrain={"steps": 2}, tune={"search": search, "grace_steps": 3, "reduction_factor": 3.0})
    todo = plan_trials(recipe)
    halving: Any = run._scheduler(recipe, todo)
    halving.set_search_properties("loss", "min")
    runs = [SimpleNamespace(trial_id=trial.name) for trial in todo]

    def decision(number: int, step: int, loss: float) -> str:
        return halving.on_trial_result(None, runs[number], {"step": step, "num_steps": steps[number], "loss": loss})

    steps = [trial.recipe.pretrain.steps for trial in todo]
    assert steps == [3, 3, 9, 9]
    for each in runs:
        halving.on_trial_add(None, each)
    assert [decision(2, step, 1.0) for step in (3, 6, 9)] == ["CONTINUE"] * 3
    assert decision(0, 3, 5.0) == "CONTINUE", "the worst, and through"
    assert decision(3, 3, 5.0) == "STOP", "the worst of those as far, on its way"


def test_tune_is_told_which_trial_starts_next(tiny_recipe: Callable[..., Recipe]) -> None:
    """And waits while there is one that may not start yet; its copy of the queue is its own."""
    recipe = tiny_recipe(tune={"variants": {"plain": {}, "longer": {"sft.steps": 3}}})
    trials = plan_trials(recipe)
    order = copy.deepcopy(run._InTurn(TrialQueue(trials)))
    assert order.set_search_properties("loss", "min", {}) and (order.metric, order.mode) == ("loss", "min")
    assert [order.suggest("a"), order.suggest("b")] == [{"trial": 0}, None]
    order.on_trial_complete("a", error=True)
    assert [order.suggest("b"), order.suggest("c")] == [{"trial": 1}, "FINISHED"]
