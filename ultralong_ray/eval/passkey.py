"""NIAH passkey prompts: a five-digit key between whole units of noise, asked for at the end. Pure.

In go a tokenizer, a context length, a depth and a seed; out come `PasskeyPrompt`s that fill the length, and a score.
The text is that of Mohtashami and Jaggi (arXiv 2305.16300; epfml/landmark-attention, `llama/run_test.py`): five lines,
with the noise on either side of the needle in one line each, here cut between sentences. Keys have a fixed number of
digits, as in InfiniteBench (OpenBMB/InfiniteBench, `data/construct_synthetic_dataset.py`).
"""

from __future__ import annotations

import math
import random
import re
from typing import Any

from ultralong_ray.types import PasskeyPrompt, UserError

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
ANSWER_PREFIX = "The pass key is"

UNITS_MEASURED = 64  # noise units whose token count gives the tokens of one; most depths then have noise on both sides


def passkey_text(key: str, units_before: int, units_after: int) -> str:
    """Introduction, noise, needle, noise and question, a line each; a side without noise has no line."""
    before, after = " ".join([NOISE] * units_before), " ".join([NOISE] * units_after)
    return "\n".join(line for line in (INTRODUCTION, before, NEEDLE.format(key=key), after, QUESTION) if line)


def encode_prompt(tokenizer: Any, prompt: str, *, chat_template: bool) -> list[int]:
    """Token ids of a whole prompt. A rendered chat template brings its own BOS, so none is added to it."""
    # verbose=False: the tokenizer's own warning about long texts is expected here and nothing is ever cut
    return tokenizer(prompt, add_special_tokens=not chat_template, verbose=False)["input_ids"]


def build_prompt(
    tokenizer: Any,
    *,
    context_length_tokens: int,
    depth_percent: float,
    sample: int,
    seed: int,
    max_new_tokens: int,
    chat_template: bool,
    digits: int = 5,
) -> PasskeyPrompt:
    """One prompt, a function of its arguments alone.

    The needle stands between whole noise units, after round(depth * units) of them: depth 0 is before all noise, depth
    100 behind it. Prompt tokens + `max_new_tokens` reach `context_length_tokens` to within one noise unit, from below.

    Raises: UserError when not even one noise unit fits, or a chat template is asked for and there is none.
    """
    if chat_template and not getattr(tokenizer, "chat_template", None):
        raise UserError("evaluate.chat_template is true, but the model's tokenizer has no chat template; set it false")
    rng = random.Random(f"{seed}/{context_length_tokens}/{depth_percent:g}/{sample}")
    key = "".join(rng.choices("0123456789", k=digits))

    def message(units: int) -> str:
        before = math.floor(units * depth_percent / 100 + 0.5)
        return passkey_text(key, before, units - before)

    def render(units: int) -> str:
        text = message(units)
        if not chat_template:
            return f"{text} {ANSWER_PREFIX}"
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + ANSWER_PREFIX

    def encoded(units: int) -> list[int]:
        return encode_prompt(tokenizer, render(units), chat_template=chat_template)

    units, ids = _fill(encoded, context_length_tokens, max_new_tokens)
    place = (context_length_tokens, depth_percent, sample)
    return PasskeyPrompt(*place, render(units), key, ids, message(units) if chat_template else "", ANSWER_PREFIX)


def _fill(encoded: Any, context_length_tokens: int, max_new_tokens: int) -> tuple[int, list[int]]:
    """Most noise units whose prompt still leaves `max_new_tokens` free, and the token ids of that prompt.

    Two short prompts give the tokens of a unit; then the estimate is corrected by counting, once where tokens add up:
    a prompt of a million tokens takes seconds to tokenise.
    """
    budget = context_length_tokens - max_new_tokens
    shortest = len(encoded(1))
    if shortest > budget:
        raise UserError(
            f"evaluate.context_lengths: {context_length_tokens} tokens are too few for a passkey prompt; with this "
            f"tokenizer and evaluate.max_new_tokens {max_new_tokens} the shortest is {shortest + max_new_tokens}"
        )
    some, twice = len(encoded(UNITS_MEASURED)), len(encoded(2 * UNITS_MEASURED))
    unit_tokens = (twice - some) / UNITS_MEASURED
    units = max(1, UNITS_MEASURED + math.floor((budget - some) / unit_tokens))
    while len(ids := encoded(units)) > budget:
        units = max(1, units - math.ceil((len(ids) - budget) / unit_tokens))
    while budget - len(ids) >= unit_tokens and len(more := encoded(units + 1)) <= budget:
        units, ids = units + 1, more
    return units, ids


def first_number(answer: str) -> str | None:
    """The first run of digits in an answer."""
    match = re.search(r"[0-9]+", answer)
    return match.group() if match else None


def is_right(answer: str, expected: str) -> bool:
    """InfiniteBench's rule: the first run of digits equals the key, leading zeros included."""
    return first_number(answer) == expected
