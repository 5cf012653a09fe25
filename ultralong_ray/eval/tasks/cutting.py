"""Prompts that are longer than the window lose their middle, as LV-Eval and InfiniteBench do it.

In go a `Sample` and a token budget; out comes the sample, whole or cut, with what was lost among its facts. RULER,
needle and passkey prompts are made to fit and never cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from ultralong_ray.eval.tasks.budget import DoesNotFit
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample

T = TypeVar("T")
LEAST_TOKENS = 2  # one on either side
MAX_ROUNDS = 8  # a cut text may encode to a few tokens more than were kept


def middle_cut(ids: list[T], limit: int) -> list[T]:
    """First and last half of `ids`, `limit` in all; the last half has one more of an odd limit.

    OpenBMB/InfiniteBench @ 88b3daa6, src/eval_utils.py.
    """
    return ids if len(ids) <= limit else ids[: limit // 2] + ids[limit // 2 - limit :]


def decoded_at_once(tokenizer: Any, ids: list[int], limit: int) -> str:
    """The kept ids as one text (InfiniteBench)."""
    return tokenizer.decode(middle_cut(ids, limit), skip_special_tokens=True)


def decoded_in_halves(tokenizer: Any, ids: list[int], limit: int) -> str:
    """Two texts, one of each half, put together (infinigence/LVEval @ 63e7ae93, utils.py); an odd token is lost."""
    half = limit // 2
    return "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))


def cut_to_window(
    sample: Sample, prompts: Prompts, length_tokens: int, cut: Callable[[Any, list[int], int], str]
) -> Sample:
    """The sample with prompt tokens + `max_new_tokens` <= `length_tokens`; its message is cut before the chat template.

    Raises: DoesNotFit when the template and the answer leave no room at all.
    """
    whole = prompts.measured(sample)
    budget = length_tokens - sample.max_new_tokens
    facts = {**sample.facts, "whole_prompt_tokens": whole.prompt_tokens, "cut": whole.prompt_tokens > budget}
    if whole.prompt_tokens <= budget:
        return replace(whole, facts=facts)
    message = sample.context + sample.question
    ids = prompts.tokenizer(message, add_special_tokens=False, verbose=False)["input_ids"]
    limit = budget - (whole.prompt_tokens - len(ids))
    for _ in range(MAX_ROUNDS):
        if limit < LEAST_TOKENS:
            break
        shortened = prompts.measured(_with_message(sample, cut(prompts.tokenizer, ids, limit)))
        if shortened.prompt_tokens <= budget:
            return replace(shortened, facts=facts)
        limit -= shortened.prompt_tokens - budget
    raise DoesNotFit(
        f"{sample.task}: {length_tokens} tokens leave no room for the text beside the chat template and an answer of "
        f"{sample.max_new_tokens}; ask for a longer context, or leave the task out"
    )


def _with_message(sample: Sample, message: str) -> Sample:
    """The parts of a cut message: its end is still the question where that was kept whole."""
    if sample.question and message.endswith(sample.question):
        return replace(sample, context=message[: -len(sample.question)])
    return replace(sample, context=message, question="")
