"""Short skills that an extension of the window must not cost: copying, sums, and values of keys.

In go a seed and a number; out comes a `Sample` as short as its question. For small models, which the standard tests
cannot tell apart; the loss on code beside them is a task of kind "perplexity".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.words import Words

COPIED_WORDS = 12
NUM_KEYS = 8
LINE_END = ("\n",)  # what follows the line of the answer does not count


def short_skills_sample(name: str, words: Words, prompts: Prompts, *, index: int, seed: int) -> Sample:
    """Sample `index` of skill `name`, a key of SKILLS. The seed, the name and the index draw what is in it."""
    return prompts.measured(SKILLS[name](words, random.Random(f"{seed}/{name}/{index}"), index))


def _copying(words: Words, rng: random.Random, index: int) -> Sample:
    text = " ".join(rng.sample(words.nouns, COPIED_WORDS))
    return Sample(
        task="short_skills/copying",
        index=index,
        context=f"Repeat this text:\n{text}\n",
        question="Now repeat it.",
        answer_prefix="",
        references=(text,),
        max_new_tokens=8 * COPIED_WORDS,
        metric="words_repeated",
        stop=LINE_END,
    )


def _arithmetic(words: Words, rng: random.Random, index: int) -> Sample:
    small, great = sorted((rng.randrange(100), rng.randrange(100)))
    asked, result = rng.choice(((f"{small} + {great}", small + great), (f"{great} - {small}", great - small)))
    return Sample(
        task="short_skills/arithmetic",
        index=index,
        context="Work it out.\n",
        question=f"What is {asked}?",
        answer_prefix=f"{asked} =",
        references=(str(result),),
        max_new_tokens=8,
        metric="first_number",
        stop=LINE_END,
    )


def _key_value(words: Words, rng: random.Random, index: int) -> Sample:
    pairs = {word: str(rng.randrange(100, 100_000)) for word in rng.sample(words.nouns, NUM_KEYS)}
    asked = rng.choice(tuple(pairs))
    return Sample(
        task="short_skills/key_value",
        index=index,
        context="".join(f"The value of {word} is {value}.\n" for word, value in pairs.items()),
        question=f"What is the value of {asked}?",
        answer_prefix=f"The value of {asked} is",
        references=(pairs[asked],),
        max_new_tokens=12,
        metric="first_number",
        stop=LINE_END,
    )


SKILLS: dict[str, Callable[[Words, random.Random, int], Sample]] = {
    "copying": _copying,
    "arithmetic": _arithmetic,
    "key_value": _key_value,
}


def words_repeated(prediction: str, references: Sequence[str]) -> float:
    """Share of the words of the expected text that the answer repeats from its start, up to the first wrong one."""
    given, wanted = prediction.split(), references[0].split()
    pairs = list(zip(given, wanted, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)) / len(wanted)
