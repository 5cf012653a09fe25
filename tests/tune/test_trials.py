"""Trials of [tune]: which there are, which are refused, and in which order they may run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.config.tune import TuneConfig
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_directory, stage_fingerprint
from ultralong_ray.storage import Location
from ultralong_ray.tune.trials import Trial, TrialQueue, chosen_trials, combinations, plan_trials
from ultralong_ray.types import UserError

ABLATIONS = Path(__file__).resolve().parents[2] / "jobs/recipes/reproduction/ablations.toml"
RATES = "pretrain.learning_rate"
HALF = {"model.target_context_length": 256, "prepare.sequence_length": 256, "model.rope.factor": 4.0}
VARIANTS: dict[str, Any] = {
    "plain": {"evaluate.models": ["pretrained"]},
    "none": {"prepare.separator": "none", "evaluate.models": ["pretrained"]},
    "twice": {"pretrain.steps": 5, "first": {**HALF, "pretrain.steps": 3}},
}


def tuned(tiny_recipe: Callable[..., Recipe], search: dict[str, Any], **more: Any) -> Recipe:
    return tiny_recipe(tune={"search": search, **more})


def test_every_combination_once_and_draws_that_repeat() -> None:
    search = {RATES: {"low": 1e-5, "high": 1e-3, "log": True}, "model.rope.factor": [4, 8]}
    first = combinations(TuneConfig.model_validate({"search": search, "samples": 3}))
    assert [row["model.rope.factor"] for row in first] == [4, 8] * 3
    rates = [row[RATES] for row in first]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and rates[0] == rates[1] and len(set(rates)) == 3
    assert combinations(TuneConfig.model_validate({"search": search, "samples": 3})) == first
    assert combinations(TuneConfig.model_validate({"search": search, "samples": 3, "seed": 1})) != first


def test_a_range_has_a_folder_of_its_own(tiny_recipe: Callable[..., Recipe]) -> None:
    ranges = [{"low": 1e-5, "high": high} for high in (1e-4, 1e-3)]
    first, other = (tuned(tiny_recipe, {RATES: limits}) for limits in ranges)
    assert stage_fingerprint(first, "tune") != stage_fingerprint(other, "tune")


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"search": {RATES: []}}, "has no values"),
        ({"search": {RATES: {"low": 2, "high": 1}}}, "low 2 is not below high 1"),
        ({"search": {RATES: {"low": 0, "high": 1, "log": True}}}, "needs low above 0"),
        ({"search": {RATES: [1e-3]}, "samples": 2}, "would repeat equal trials"),
        ({"search": {"staged": [False, True]}}, "needs tune.staged"),
        ({}, "needs tune.search, tune.variants or tune.seeds"),
        ({"seeds": [1]}, "tune.seeds and tune.seed_fields need each other"),
        (
            {"seeds": [1, 2, 1, 3, 3], "seed_fields": ["prepare.seed"]},
            r"tune\.seeds \[1, 2, 1, 3, 3\] has 1, 3 more than once",
        ),
        ({"variants": {"a/b": {}}}, "'a/b' names files"),
        ({"variants": {"twice": {"first": 3}}}, "tune.variants.twice.first is a table"),
    ],
)
def test_a_search_that_cannot_be_is_refused(tune: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TuneConfig.model_validate(tune)


def test_each_trial_is_the_recipe_with_its_values(tiny_recipe: Callable[..., Recipe]) -> None:
    search = {RATES: [1e-4, 2e-4], "pretrain.mask_documents": [False, True], "prepare.separator": ["<s>", "none"]}
    recipe = tuned(tiny_recipe, search)
    planned = plan_trials(recipe)
    assert len(planned) == 8
    last = planned[-1].recipe
    assert (last.pretrain.learning_rate, last.pretrain.mask_documents, last.prepare.separator) == (2e-4, True, "none")
    assert last.sft is not None and last.evaluate is not None and last.evaluate.models == ("pretrained", "final")
    assert len({stage_directory(trial.recipe, "pretrain").location.uri for trial in planned}) == 8


def test_what_trials_cannot_be_is_refused(tiny_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"(?s)trial-00.*pretrain\.learning_rat = .*unknown key"):
        plan_trials(tuned(tiny_recipe, {"pretrain.learning_rat": [1e-4]}))
    with pytest.raises(UserError, match=r"(?s)trial-01.*prepare.sequence_length 1024 is beyond"):
        plan_trials(tuned(tiny_recipe, {"prepare.sequence_length": [512, 1024]}))
    with pytest.raises(UserError, match="trial-00 and trial-01 train the same thing"):
        plan_trials(tuned(tiny_recipe, {"evaluate.samples_per_cell": [1, 2]}))
    with pytest.raises(UserError, match=r"no \[tune\] section"):
        plan_trials(tiny_recipe())


def test_a_staged_trial_trains_on_what_its_former_step_made(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tuned(tiny_recipe, {"staged": [False, True], RATES: [1e-4, 2e-4]}, staged=[HALF])
    one, two, staged, other = plan_trials(recipe)
    assert len(one.steps) == 1 and len(staged.steps) == 2
    first, last = staged.steps
    assert (first.prepare.sequence_length, first.model.rope.factor, first.evaluate) == (256, 4.0, None)
    assert last.prepare.sequence_length == 512
    assert last.model.base == (stage_directory(first, "pretrain").location / "model").uri
    # they share nothing, so all of them may run at once
    assert len(Runs([one, two, staged, other]).begin()) == 4


class Runs:
    """Trials of a queue that run, by name."""

    def __init__(self, trials: list[Trial]) -> None:
        self.trials, self.queue = trials, TrialQueue(trials)
        self.run_of: dict[str, str] = {}

    def begin(self) -> list[str]:
        """All that may start now."""
        found: list[str] = []
        while (number := self.queue.begin(run := f"run {len(self.run_of)}")) is not None:
            found.append(self.trials[number].name)
            self.run_of[found[-1]] = run
        return found

    def end(self, name: str) -> None:
        self.queue.end(self.run_of[name])


def varied(tiny_recipe: Callable[..., Recipe], **more: Any) -> Recipe:
    fields = {"variants": VARIANTS, "seeds": [1, 2], "seed_fields": ["prepare.seed", "sft.seed"], **more}
    return tiny_recipe(tune=fields)


def test_every_variant_is_tried_with_every_seed_and_combination(tiny_recipe: Callable[..., Recipe]) -> None:
    planned = plan_trials(varied(tiny_recipe))
    assert [trial.name for trial in planned] == ["plain-1", "plain-2", "none-1", "none-2", "twice-1", "twice-2"]
    none = planned[3]
    assert none.values == {"variant": "none", "seed": 2}
    assert (none.recipe.prepare.separator, none.recipe.prepare.seed) == ("none", 2)
    crossed = plan_trials(varied(tiny_recipe, search={RATES: [1e-4, 2e-4]}))
    assert len(crossed) == 12 and crossed[1].name == "plain-1-01"
    assert crossed[1].recipe.pretrain.learning_rate == 2e-4 and crossed[1].recipe.prepare.seed == 1
    assert [trial.name for trial in chosen_trials(planned, ("twice", "plain"))] == [
        *("plain-1", "plain-2", "twice-1", "twice-2")
    ]
    with pytest.raises(UserError, match="--only twise: no such variant; there are plain, none, twice"):
        chosen_trials(planned, ("twise",))


def test_a_variant_starts_from_its_first_training(tiny_recipe: Callable[..., Recipe]) -> None:
    trial = plan_trials(varied(tiny_recipe))[4]
    first, last = trial.steps
    assert (first.pretrain.steps, first.prepare.sequence_length, first.prepare.seed) == (3, 256, 1)
    assert first.sft is None and first.evaluate is None
    assert (last.pretrain.steps, last.prepare.sequence_length) == (5, 512) and last.sft is not None
    assert last.model.base == (stage_directory(first, "pretrain").location / "model").uri


def test_sft_is_of_the_trials_that_evaluate_it(tiny_recipe: Callable[..., Recipe]) -> None:
    """A recipe's own SFT, changed or not, or that of a variant alone; and none where "final" is not asked for."""
    plain, _, _, _, twice, _ = plan_trials(varied(tiny_recipe))
    assert plain.recipe.sft is None and plain.outcome == "pretrained"
    assert plain.recipe.evaluate is not None and plain.recipe.evaluate.models == ("pretrained",)
    assert twice.recipe.sft is not None and twice.outcome == "final" and twice.recipe.sft.seed == 1
    assert twice.recipe.evaluate is not None and twice.recipe.evaluate.models == ("pretrained", "final")
    recipe = varied(tiny_recipe, variants={"plain": {}, "other": {"sft.steps": 3}})
    assert [t.recipe.sft and t.recipe.sft.steps for t in plan_trials(recipe)] == [None, None, 3, 3]
    bare = recipe.model_copy(update={"sft": None})
    with pytest.raises(UserError, match="plain-1 and other-1 train the same thing"):
        plan_trials(bare)
    own = {"steps": 4, "sequence_length": 256, "max_sample_tokens": 256, "global_batch_sequences": 1}
    sft = {**own, "learning_rate": 1e-3, "sources": [{"kind": "installed"}]}
    tune = TuneConfig.model_validate({"variants": {"plain": {}, "other": {"sft": sft}}})
    plain, other = plan_trials(bare.model_copy(update={"tune": tune}))
    assert plain.outcome == "pretrained" and other.recipe.sft is not None and other.recipe.sft.steps == 4


def test_of_trials_of_one_pretraining_one_trains_and_the_others_find_it_done(
    tiny_recipe: Callable[..., Recipe],
) -> None:
    variants = {**VARIANTS, "tuned": {}, "longer": {"sft.steps": 3}}
    todo = plan_trials(varied(tiny_recipe, variants=variants))
    runs = Runs(todo)
    assert runs.begin() == ["plain-1", "plain-2", "none-1", "none-2", "twice-1", "twice-2"]
    assert not runs.queue.is_empty
    runs.end("none-1")  # for which nobody waits
    assert runs.begin() == []
    stage_directory(todo[0].recipe, "pretrain").mark_done({})  # plain-1 is being evaluated now
    assert runs.begin() == ["tuned-1", "longer-1"]
    runs.end("plain-2")  # it has failed: one of those that share its pretraining makes it
    assert runs.begin() == ["tuned-2"]
    stage_directory(todo[1].recipe, "pretrain").mark_done({})
    assert runs.begin() == ["longer-2"]
    assert runs.queue.is_empty and runs.begin() == []


def test_a_first_training_of_two_variants_is_made_once(tiny_recipe: Callable[..., Recipe]) -> None:
    first = {**HALF, "pretrain.steps": 3}
    variants = {"short": {"pretrain.steps": 5, "first": first}, "long": {"pretrain.steps": 9, "first": first}}
    short, long = plan_trials(varied(tiny_recipe, variants=variants, seeds=[1]))
    assert stage_directory(short.steps[0], "pretrain") == stage_directory(long.steps[0], "pretrain")
    runs = Runs([short, long])
    assert runs.begin() == ["short-1"]
    stage_directory(short.steps[0], "pretrain").mark_done({})
    for stage in ("prepare", "prepare_sft", "extend"):  # of the second step: both read them, short-1 makes them now
        assert stage_directory(short.steps[1], stage) == stage_directory(long.steps[1], stage)
        assert runs.begin() == []
        stage_directory(short.steps[1], stage).mark_done({})
    assert runs.begin() == ["long-1"]


def test_what_the_one_that_makes_it_failed_to_make_another_makes(tiny_recipe: Callable[..., Recipe]) -> None:
    first = {**HALF, "pretrain.steps": 3}
    variants = {"short": {"pretrain.steps": 5, "first": first}, "long": {"pretrain.steps": 9, "first": first}}
    todo = plan_trials(varied(tiny_recipe, variants=variants, seeds=[1]))
    runs = Runs(todo)
    assert runs.begin() == ["short-1"]
    stage_directory(todo[0].steps[0], "pretrain").mark_done({})
    assert runs.begin() == []
    runs.end("short-1")
    assert runs.begin() == ["long-1"]


def test_further_variants_and_seeds_keep_the_folder(tiny_recipe: Callable[..., Recipe]) -> None:
    def folder(**more: Any) -> Location:
        return stage_directory(varied(tiny_recipe, **more), "tune").location

    assert folder(variants={**VARIANTS, "tuned": {}}, seeds=[1, 2, 3]) == folder()
    assert folder(search={RATES: [1e-4]}) != folder()


def test_the_ablations_of_the_reproduction_are_trials() -> None:
    recipe = load_recipe(str(ABLATIONS))
    planned = plan_trials(recipe)
    assert len({trial.name for trial in planned}) == len(planned) == 63
    assert {trial.variant for trial in planned if trial.outcome == "final"} == {"sft_short", "sft_with_long"}
    assert [len(trial.steps) for trial in planned if trial.variant == "two_steps"] == [2, 2, 2]
