"""Made InfiniteBench samples: filled to the length, and their labels are true."""

from __future__ import annotations

import ast
import json
import re
import statistics
from typing import Any

import pytest

from ultralong_ray.eval.tasks.infinitebench_made import MAKERS, made_sample
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.score import score
from ultralong_ray.types import UserError


@pytest.fixture
def plain(mark_tokenizer: Any) -> Prompts:
    return Prompts(mark_tokenizer, chat_template=False)


def made(task: str, prompts: Prompts, index: int, length: int = 1200, depth: float = 50.0) -> Sample:
    return made_sample(task, prompts, length_tokens=length, index=index, seed=2, depth_percent=depth)


@pytest.mark.parametrize("task", MAKERS)
def test_samples_fill_the_length(task: str, prompts: Prompts) -> None:
    sample = made(task, prompts, 1)
    assert 1200 - 40 < sample.prompt_tokens + sample.max_new_tokens <= 1200
    assert len(prompts.ids(prompts.text(sample))) == sample.prompt_tokens
    assert sample == made(task, prompts, 1) != made(task, prompts, 2)
    answer = f"0, {list(sample.references)}" if "math_calc" in sample.task and prompts.chat_template else None
    assert score(sample, answer or f" {str(list(sample.references)).strip('[]')}") == 1.0 and score(sample, "") == 0.0


@pytest.mark.parametrize(("task", "depth"), [("passkey", 0.0), ("number_string", 100.0), ("kv_retrieval", 50.0)])
def test_depth(task: str, depth: float, plain: Prompts) -> None:
    sample = made(task, plain, 0, depth=depth)
    assert abs(100 * sample.context.index(sample.references[0]) / len(sample.context) - depth) < 15
    if task == "kv_retrieval":
        pairs = json.loads(sample.context[sample.context.index("{") :])
        assert pairs[re.findall('"(.*?)"', sample.question)[0]] == sample.references[0]
    else:
        assert sample.context.count(sample.references[0]) == 2 and len(sample.references[0]) in (5, 10)


def test_numbers_are_found_and_calculated(plain: Prompts) -> None:
    lists = [made("math_find", plain, index) for index in range(7)]
    lists += [made("math_find", plain, 6, length=length) for length in range(300, 330, 3)]  # medians of both kinds
    assert {len(sample.context.split(",")) % 2 for sample in lists[6:]} == {0, 1}
    for sample in lists:
        numbers = ast.literal_eval(sample.context[sample.context.index("[") :])
        name = re.findall("The (.*?) number of", sample.question)[0]
        distinct = sorted(set(numbers), reverse=name.endswith("largest"))
        place = ["second", "third"].index(name.split()[0]) + 1 if " " in name else 0
        assert sample.references == (statistics.median(numbers) if name == "median" else distinct[place],)
    values, terms = [], made("math_calc", plain, 0)
    expression = terms.context.rsplit("Expression: ", 1)[1].split()
    for end in range(3, len(expression) + 1, 2):
        values.append(eval(" ".join(expression[:end])))
    assert tuple(values) == terms.references and all(0 <= value <= 99 for value in values)


@pytest.mark.parametrize("index", range(5))
def test_functions_return_the_label(index: int, plain: Prompts) -> None:
    sample = made("code_run", plain, index)
    module: dict[str, Any] = {}
    exec(sample.context[sample.context.index("def func_") :], module)
    call = re.findall(r"func_\d+\(-?\d+\)", sample.question)[0]
    assert eval(call, module) == sample.references[0]


def test_a_task_of_books_cannot_be_made(plain: Prompts) -> None:
    with pytest.raises(UserError, match=r"'longbook_qa_eng' needs its file; made can be passkey, "):
        made("longbook_qa_eng", plain, 0)
