"""[evaluate] and [[evaluate.tasks]]: names are those of the tasks, and every mistake is said in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from ultralong_ray.config import EvaluateConfig, Recipe
from ultralong_ray.config.engines import InProcessEngine
from ultralong_ray.config.evaluate import even_lengths
from ultralong_ray.config.made_tasks import RulerName, RulerTask, SkillName
from ultralong_ray.config.read_tasks import MADE_INFINITEBENCH, InfinitebenchName, InfinitebenchTask, Level, LvevalName
from ultralong_ray.eval.tasks.infinitebench import INFINITEBENCH_TASKS
from ultralong_ray.eval.tasks.infinitebench_made import MAKERS
from ultralong_ray.eval.tasks.lveval import LEVELS, SETS
from ultralong_ray.eval.tasks.ruler import RULER_TASKS
from ultralong_ray.eval.tasks.short_skills import SKILLS
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_fingerprint
from ultralong_ray.types import UserError

Make = Callable[..., Recipe]
RULER = {"kind": "ruler", "context_lengths": [512], "samples_per_cell": 2}
QUICKSTART = Path(__file__).resolve().parents[2] / "jobs/recipes/quickstart.toml"


def test_names_are_those_of_the_tasks() -> None:
    assert get_args(RulerName) == RULER_TASKS and get_args(SkillName) == tuple(SKILLS)
    assert set(get_args(LvevalName)) == set(SETS) and get_args(Level) == LEVELS
    assert set(get_args(InfinitebenchName)) == set(INFINITEBENCH_TASKS)
    assert set(MADE_INFINITEBENCH) == set(MAKERS)


def test_a_section_asks_for_every_name_length_and_depth() -> None:
    needle = {"kind": "needle", "names": ["number"], "context_lengths": [64, 128], "depths_percent": [0, 100]}
    config = EvaluateConfig(passkey=False, tasks=({**needle, "samples_per_cell": 1}, RULER))  # type: ignore[arg-type]
    assert [tuple(work) for work in config.tasks[0].works()] == [
        ("niah/number", 64, 0.0),
        ("niah/number", 64, 100.0),
        ("niah/number", 128, 0.0),
        ("niah/number", 128, 100.0),
    ]
    assert len(config.tasks[1].works()) == 13 and isinstance(config.tasks[1], RulerTask)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{**RULER, "kind": "rulr"}], "Input tag 'rulr' found using 'kind' does not match any of the expected tags"),
        ([{**RULER, "names": ["niah"]}], "Input should be 'niah_single_1'"),
        ([{**RULER, "context_length": [1]}], "Extra inputs are not permitted"),
        ([{**RULER, "context_lengths": []}], "at least 1 item"),
        ([{"kind": "ruler", "context_lengths": [512]}], "samples_per_cell\n  Field required"),
        ([RULER, {**RULER, "names": ["vt"]}], "asks for ruler/vt at 512 tokens more than once; remove the repeated"),
        (
            [{"kind": "infinitebench", "names": ["longbook_qa_eng"], "context_lengths": [512], "samples_per_cell": 1}],
            "infinitebench/longbook_qa_eng needs data_folder",
        ),
        ([{"kind": "infinitebench", "names": ["passkey"], "context_lengths": [512]}], "needs samples_per_cell"),
        ([{"kind": "lveval", "context_lengths": [512]}], "data_folder\n  Field required"),
        (
            [{"kind": "manyshot", "context_lengths": [512], "samples_per_cell": 1, "shown": "a.jsonl"}],
            "takes shown and asked together",
        ),
    ],
)
def test_mistakes_are_said(tasks: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValidationError) as error:
        EvaluateConfig.model_validate({"context_lengths": [512], "tasks": tasks})
    assert words in str(error.value)


def test_nothing_to_measure_and_lengths_beyond_the_target_are_refused(tiny_recipe: Make) -> None:
    with pytest.raises(ValidationError, match=r"evaluate.passkey is false and .* position alone takes"):
        tiny_recipe(evaluate={"passkey": False})
    with pytest.raises(ValidationError, match=r"nothing would be measured"):
        served = {"kind": "openai", "served": {"base": "b"}}
        only_base = {"models": ["base"], "passkey": False, "engine": served}
        tiny_recipe(prepare={"holdout_ids": ["a"]}, evaluate=only_base)
    for held_out in ({"holdout_ids": ["a"]}, {"holdout_sequences": 1}):
        assert tiny_recipe(prepare=held_out, evaluate={"passkey": False}).evaluate is not None, "perplexity by position"
    with pytest.raises(ValidationError, match=r"evaluate.tasks.0.context_lengths 513 is beyond .* 512; no model"):
        tiny_recipe(evaluate={"tasks": [{**RULER, "context_lengths": [64, 513]}]})


def test_the_default_grid_has_40_lengths_and_10_depths(tiny_recipe: Make) -> None:
    million = even_lengths(2**20)
    assert len(million) == 40 and million[-1] == 2**20 and million[:2] == (26 * 1024, 51 * 1024)
    recipe = tiny_recipe(evaluate={"context_lengths": []})
    assert recipe.evaluate is not None
    assert len(recipe.evaluate.context_lengths) == 40 and recipe.evaluate.context_lengths[-1] == 512
    defaults = EvaluateConfig().depths_percent
    assert len(defaults) == 10 and (defaults[0], defaults[-1]) == (0.0, 100.0)


def test_the_quickstart_asks_all_of_ruler_from_512_to_4096() -> None:
    recipe = load_recipe(str(QUICKSTART), [])
    assert recipe.evaluate is not None
    (section,) = recipe.evaluate.tasks
    assert section.names_of_tasks() == [f"ruler/{name}" for name in RULER_TASKS]
    assert section.context_lengths == (512, 1024, 2048, 4096)


def test_a_task_can_be_overridden_and_changes_the_fingerprint() -> None:
    recipe = load_recipe(str(QUICKSTART), [])
    other = load_recipe(str(QUICKSTART), ["--evaluate.tasks.0.samples_per_cell", "9"])
    assert other.evaluate is not None
    task = other.evaluate.tasks[0]
    assert isinstance(task, RulerTask) and task.samples_per_cell == 9
    assert stage_fingerprint(recipe, "evaluate") != stage_fingerprint(other, "evaluate")
    with pytest.raises(UserError, match=r"  evaluate.tasks.0.names.0 = 'niah'"):
        load_recipe(str(QUICKSTART), ["--evaluate.tasks.0.names", '["niah"]'])


def test_lveval_and_infinitebench_name_the_files_they_read() -> None:
    section = InfinitebenchTask(
        kind="infinitebench", names=("code_debug",), context_lengths=(512,), data_folder="s3://b/x/"
    )
    assert section.paths() == [("data_folder", "s3://b/x/code_debug.jsonl")]


def test_losses_are_asked_of_engines_that_give_them() -> None:
    section = {"kind": "perplexity", "documents": ["a.txt"], "context_lengths": [128], "samples_per_cell": 1}
    served = {"kind": "openai", "served": {"base": "b"}}
    with pytest.raises(ValidationError, match=r"kind perplexity need the loss of every token, which .* openai does"):
        EvaluateConfig.model_validate({"models": ["base"], "tasks": [section], "engine": served})
    EvaluateConfig.model_validate({"tasks": [section], "engine": {"kind": "sharded", "degree": 2}})


def test_an_engine_without_a_kind_is_in_process() -> None:
    assert EvaluateConfig.model_validate({"engine": {"batch_tokens": 4096}}).engine == InProcessEngine(
        batch_tokens=4096
    )
    with pytest.raises(ValidationError, match=r"engine\.in_process\.batch_tokens\n.*greater than 0"):
        EvaluateConfig.model_validate({"engine": {"batch_tokens": 0}})
    with pytest.raises(ValidationError, match="expected tags: 'in_process', 'sharded', 'openai', 'vllm'"):
        EvaluateConfig.model_validate({"engine": {"kind": "vlm"}})
