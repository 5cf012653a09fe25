"""RULER's texts are NVIDIA's to the byte, given the same random numbers and number of units."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ultralong_ray.eval.tasks.haystack import Haystack, load_haystack
from ultralong_ray.eval.tasks.ruler import NEEDLE_TASKS
from ultralong_ray.eval.tasks.ruler_needles import Draft, needle_draft
from ultralong_ray.eval.tasks.ruler_questions import QuestionPool, load_hotpotqa, load_squad, question_draft
from ultralong_ray.eval.tasks.ruler_tracking import tracking_draft
from ultralong_ray.eval.tasks.ruler_words import LONG_REPEATS, coded_text_draft, coded_vocabulary, common_words_draft
from ultralong_ray.eval.tasks.words import HyphenPairs, Words, load_words
from ultralong_ray.storage import Location


def test_every_text_is_the_official_one(shared_data: Path, vectors: Callable[[str], Any]) -> None:
    words = load_words(Location.of(shared_data / "words/wonderwords_2.2.0.json"))
    essay = load_haystack([Location.of(shared_data / "haystacks/emerson_essays.json")])
    pools = {
        "squad": load_squad(Location.of(shared_data / "qa/squad_standin_xquad_en.json")),
        "hotpotqa": load_hotpotqa(Location.of(shared_data / "qa/hotpotqa_dev_distractor_sample100.json")),
    }
    rows = vectors("ruler/unit_generate_input_output.jsonl.gz")
    assert len(rows) == 52
    for row in rows:
        draft = _draft(row, words, essay, pools)
        assert draft.context + draft.question + draft.answer_prefix == row["full_text"], row["task"]
        assert list(draft.answers) == row["outputs"]


def _draft(row: dict[str, Any], words: Words, essay: Haystack, pools: dict[str, QuestionPool]) -> Draft:
    rng, seed, call = random.Random(row["reseed_before_call"]), row["module_random_seed"], row["call"]
    if row["task"] in NEEDLE_TASKS:
        return needle_draft(NEEDLE_TASKS[row["task"]], call["num_haystack"], rng, seed, words, essay)
    if row["task"] == "vt":
        numpy_rng = np.random.RandomState(row["reseed_before_call"])
        return tracking_draft(
            call["num_noises"], rng, numpy_rng, num_chains=call["num_chains"], num_hops=call["num_hops"]
        )
    if row["task"] == "cwe":
        return common_words_draft(call["num_words"], rng, seed, words, words.common_pool(seed), LONG_REPEATS)
    if row["task"] == "fwe":
        return coded_text_draft(call["num_words"], coded_vocabulary(call["vocab_size"], rng, seed), seed)
    return question_draft(pools[row["task_args"]["dataset"]], call["index"], call["num_docs"], rng, seed)


@pytest.mark.parametrize(
    ("adjectives", "nouns"),
    [
        (["red", "blue"], ["cat", "ant", "bee"]),
        (["ill", "ill-fated", "illegal", "red"], ["x", "fated-x", "z"]),  # ill-fated-x twice, and sorted in between
        (["a", "a-b", "a-b-c", "ab"], ["b-c-d", "c", "d"]),
    ],
)
def test_hyphen_pairs_are_the_sorted_set_of_all_pairs(adjectives: list[str], nouns: list[str]) -> None:
    pairs = HyphenPairs(adjectives, nouns)
    expected = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    assert [pairs[index] for index in range(len(pairs))] == expected


def test_essay_needles_leave_the_text_whole_and_stand_between_sentences(essay: Haystack, words: Words) -> None:
    draft = needle_draft(NEEDLE_TASKS["niah_multivalue"], 200, random.Random(3), 42, words, essay)
    body = draft.context.split("\n", 1)[1]
    needles = body.split("One of the special magic numbers for ")[1:]
    assert len(needles) == 4 and all(body.count(answer) == 1 for answer in draft.answers)
    for answer in draft.answers:
        before = body[: body.index(f"One of the special magic numbers for {draft.facts['keys'][0]} is: {answer}.")]
        assert before.strip() == "" or before.rstrip().endswith(".")
        body = body.replace(f"One of the special magic numbers for {draft.facts['keys'][0]} is: {answer}.", "")
    assert body.split() == essay.text(0, 200).split()


def test_no_filler_needle_repeats_what_is_asked_for() -> None:
    words = Words("two keys", ("cat",), ("red", "blue"), ("go",))  # half of all keys drawn are the asked one
    for seed in range(20):
        draft = needle_draft(NEEDLE_TASKS["niah_multikey_2"], 12, random.Random(seed), 42, words, None)
        assert draft.context.count(f" for {draft.facts['keys'][0]} is: ") == 1
        assert draft.context.count(" is: ") == 13


def test_a_short_essay_is_repeated(essay: Haystack) -> None:
    size, sentences = len(essay.words), len(essay.sentence_starts)
    assert sentences == 60
    assert essay.text(size - 2, size + 3).split() == [*essay.words[-2:], *essay.words[:3]]
    assert essay.num_sentences(2 * size) == 120 and essay.num_sentences(2 * size + 1) == 121
    assert essay.sentence_start(61) == size + essay.sentence_starts[1]


def test_no_two_of_the_asked_needles_have_one_key(essay: Haystack) -> None:
    words = Words("five keys", ("cat",), ("red", "blue", "green", "black", "white"), ("go",))
    for seed in range(20):
        draft = needle_draft(NEEDLE_TASKS["niah_multiquery"], 50, random.Random(seed), 42, words, essay)
        assert len(set(draft.facts["keys"])) == 4, "a key with two needles has no one answer"
