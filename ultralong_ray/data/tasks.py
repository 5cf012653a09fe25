"""Synthetic documents that teach a model from nothing to retrieve, track, count, copy and answer.

For training a base model only (the quickstart's and the reproduction's, which stand for the aligned model that the
recipe starts from); the recipe itself continues on natural text. A document is a pure function of (seed, index) and of
the mix of kinds. Answer tokens carry `ANSWER_WEIGHT`, since they are few and the rest of such a document teaches
little. Questions are asked both as plain text and in the tokenizer's chat template; as conversations, for instruction
tuning, only in the template and with the answers as the only targets. The kinds passkey, key_value and repetition are
here, all others in `task_kinds`. The quickstart's mix was found by trial on one GPU; the model card of the base model
holds its measured scores.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ultralong_ray.data.task_kinds import ANSWER_WEIGHT, BODIES, ROUNDS, Body, Segments
from ultralong_ray.data.task_text import NOISE, digits, natural, text_words
from ultralong_ray.types import TokenizedDocument

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
DEFAULT_MIX = {"passkey": 0.4, "key_value": 0.3, "repetition": 0.3}
MIN_TOKENS = 48
MIN_TOKENS_LONG = 192  # of the kinds in task_kinds, whose shortest forms are longer


def task_documents(
    tokenizer: Any,
    first: int,
    count: int,
    max_tokens: int,
    seed: int,
    mix: Mapping[str, float] | None = None,
    *,
    conversations: bool = False,
) -> Iterator[TokenizedDocument]:
    """Documents `first` to `first + count`, none longer than `max_tokens`; the domain is the kind of task.

    `mix` gives the share of documents of each kind, default DEFAULT_MIX. With `conversations` every document is a user
    turn and an assistant turn, and the assistant's tokens alone have a weight, 1; kinds that ask nothing are refused.
    """
    shares = mix or DEFAULT_MIX
    for index in range(first, first + count):
        rng = random.Random(f"{seed}/{index}")
        kind = rng.choices(tuple(shares), tuple(shares.values()))[0]
        # Half of the documents use the whole window, or positions near its end would hardly be trained.
        budget = max_tokens if rng.random() < 0.5 else rng.randint(min(MIN_TOKENS, max_tokens), max_tokens)
        if kind in ROUNDS:
            budget = max_tokens  # it asks at every distance
        elif kind in BODIES:
            budget = min(max_tokens, max(budget, MIN_TOKENS_LONG))
        if kind == "repetition":
            ids, weights = _repetition(tokenizer, rng, budget)
        else:
            ids, weights = _question(tokenizer, rng, budget, kind, conversations)
        yield TokenizedDocument(f"task/{seed}/{index}", kind, ids, weights)


def _repetition(tokenizer: Any, rng: random.Random, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """A random segment, then the same again and again: only the repeats are targets."""
    period = rng.randint(8, max(8, budget // 2))
    segment = np.array([rng.randrange(len(tokenizer)) for _ in range(period)], np.int32)
    ids = np.resize(segment, budget).astype(np.int32)
    weights = np.ones(budget, np.uint8)
    weights[:period] = 0
    return ids, weights


def _question(
    tokenizer: Any, rng: random.Random, budget: int, kind: str, conversation: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The longest instance of a kind that fits into `budget` tokens."""
    body: Body = _passkey if kind == "passkey" else _key_value if kind == "key_value" else BODIES[kind]
    state = rng.getstate()
    units = max(1, budget // (8 if kind in ROUNDS else 12))  # too many, then fewer: it fills its window
    while True:
        rng.setstate(state)
        # What stands around the new kinds' answers is mostly drawn by chance and no target.
        parts = _render(tokenizer, rng, *body(rng, units), int(kind not in BODIES), conversation)
        ids, weights = _encode(tokenizer, parts)
        if len(ids) <= budget or units == 1:
            return ids[:budget], weights[:budget]
        units = max(1, min(units - 1, int(units * budget / len(ids))))


def _render(
    tokenizer: Any,
    rng: random.Random,
    context: str,
    question: str,
    answer: Segments,
    context_weight: int,
    conversation: bool,
) -> Segments:
    """Plain text, or a user turn and an assistant turn in the chat template."""
    if rng.random() < 0.3 and not conversation:
        turns = [(text, weight) if weight else (f"\n{text} ", 0) for text, weight in answer]
        return [(f"{context}\n{question} ", context_weight), *turns]
    if not context_weight and answer[0][1] == 1 and rng.random() < 0.5:
        # Benchmarks put their answer prefix behind the template with a space before it.
        answer = [(f" {answer[0][0]}", 1), *answer[1:]]
    opening, closing = _chat_frame(tokenizer)
    prompt = (opening + f"{context}\n{question}".strip() + closing, 0 if conversation else context_weight)
    end, between = _turn_frame(tokenizer)
    turns: Segments = []
    for text, weight in answer:
        if weight:
            turns.append((text, 1 if conversation else weight))
        else:  # a further question
            turns += [(end, 1), (between + text + closing, 0)]
    return [prompt, *turns, (end, 1)]


@lru_cache(maxsize=4)
def _chat_frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and behind a user's only turn."""
    blank = "\0"
    turns = [{"role": "user", "content": blank}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    opening, closing = rendered.split(blank)
    return opening, closing


@lru_cache(maxsize=4)
def _turn_frame(tokenizer: Any) -> tuple[str, str]:
    """The special token that ends an answer in the chat template, which need not be the eos token, and what the
    template puts between it and the next question."""
    turns = [{"role": role, "content": f"\0{role}"} for role in ("user", "assistant", "user")]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    behind = rendered.split("\0assistant")[1].split("\0user")[0]
    special = (token.content for token in tokenizer.added_tokens_decoder.values())
    end = max(filter(behind.startswith, special), key=len, default=tokenizer.eos_token)
    return end, behind.removeprefix(end)


def _encode(tokenizer: Any, segments: Segments) -> tuple[np.ndarray, np.ndarray]:
    texts = [text for text, _ in segments]
    parts = [
        encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]
    weights = [np.full(len(part), weight, np.uint8) for part, (_, weight) in zip(parts, segments, strict=True)]
    return np.concatenate([np.array(part, np.int32) for part in parts]), np.concatenate(weights)


def _passkey(rng: random.Random, units: int) -> tuple[str, str, Segments]:
    key = digits(rng, 4, 6)
    filler = _noise(rng, units) if rng.random() < 0.5 else natural(rng, units)
    # The longest distance that the window holds is the one that extrapolation leans on: ask for it often.
    place = 0 if rng.random() < 0.25 else rng.randint(0, len(filler))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    context = "\n".join([INTRODUCTION, " ".join([*filler[:place], needle, *filler[place:]])])
    return context, "What is the pass key?", [("The pass key is", 1), (f" {key}", ANSWER_WEIGHT), (".", 1)]


def _noise(rng: random.Random, units: int) -> list[str]:
    return [NOISE] * max(1, units // 3)


def _key_value(rng: random.Random, units: int) -> tuple[str, str, Segments]:
    words = rng.sample(text_words(), min(len(text_words()), max(2, units - 4)))
    # Few keys among other text, or nothing but keys: the second is harder.
    if rng.random() < 0.5:
        words = words[: rng.randint(2, 8)]
    pairs = {word: digits(rng, 3, 5) for word in words}
    lines = [f"The value of {word} is {value}." for word, value in pairs.items()]
    if len(lines) < 9:
        lines = _scattered(rng, lines, natural(rng, max(1, units - 2 * len(lines))))
    asked = rng.choice(words)
    answer: Segments = [(f"The value of {asked} is", 1), (f" {pairs[asked]}", ANSWER_WEIGHT), (".", 1)]
    return "\n".join(lines), f"What is the value of {asked}?", answer


def _scattered(rng: random.Random, lines: list[str], filler: list[str]) -> list[str]:
    mixed = list(filler)
    for line in lines:
        mixed.insert(rng.randint(0, len(mixed)), line)
    return mixed
