"""Synthetic documents that teach a model from nothing to retrieve: passkeys, key-value lists, repetition.

For training a base model only (the quickstart's, which stands for the aligned model that the recipe starts from); the
recipe itself continues on natural text. A document is a pure function of (seed, index). Answer tokens carry
`ANSWER_WEIGHT`, since they are few and the rest of such a document teaches little. Questions are asked both as plain
text and in the tokenizer's chat template. The mix was found by trial on one GPU; the model card of the base model
holds its measured scores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from ultralong_ray.types import TokenizedDocument

ANSWER_WEIGHT = 8
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KINDS = ("passkey", "key_value", "repetition")
KIND_SHARES = (0.4, 0.3, 0.3)
MIN_TOKENS = 48

Segments = list[tuple[str, int]]  # (text, weight of its tokens as targets)


def task_documents(tokenizer: Any, first: int, count: int, max_tokens: int, seed: int) -> Iterator[TokenizedDocument]:
    """Documents `first` to `first + count`, none longer than `max_tokens`; the domain is the kind of task."""
    for index in range(first, first + count):
        rng = random.Random(f"{seed}/{index}")
        kind = rng.choices(KINDS, KIND_SHARES)[0]
        # Half of the documents use the whole window, or positions near its end would hardly be trained.
        budget = max_tokens if rng.random() < 0.5 else rng.randint(MIN_TOKENS, max_tokens)
        if kind == "repetition":
            ids, weights = _repetition(tokenizer, rng, budget)
        else:
            ids, weights = _question(tokenizer, rng, budget, _passkey if kind == "passkey" else _key_value)
        yield TokenizedDocument(f"task/{seed}/{index}", kind, ids, weights)


def _repetition(tokenizer: Any, rng: random.Random, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """A random segment, then the same again and again: only the repeats are targets."""
    period = rng.randint(8, max(8, budget // 2))
    segment = np.array([rng.randrange(len(tokenizer)) for _ in range(period)], np.int32)
    ids = np.resize(segment, budget).astype(np.int32)
    weights = np.ones(budget, np.uint8)
    weights[:period] = 0
    return ids, weights


def _question(tokenizer: Any, rng: random.Random, budget: int, body: Any) -> tuple[np.ndarray, np.ndarray]:
    """The longest instance of `body` that fits into `budget` tokens."""
    state = rng.getstate()
    units = max(1, budget // 12)
    while True:
        rng.setstate(state)
        ids, weights = _encode(tokenizer, _render(tokenizer, rng, *body(rng, units)))
        if len(ids) <= budget or units == 1:
            return ids[:budget], weights[:budget]
        units = max(1, min(units - 1, int(units * budget / len(ids))))


def _render(tokenizer: Any, rng: random.Random, context: str, question: str, answer: Segments) -> Segments:
    """Plain text, or a user turn and an assistant turn in the chat template."""
    if rng.random() < 0.3:
        return [(f"{context}\n{question} ", 1), *answer]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{context}\n{question}"}], tokenize=False, add_generation_prompt=True
    )
    return [(prompt, 1), *answer, (tokenizer.eos_token, 1)]


def _encode(tokenizer: Any, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in segments]
    weights = [np.full(len(part), weight, np.uint8) for part, (_, weight) in zip(parts, segments, strict=True)]
    return np.concatenate([np.array(part, np.int32) for part in parts]), np.concatenate(weights)


def _digits(rng: random.Random, low: int = 4, high: int = 6) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(rng.randint(low, high)))


def _passkey(rng: random.Random, units: int) -> tuple[str, str, Segments]:
    key = _digits(rng)
    filler = _noise(rng, units) if rng.random() < 0.5 else _natural(rng, units)
    # The longest distance that the window holds is the one that extrapolation leans on: ask for it often.
    place = 0 if rng.random() < 0.25 else rng.randint(0, len(filler))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    context = "\n".join([INTRODUCTION, " ".join([*filler[:place], needle, *filler[place:]])])
    return context, "What is the pass key?", [("The pass key is", 1), (f" {key}", ANSWER_WEIGHT), (".", 1)]


def _noise(rng: random.Random, units: int) -> list[str]:
    return [NOISE] * max(1, units // 3)


def _natural(rng: random.Random, units: int) -> list[str]:
    sentences = _sentences()
    start = rng.randrange(len(sentences))
    return [sentences[(start + i) % len(sentences)] for i in range(max(1, units // 3))]


@lru_cache(maxsize=1)
def _sentences() -> list[str]:
    from pydoc_data import topics

    text = " ".join(" ".join(value.split()) for _, value in sorted(topics.topics.items()))
    return [sentence.strip() + "." for sentence in text.split(". ") if 20 < len(sentence) < 200]


def _key_value(rng: random.Random, units: int) -> tuple[str, str, Segments]:
    words = rng.sample(_words(), min(len(_words()), max(2, units - 4)))
    # Few keys among other text, or nothing but keys: the second is harder.
    if rng.random() < 0.5:
        words = words[: rng.randint(2, 8)]
    pairs = {word: _digits(rng, 3, 5) for word in words}
    lines = [f"The value of {word} is {value}." for word, value in pairs.items()]
    if len(lines) < 9:
        lines = _scattered(rng, lines, _natural(rng, max(1, units - 2 * len(lines))))
    asked = rng.choice(words)
    answer: Segments = [(f"The value of {asked} is", 1), (f" {pairs[asked]}", ANSWER_WEIGHT), (".", 1)]
    return "\n".join(lines), f"What is the value of {asked}?", answer


def _scattered(rng: random.Random, lines: list[str], filler: list[str]) -> list[str]:
    mixed = list(filler)
    for line in lines:
        mixed.insert(rng.randint(0, len(mixed)), line)
    return mixed


@lru_cache(maxsize=1)
def _words() -> list[str]:
    words = {word for sentence in _sentences() for word in sentence.split() if word.isalpha() and word.islower()}
    return sorted(word for word in words if 3 <= len(word) <= 10)
