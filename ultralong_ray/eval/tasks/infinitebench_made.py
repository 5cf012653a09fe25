"""Six of InfiniteBench's tasks made anew at any length: passkey, number_string, kv_retrieval, math_find, math_calc,
code_run.

In go a task, a length and a seed; out comes a `Sample` of the same prompts and metrics as those read from files. The
recipes are those of OpenBMB/InfiniteBench @ 88b3daa6, data/construct_synthetic_dataset.py, which draws without a seed
at one length: the rows are not the published ones, and `facts["made"]` says so.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ultralong_ray.eval.tasks.budget import fill
from ultralong_ray.eval.tasks.infinitebench import Template, infinitebench_sample
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.ruler_needles import NOISE
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.types import UserError

NEEDLES = {
    "passkey": ("The pass key is {key}. Remember it. {key} is the pass key.\n", "What is the pass key?"),
    "number_string": (
        "The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n",
        "What is the sequence of digits?",
    ),
}
LARGEST = 99  # of the numbers of math_find and math_calc
RANKS: dict[str, Callable[[list[int]], float]] = {
    "largest": lambda distinct: distinct[-1],
    "second largest": lambda distinct: distinct[-2],
    "third largest": lambda distinct: distinct[-3],
    "smallest": lambda distinct: distinct[0],
    "second smallest": lambda distinct: distinct[1],
    "third smallest": lambda distinct: distinct[2],
}
FUNCTION_LAYERS = (2, 4, 6, 8, 10)
ADDED = (-12, 17)
ARGUMENTS = (-10, 10)
ANSWER_MARGIN_TOKENS = 16


def made_sample(
    task: str,
    prompts: Prompts,
    *,
    length_tokens: int,
    index: int,
    seed: int,
    depth_percent: float = 50.0,
    template: Template | None = None,
) -> Sample:
    """A sample filled to `length_tokens`. `depth_percent` places the key, or the pair that is asked for.

    Raises: UserError for a task whose text cannot be made; DoesNotFit when the length is too short.
    """
    if task not in MAKERS:
        raise UserError(f"InfiniteBench's {task!r} needs its file; made can be {', '.join(MAKERS)}")
    chosen: Template = template or ("gpt4" if prompts.chat_template else "yarn-mistral")
    start = f"{seed}/{task}/{length_tokens}/{depth_percent:g}/{index}"

    def build(units: int) -> Sample:
        row = MAKERS[task](random.Random(start), units, depth_percent, index)
        sample = infinitebench_sample(task, index, row, chosen, task)
        new_tokens = sample.max_new_tokens
        if task == "math_calc":  # the published rows have 30,000 terms and as many new tokens
            new_tokens = min(new_tokens, prompts.estimate(str(row["answer"])) + ANSWER_MARGIN_TOKENS)
        facts = {**sample.facts, "made": True, "units": units, "depth_percent": depth_percent}
        return replace(sample, max_new_tokens=new_tokens, facts=facts)

    return fill(build, prompts, length_tokens, least=LEAST_UNITS.get(task, 1))


def _needle(task: str, rng: random.Random, lines: int, depth_percent: float) -> dict[str, Any]:
    digits = [str(rng.randint(0, 9)) for _ in range(5)]
    if task == "number_string":
        for drawn in range(5):  # five of the ten digits stand twice in a row
            place = rng.randint(0, 5 + drawn - 1)
            digits.insert(place, digits[place])
    key, (needle, question) = "".join(digits), NEEDLES[task]
    before = round(lines * depth_percent / 100)
    context = f"{NOISE}\n" * before + needle.format(key=key) + f"{NOISE}\n" * (lines - before)
    return {"context": context, "input": question, "answer": key}


def _passkey(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    return _needle("passkey", rng, units, depth_percent)


def _number_string(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    return _needle("number_string", rng, units, depth_percent)


def _key_values(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    pairs = [[str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in range(2)] for _ in range(units)]
    key, value = pairs[min(int(units * depth_percent / 100), units - 1)]
    return {
        "context": "JSON data:\n" + json.dumps(dict(pairs)),
        "input": f'\nKey: "{key}"\nThe value associated with the specified key is: ',
        "answer": value,
    }


def _find(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    """Ranks take turns with the index. The end that is asked about is drawn, or every answer would be 0 or 99."""
    names = [*RANKS, "median"]
    name = names[index % len(names)]
    low, high = 0, LARGEST
    if name.endswith("smallest") or (name == "median" and rng.random() > 0.5):
        low = rng.randint(0, LARGEST // 5)
    else:
        high = rng.randint(LARGEST * 4 // 5, LARGEST)
    numbers = [low, low + 1, low + 2, high - 2, high - 1, high]  # so that a short list has six distinct ranks as well
    numbers += [rng.randint(low, high) for _ in range(units)]
    rng.shuffle(numbers)
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle] + ordered[middle - 1]) / 2
    return {
        "context": str(numbers),
        "input": f"You should answer with only one number, no other words. The {name} number of the list is: ",
        "answer": [median if name == "median" else RANKS[name](sorted(set(numbers)))],
    }


def _calculation(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    """Sums and differences whose values stay between 0 and 99."""
    value = rng.randint(0, LARGEST)
    text, values = [str(value)], []
    for _ in range(units):
        term = rng.randint(0, LARGEST)
        if rng.random() > 0.5:
            term = term if value + term <= LARGEST else rng.randint(0, LARGEST - value)
            text.append(f" + {term}")
            value += term
        else:
            term = term if value >= term else rng.randint(0, value)
            text.append(f" - {term}")
            value -= term
        values.append(value)
    return {"context": "".join(text), "input": "The value of the numerical expression is: ", "answer": values}


def _functions(rng: random.Random, units: int, depth_percent: float, index: int) -> dict[str, Any]:
    """`units` functions in layers, each calling one of the next layer and adding a constant."""
    layers = min(FUNCTION_LAYERS[index % len(FUNCTION_LAYERS)], units)
    names = rng.sample(range(1, 2 * units + 1), units)
    rows = [names[layer::layers] for layer in range(layers)]
    calls: dict[int, tuple[int | None, int]] = {}
    for row, below in itertools.zip_longest(rows, rows[1:]):
        for name in row:
            calls[name] = (rng.choice(below) if below else None, rng.randint(*ADDED))
    asked, argument = rng.choice(rows[0]), rng.randint(*ARGUMENTS)
    value, name = argument, asked
    while name is not None:
        name, added = calls[name]
        value += added
    text = "".join(f"def func_{name}(x):\n    return {_expression(*calls[name])}\n\n" for name in sorted(calls))
    return {
        "context": "\nHere is the content of functions_module.py:\n\n" + text,
        "input": f"Please give me the exact number of the return value of func_{asked}({argument}). Your response "
        "should end with the sentence 'The return value is:'.",
        "answer": value,
    }


def _expression(called: int | None, added: int) -> str:
    inner = "x" if called is None else f"func_{called}(x)"
    return inner if added == 0 else re.sub(r"\+ -", "- ", f"{inner} + {added}")


MAKERS: dict[str, Callable[[random.Random, int, float, int], dict[str, Any]]] = {
    "passkey": _passkey,
    "number_string": _number_string,
    "kv_retrieval": _key_values,
    "math_find": _find,
    "math_calc": _calculation,
    "code_run": _functions,
}
LEAST_UNITS = {"code_run": 2}
