"""Needle sentence, multi-round, many-shot, retrieved questions and perplexity by position."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from ultralong_ray.eval.tasks.budget import DoesNotFit
from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.manyshot import load_labelled, made_labelled, manyshot_sample
from ultralong_ray.eval.tasks.multiround import final_request, mrcr_samples, multiround_sample, sequence_ratio
from ultralong_ray.eval.tasks.needle import NUMBER, SENTENCE, SENTENCE_ANSWER, needle_sample, word_recall
from ultralong_ray.eval.tasks.perplexity import bucket_edges, long_documents, losses_by_position
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.retrieved import retrieved_sample, substring_exact_match
from ultralong_ray.eval.tasks.ruler_questions import QuestionPool
from ultralong_ray.eval.tasks.score import score
from ultralong_ray.eval.tasks.short_skills import words_repeated
from ultralong_ray.eval.tasks.words import Words
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

LENGTH = 1500


@pytest.mark.parametrize(("depth", "low", "high"), [(0.0, 0.0, 0.0), (50.0, 0.45, 0.55), (100.0, 1.0, 1.0)])
def test_needle_sentence_stands_at_its_depth(
    essay: Haystack, prompts: Prompts, depth: float, low: float, high: float
) -> None:
    sample = needle_sample("sentence", essay, prompts, length_tokens=LENGTH, depth_percent=depth, index=0, seed=1)
    body = sample.context.split("<book> ", 1)[1]
    assert body.count(SENTENCE) == 1
    before, after = body.split(f"\n{SENTENCE}\n")
    assert low <= len(before) / (len(before) + len(after)) <= high
    assert before == "" or before.rstrip().endswith(".") or depth == 100
    assert LENGTH - 10 < sample.prompt_tokens + sample.max_new_tokens <= LENGTH
    assert score(sample, f" {SENTENCE_ANSWER.upper()}") == 1.0 and score(sample, "") == 0.0


def test_word_recall_by_hand() -> None:
    assert word_recall("Eat a sandwich", [SENTENCE_ANSWER]) == 3 / 11  # "a" twice in the answer, counted once


def test_needle_number_has_distractors_and_is_drawn_per_sample(essay: Haystack, prompts: Prompts) -> None:
    first, second = (
        needle_sample(
            "number", essay, prompts, length_tokens=LENGTH, depth_percent=30, index=index, seed=1, num_distractors=3
        )
        for index in (0, 1)
    )
    assert first.references != second.references
    assert len(re.findall(r"magic [\w ]+ number is: \d{7}\.", first.context)) == 4
    assert NUMBER.format(city="Singapore", number=first.references[0]) in first.context
    assert score(first, f" {first.references[0]}.") == 1.0 and score(first, f"1{first.references[0]}") == 0.0
    with pytest.raises(DoesNotFit, match="niah/number: 40 tokens are too few"):
        needle_sample("number", essay, prompts, length_tokens=40, depth_percent=0, index=0, seed=1)
    with pytest.raises(ValueError, match="num_distractors 7"):
        needle_sample("number", essay, prompts, length_tokens=40, depth_percent=0, index=0, seed=1, num_distractors=7)


@pytest.mark.parametrize("num_needles", [2, 8])
def test_multiround_asks_for_one_of_the_equal_requests(
    essay: Haystack, words: Words, prompts: Prompts, num_needles: int
) -> None:
    for index in range(3):
        sample = multiround_sample(
            essay, words, prompts, length_tokens=3000, num_needles=num_needles, index=index, seed=1
        )
        request = re.search(r"\(1 indexed\) (.*?)\. Do not", sample.question)
        assert request is not None
        answers = [
            answer.content
            for asked, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True)
            if asked.content.endswith(f" {request[1]}")
        ]
        assert len(answers) == num_needles == len(set(answers))
        assert sample.references == (sample.facts["prefix"] + answers[sample.facts["wanted"] - 1],)
        assert f"to the {sample.facts['wanted']}" in sample.question
        assert 2800 < sample.prompt_tokens + sample.max_new_tokens <= 3000
        assert score(sample, f" {sample.references[0]}") == 1.0
        assert score(sample, answers[sample.facts["wanted"] - 1]) == 0.0  # without the random string
        assert 0 < score(sample, sample.facts["prefix"] + "w1x2 w9") < 0.5


def test_multiround_needs_enough_text(mark_tokenizer: Any, words: Words) -> None:
    tiny = Haystack("short.txt", ("One", "two."))
    with pytest.raises(UserError, match=r"short.txt has only \d different passages"):
        multiround_sample(
            tiny, words, Prompts(mark_tokenizer, chat_template=True), length_tokens=9000, num_needles=2,
            index=0, seed=1,
        )  # fmt: skip


def test_ordinals_and_ratio() -> None:
    endings = [re.search(r"the (\w+) ", final_request("x", number, "poem"))[1] for number in (1, 2, 3, 4, 11, 22)]  # type: ignore[index]
    assert endings == ["1st", "2nd", "3rd", "4th", "11th", "22nd"]
    assert sequence_ratio("xabc", ["xabd"], "x") == pytest.approx(2 / 3)
    assert sequence_ratio(" xabc", ["xabc"], "x") == 0.0  # MRCR's rule is strict


def test_mrcr_file(tmp_path: Path, mark_tokenizer: Any) -> None:
    prompts = Prompts(mark_tokenizer, chat_template=True)
    messages = [
        {"role": r, "content": c} for r, c in (("user", "Write"), ("assistant", "text"), ("user", "Prepend ab"))
    ]
    row = {"prompt": json.dumps(messages), "answer": "abtext", "random_string_to_prepend": "ab", "n_needles": 2}
    long = {**row, "prompt": [*messages[:2], {"role": "user", "content": "word " * 900}]}
    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(long) + "\n")
    samples = mrcr_samples(Location.of(file), prompts, length_tokens=200)
    assert [sample.index for sample in samples] == [0] and len(samples[0].turns) == 2
    assert score(samples[0], "abtext") == 1.0
    with pytest.raises(UserError, match="no row fits into 10 tokens"):
        mrcr_samples(Location.of(file), prompts, length_tokens=10)
    file.write_text(json.dumps({**row, "prompt": "[{}]"}))
    with pytest.raises(UserError, match=r"row 1: field 'prompt' is no list of messages"):
        mrcr_samples(Location.of(file), prompts, length_tokens=200)


def test_manyshot_examples_decide_the_label(prompts: Prompts, words: Words) -> None:
    data = made_labelled(words, num_labels=4, num_shown=300, num_asked=20, seed=3)
    assert not set(data.asked) & set(data.shown)
    for sample in [manyshot_sample(data, prompts, length_tokens=LENGTH, index=i, seed=1) for i in range(5)]:
        pairs = re.findall(r"The \w+ (\w+) near .*?\.\nlabel: (\d)", sample.context)
        by_noun = dict(pairs)
        assert all(by_noun[noun] == label for noun, label in pairs) and set(by_noun.values()) == set("0123")
        noun = sample.question.split()[2]
        assert by_noun[noun] == sample.references[0]
        assert LENGTH - 25 < sample.prompt_tokens + sample.max_new_tokens <= LENGTH
        assert len(pairs) == sample.facts["shots"]
        counts = [list(label for _, label in pairs).count(label) for label in "0123"]
        assert max(counts) - min(counts) <= 1
        assert score(sample, f" {sample.references[0]}\n") == 1.0
    with pytest.raises(UserError, match="many-shot: 100 labels need 600 nouns"):
        made_labelled(words, num_labels=100, num_shown=1, num_asked=1, seed=3)


def test_labelled_files(tmp_path: Path) -> None:
    shown, asked = tmp_path / "shown.jsonl", tmp_path / "asked.jsonl"
    shown.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "2"}\n{"text": "c", "label": 1}\n')
    asked.write_text('{"text": "a", "label": 1}\n')
    data = load_labelled(Location.of(shown), Location.of(asked))
    assert data.shown == (("b", "2"), ("c", "1")) and data.asked == (("a", "1"),)
    asked.write_text('{"text": "d", "label": 3}\n')
    with pytest.raises(UserError, match=r"asked.jsonl: label '3' has no example in"):
        load_labelled(Location.of(shown), Location.of(asked))


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (50, 0.5), (100, 1)])
def test_retrieved_passage_stands_at_its_depth(pool: QuestionPool, prompts: Prompts, depth: int, place: float) -> None:
    sample = retrieved_sample(pool, prompts, length_tokens=300, depth_percent=depth, index=4, seed=1)
    passages = sample.context.split("Document: ")[1:]
    assert len(passages) == len(set(passages)) == sample.facts["passages"] > 5
    found = next(k for k, passage in enumerate(passages) if "answer04" in passage)
    assert found == math.floor((len(passages) - 1) * place + 0.5)
    assert score(sample, "It is the Answer04!") == 1.0 and score(sample, "answer05") == 0.0
    everything = retrieved_sample(pool, prompts, length_tokens=90_000, depth_percent=depth, index=4, seed=1)
    assert everything.facts["passages"] == 30  # no passage twice, however long the prompt may be


def test_substring_exact_match() -> None:
    assert substring_exact_match("in the New-York.", ["newyork"]) == 1.0
    assert substring_exact_match("in York", ["new york", "Paris"]) == 0.0


def test_perplexity_of_long_documents(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' + json.dumps({"text": "The grass is green. " * 300}) + "\n")
    files = [Location.of(tmp_path / "a.jsonl")]
    documents = list(long_documents(files, tokenizer, length_tokens=700, count=1))
    assert [ids.shape for ids in documents] == [(700,)] and documents[0][0] == tokenizer.bos_token_id
    words = r"samples_per_cell is 2, and .*a.jsonl hold 1 documents as long, the longest of \d+ tokens"
    with pytest.raises(UserError, match=rf"perplexity at 700 tokens: {words}"):
        list(long_documents(files, tokenizer, length_tokens=700, count=2))
    assert bucket_edges(700) == [1, 256, 512, 700]
    losses = np.concatenate([np.full(255, 2.0), np.full(256, 1.0), np.full(188, 0.5)]).astype(np.float32)
    result = losses_by_position(losses)
    assert result["bucket_loss"] == [2.0, 1.0, 0.5] and result["bucket_end_tokens"] == [256, 512, 700]
    assert result["loss"] == pytest.approx((255 * 2 + 256 + 94) / 699)


def test_words_repeated_counts_to_the_first_wrong_one() -> None:
    assert words_repeated(" a b c d", ["a b c d"]) == 1.0 == words_repeated("a b c d e", ["a b c d"])
    assert words_repeated("a b x d", ["a b c d"]) == 0.5 and words_repeated("", ["a b"]) == 0.0
    assert words_repeated("b a", ["a b"]) == 0.0 and words_repeated("a", ["a b"]) == 0.5
