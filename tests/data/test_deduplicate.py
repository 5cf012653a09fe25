"""Exact and near duplicates of prompts, found the same way whatever the order of the samples."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ultralong_ray.config import DeduplicateConfig
from ultralong_ray.data.deduplicate import (
    describe_prompt,
    find_duplicates,
    near_duplicates,
    prompt_text,
    rows_per_band,
)

WORDS = [a + b + c for a in "bdfgk" for b in ("a", "e", "ora", "uni") for c in ("l", "n", "rt", "ss", "m")]
CONFIG = DeduplicateConfig()


def sentence(rng: random.Random, num_words: int) -> list[str]:
    return rng.choices(WORDS, k=num_words)


def duplicates(prompts: dict[str, str], config: DeduplicateConfig = CONFIG) -> tuple[dict[str, str], dict[str, str]]:
    found = find_duplicates({i: describe_prompt(text, config) for i, text in prompts.items()}, config)
    return found.exact, found.near


def jaccard(first: list[str], second: list[str], size: int) -> float:
    a, b = ({tuple(w[i : i + size]) for i in range(len(w) - size + 1)} for w in (first, second))
    return len(a & b) / len(a | b)


def test_exact_means_equal_but_for_case_and_white_space() -> None:
    prompts = {
        "b": "What  is\nTwo plus two?",
        "a": "what is two plus two?",
        "c": "what is two plus two",
        "d": "Is it 2?",
    }
    exact = DeduplicateConfig(near_threshold=None)
    assert duplicates(prompts, exact) == ({"b": "a"}, {})
    assert duplicates(prompts) == ({"b": "a"}, {"c": "a"})  # punctuation makes it a near one


def test_the_prompt_is_what_the_user_says() -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert prompt_text(messages) == "one\nthree"


def test_the_user_may_have_another_name() -> None:
    """A source that calls the user "human" has prompts too; a system prompt is one only where it stands alone."""
    system, answer = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "two"}
    assert prompt_text([system, {"role": "human", "content": "one"}, answer]) == "one"
    assert prompt_text([system, answer]) == "Be kind."
    asked = {f"c{i}": prompt_text([{"role": "human", "content": f"question {i}"}, answer]) for i in range(5)}
    assert duplicates(asked) == ({}, {})


def test_near_duplicates_are_those_above_the_threshold() -> None:
    """100 pairs well above the threshold and 100 well below: no pair is missed, none is made up."""
    rng = random.Random(0)
    prompts: dict[str, str] = {}
    for i in range(100):
        first = sentence(rng, 200)
        alike, other = list(first), list(first)
        alike[50] = "changed"
        for place in range(5, 200, 12):
            other[place] = "changed"
        assert jaccard(first, alike, 5) > 0.93 and jaccard(first, other, 5) < 0.5
        for name, text in (("a", first), ("b", alike), ("c", other)):
            prompts[f"{i:03d}{name}"] = " ".join(text)
    assert duplicates(prompts) == ({}, {f"{i:03d}b": f"{i:03d}a" for i in range(100)})


def test_the_estimate_is_the_jaccard_similarity() -> None:
    rng = random.Random(1)
    errors = []
    for _ in range(50):
        first = sentence(rng, 150)
        second = list(first)
        for place in rng.sample(range(150), 4):
            second[place] = "changed"
        a, b = (describe_prompt(" ".join(text), CONFIG).signature for text in (first, second))
        errors.append(float((a == b).mean()) - jaccard(first, second, 5))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.06


def test_order_of_samples_does_not_matter_and_every_dropped_one_has_a_survivor() -> None:
    rng = random.Random(2)
    prompts: dict[str, str] = {}
    for group in range(20):
        text = sentence(rng, 60)
        for member in range(10):
            changed = list(text)
            changed[rng.randrange(60)] = rng.choice(WORDS)
            prompts[f"{group}-{member}"] = " ".join(changed)
    config = DeduplicateConfig(near_threshold=0.65)
    names = list(prompts)
    expected = duplicates(prompts, config)
    assert len(expected[1]) > 50
    for seed in range(3):
        random.Random(seed).shuffle(names)
        assert duplicates({name: prompts[name] for name in names}, config) == expected
    dropped = expected[0].keys() | expected[1].keys()
    assert dropped.isdisjoint([*expected[0].values(), *expected[1].values()])
    assert all(survivor < name for name, survivor in expected[1].items())


def test_short_and_empty_prompts() -> None:
    prompts = {"a": "Hello", "b": "hello!", "c": "Hi", "d": "???", "e": "!!!", "f": ""}
    assert duplicates(prompts) == ({}, {"b": "a"})
    assert duplicates({}) == ({}, {})
    nothing_asked = {"a": "", "b": " \n", "c": ""}
    assert duplicates(nothing_asked) == duplicates(nothing_asked, DeduplicateConfig(near_threshold=None)) == ({}, {})


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_miss_few_pairs_at_the_threshold(threshold: float) -> None:
    rows = rows_per_band(128, threshold)
    assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
    assert rows == 128 or 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.99


def test_bands_agree_with_comparing_everything_with_everything() -> None:
    rng = np.random.default_rng(3)
    base = rng.integers(0, 2**32, (30, 64), dtype=np.uint32)
    signatures = np.repeat(base, 4, axis=0)
    noise = rng.random(signatures.shape) < 0.1
    signatures[noise] = rng.integers(0, 2**32, int(noise.sum()), dtype=np.uint32)
    expected: dict[int, int] = {}
    for row in range(len(signatures)):
        kept = [k for k in range(row) if k not in expected]
        alike = [k for k in kept if (signatures[k] == signatures[row]).mean() >= 0.75]
        if alike:
            expected[row] = alike[0]
    assert len(expected) > 60 and near_duplicates(signatures, 0.75) == expected
