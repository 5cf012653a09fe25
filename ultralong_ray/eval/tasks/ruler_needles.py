"""RULER's eight needle tasks: one or more sentences with a key and a value in a haystack, and a question for values.

In go settings, a number of haystack units and a random generator; out comes a `Draft`. Follows NVIDIA/RULER @ c3f5e3b4,
scripts/data/synthetic/niah.py, draw by draw: with the same generator and number of units the text is the same, except
that essay sentences are split by our own rule (see `haystack.py`).
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.words import Words

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {type} for {key} is: {value}."
INSTRUCTION = (
    "Some special magic {type} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {type} afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {type} for {query} mentioned in the provided text?"
ANSWER_PREFIX = " The special magic {type} for {query} mentioned in the provided text are"
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]  # percent

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, slots=True)
class NeedleSettings:
    """A row of RULER's synthetic.yaml."""

    haystack: Literal["noise", "essay", "needle"]
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


@dataclass(frozen=True, slots=True)
class Draft:
    """The parts of a prompt before its tokens are counted. `context` starts with the instruction."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    facts: dict[str, Any]


def needle_draft(
    settings: NeedleSettings, units: int, rng: random.Random, shuffle_seed: int, words: Words, essay: Haystack | None
) -> Draft:
    """A prompt of `units` essay words, noise lines or needle lines; the needles themselves come on top."""
    num_keys = max(settings.num_keys, settings.num_queries)
    keys, values = [], []
    taken: set[str] = set()
    for _ in range(num_keys):
        keys.append(_draw_new(settings.keys, rng, words, taken))
        values.append([_draw_new(settings.values, rng, words, taken) for _ in range(settings.num_values)])
    needles = [_needle(settings, key, value) for key, of_key in zip(keys, values, strict=True) for value in of_key]
    random.Random(shuffle_seed).shuffle(needles)
    if settings.haystack == "essay":
        assert essay is not None
        context = _in_essay(needles, units, rng, essay)
    else:
        context = _in_lines(settings, needles, units, rng, words, taken)
    asked = rng.sample(range(num_keys), settings.num_queries)
    answers = tuple(value for i in asked for value in values[i])
    named = [keys[i] for i in asked]
    query = ", ".join(named[:-1]) + ", and " + named[-1] if len(named) > 1 else named[0]
    single = settings.num_queries * settings.num_values == 1
    kind = settings.values[:-1] if single else settings.values
    instruction, question, prefix = (
        _in_singular(text) if single else text for text in (INSTRUCTION, QUESTION, ANSWER_PREFIX)
    )
    return Draft(
        instruction.format(type=kind) + context,
        question.format(type=kind, query=query),
        prefix.format(type=kind, query=query),
        answers,
        {"keys": named, "depths_percent": [_depth(context, answer) for answer in answers]},
    )


def _draw(kind: Kind, rng: random.Random, words: Words) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return rng.choice(words.keys)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _draw_new(kind: Kind, rng: random.Random, words: Words, taken: set[str]) -> str:
    """One that is not taken, which it then is: RULER leaves it to chance that a key has one answer."""
    drawn = _draw(kind, rng, words)
    while drawn in taken:
        drawn = _draw(kind, rng, words)
    taken.add(drawn)
    return drawn


def _needle(settings: NeedleSettings, key: str, value: str) -> str:
    return NEEDLE.format(type=settings.values, key=key, value=value)


def _in_singular(text: str) -> str:
    """RULER's replacements for one key and one value, in its order."""
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is")


def _in_essay(needles: list[str], num_words: int, rng: random.Random, essay: Haystack) -> str:
    sentences = essay.num_sentences(num_words)
    depths = rng.sample(DEPTHS, len(needles))
    pieces: list[str] = []
    start = 0
    for needle, sentence in zip(needles, sorted(int(sentences * (depth / 100)) for depth in depths), strict=True):
        end = num_words if sentence >= sentences else min(essay.sentence_start(sentence), num_words)
        pieces += [essay.text(start, end), needle]
        start = end
    return " ".join([*pieces, essay.text(start, num_words)])


def _in_lines(
    settings: NeedleSettings, needles: list[str], units: int, rng: random.Random, words: Words, taken: set[str]
) -> str:
    """Needles at random places among lines. No other line repeats a key or value, which RULER leaves to chance."""
    if settings.haystack == "noise":
        lines = [NOISE] * units
    else:
        lines = []
        for _ in range(units):
            key, value = _draw(settings.keys, rng, words), _draw(settings.values, rng, words)
            while key in taken or value in taken:
                key, value = _draw(settings.keys, rng, words), _draw(settings.values, rng, words)
            lines.append(_needle(settings, key, value))
    places = sorted(rng.sample(range(units), len(needles)), reverse=True)
    for place, needle in zip(places, needles, strict=True):
        lines.insert(place, needle)
    return "\n".join(lines)


def _depth(context: str, answer: str) -> float:
    return round(100 * context.find(answer) / len(context), 1)
