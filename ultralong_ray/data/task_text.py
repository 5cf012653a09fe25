"""Words, numbers and filler that synthetic tasks are made of. Lengths are in units of about a dozen tokens."""

from __future__ import annotations

import random
from functools import lru_cache

# The filler of the passkey test (arXiv 2305.16300), as eval/passkey.py has it.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]


def digits(rng: random.Random, low: int, high: int) -> str:
    """A number of `low` to `high` digits, as text."""
    return "".join(str(rng.randrange(10)) for _ in range(rng.randint(low, high)))


@lru_cache(maxsize=1)
def sentences() -> list[str]:
    """Sentences of the Python language reference, which every machine has."""
    from pydoc_data import topics

    text = " ".join(" ".join(value.split()) for _, value in sorted(topics.topics.items()))
    return [sentence.strip() + "." for sentence in text.split(". ") if 20 < len(sentence) < 200]


@lru_cache(maxsize=1)
def text_words() -> list[str]:
    """Lower-case words of those sentences."""
    words = {word for sentence in sentences() for word in sentence.split() if word.isalpha() and word.islower()}
    return sorted(word for word in words if 3 <= len(word) <= 10)


def natural(rng: random.Random, units: int) -> list[str]:
    """Neighbouring sentences, about three units each."""
    known = sentences()
    start = rng.randrange(len(known))
    return [known[(start + i) % len(known)] for i in range(max(1, units // 3))]


def made_word(rng: random.Random) -> str:
    """A word that need not exist."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3)))


def drawn_words(rng: random.Random, count: int) -> list[str]:
    """Distinct words, real ones and made ones."""
    real = rng.sample(text_words(), min(count // 2 + 1, len(text_words())))
    words = dict.fromkeys(real)
    while len(words) < count:
        words[made_word(rng)] = None
    drawn = list(words)[:count]
    rng.shuffle(drawn)
    return drawn


def scattered(rng: random.Random, lines: list[str], filler: list[str]) -> list[str]:
    """The lines, in their order, at random places of the filler."""
    places = sorted(rng.randint(0, len(filler)) for _ in lines)
    mixed = list(filler)
    for place, line in reversed(list(zip(places, lines, strict=True))):
        mixed.insert(place, line)
    return mixed
