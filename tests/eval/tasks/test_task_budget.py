"""The fill of a budget holds where the tokens of words do not add up, for lists that end, for answers that grow."""

from __future__ import annotations

from typing import Any

import pytest

from ultralong_ray.eval.tasks.budget import DoesNotFit, fill
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample


class UnevenTokenizer:
    """A text of n words has `tokens(n)` tokens, but a word alone has one."""

    chat_template = None

    def __init__(self, tokens: Any) -> None:
        self.tokens = tokens

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[0]] * len(text)}
        return {"input_ids": [0] * self.tokens(text.count(" ") + 1)}


def build(units: int) -> Sample:
    return Sample("task/x", 0, " ".join(["word"] * units), "", "", (), 5, "string_match_all")


@pytest.mark.parametrize(
    ("tokens", "slack"),
    [
        (lambda n: n, 0.0),
        (lambda n: n + 7, 0.0),
        (lambda n: int(1.3 * n), 0.001),
        (lambda n: int(0.7 * n), 0.001),
        (lambda n: n + n // 10 * (n % 2), 0.12),  # every second number of words has a tenth more
    ],
    ids=["exact", "constant", "more", "fewer", "odd"],
)
@pytest.mark.parametrize("length", [40, 1000, 50_001])
def test_never_over_and_nearly_full(tokens: Any, slack: float, length: int) -> None:
    sample = fill(build, Prompts(UnevenTokenizer(tokens), chat_template=False), length, least=1)
    used = sample.prompt_tokens + 5
    assert length - slack * length - 1 * (slack > 0) <= used <= length
    assert sample.facts["length_tokens"] == used


def test_ends_and_beginnings() -> None:
    prompts = Prompts(UnevenTokenizer(lambda n: n), chat_template=False)
    assert fill(build, prompts, 1000, least=1, most=30).prompt_tokens == 30
    assert fill(build, prompts, 15, least=10).prompt_tokens == 10
    with pytest.raises(DoesNotFit, match=r"task/x: 14 tokens are too few .* take 15"):
        fill(build, prompts, 14, least=10)


def test_an_answer_that_grows_with_the_prompt() -> None:
    def growing(units: int) -> Sample:
        return Sample("task/x", 0, " ".join(["word"] * units), "", "", (), units, "string_match_all")

    sample = fill(growing, Prompts(UnevenTokenizer(lambda n: n), chat_template=False), 1001, least=1)
    assert (sample.prompt_tokens, sample.max_new_tokens) == (500, 500)
