"""RULER's two counting tasks: the most common words of a numbered list, and the most frequent words of a coded text.

In go a number of words and a random generator; out comes a `Draft`. Follows NVIDIA/RULER @ c3f5e3b4,
scripts/data/synthetic/common_words_extraction.py and freq_words_extraction.py, draw by draw.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ultralong_ray.eval.tasks.ruler_needles import Draft
from ultralong_ray.eval.tasks.words import Words

COMMON_INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
COMMON_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10

CODED_INSTRUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
CODED_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_LETTERS = 6
ZETA_2 = math.pi**2 / 6  # Riemann's zeta at RULER's exponent alpha = 2


@dataclass(frozen=True, slots=True)
class Repeats:
    """How often common and other words appear in the list, and in the solved example before it (0: no example)."""

    common: int
    other: int
    example_words: int
    example_common: int
    example_other: int


LONG_REPEATS = Repeats(30, 3, 40, 10, 3)
SHORT_REPEATS = Repeats(6, 1, 20, 3, 1)  # RULER's below 4096 tokens
SHORTEST_REPEATS = Repeats(3, 1, 0, 0, 0)  # ours, where RULER's own does not fit


def common_words_draft(
    num_words: int,
    rng: random.Random,
    shuffle_seed: int,
    words: Words,
    pool: Sequence[str],
    repeats: Repeats,
) -> Draft:
    """A list with `num_words` distinct words; `pool` is the one of `words` for `shuffle_seed`."""

    def numbered(count: int, common_repeats: int, other_repeats: int) -> tuple[str, list[str]]:
        chosen = words.distinct(count, rng, pool)
        listed = chosen[:NUM_COMMON] * common_repeats + chosen[NUM_COMMON:] * other_repeats
        random.Random(shuffle_seed).shuffle(listed)
        return _enumerate(listed), chosen[:NUM_COMMON]

    example = ""
    if repeats.example_words:
        text, answers = numbered(repeats.example_words, repeats.example_common, repeats.example_other)
        example = f"{COMMON_INSTRUCTION}{text}{COMMON_QUESTION}{COMMON_PREFIX} {_enumerate(answers)}\n"
    text, answers = numbered(num_words, repeats.common, repeats.other)
    facts = {"distinct_words": num_words, "common_repeats": repeats.common, "other_repeats": repeats.other}
    return Draft(example + COMMON_INSTRUCTION + text, COMMON_QUESTION, COMMON_PREFIX, tuple(answers), facts)


def _enumerate(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def coded_vocabulary(size: int, rng: random.Random, shuffle_seed: int) -> list[str]:
    """`size` made-up words by rank of frequency; the first is dots, which are to be ignored."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))

    words = [word() for _ in range(size)]
    distinct = set(words)
    while len(distinct) < size:
        distinct.add(word())
    ranked = sorted(distinct)
    random.Random(shuffle_seed).shuffle(ranked)
    ranked[0] = "..."
    return ranked


def coded_text_draft(num_words: int, vocabulary: Sequence[str], shuffle_seed: int) -> Draft:
    """The word of rank k appears int(num_words * k^-2 / zeta(2)) times; asked for are ranks 2 to 4."""
    ranks = np.arange(1, len(vocabulary) + 1)
    counts = (num_words * (ranks**-2.0) / ZETA_2).astype(int)
    text = [word for word, count in zip(vocabulary, counts.tolist(), strict=True) for _ in range(count)]
    random.Random(shuffle_seed).shuffle(text)
    facts = {"vocabulary": len(vocabulary), "counts": counts[1:5].tolist()}
    return Draft(CODED_INSTRUCTION + " ".join(text), CODED_QUESTION, CODED_PREFIX, tuple(vocabulary[1:4]), facts)
