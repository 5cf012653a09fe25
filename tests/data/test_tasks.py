"""Synthetic tasks: every answer follows from its context, weights and budgets are as said, kinds can be mixed."""

from __future__ import annotations

import random
import re
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from ultralong_ray.config import SftConfig, SourceConfig
from ultralong_ray.data.passes import tokenize_items, tokenize_part
from ultralong_ray.data.task_kinds import (
    BODIES,
    MOST_ROUNDS,
    UNITS_PER_ROUND,
    arithmetic,
    common_words,
    copying,
    frequent_words,
    needles,
    questions,
    rounds,
    variables,
)
from ultralong_ray.data.tasks import task_documents
from ultralong_ray.data.token_shards import read_document_table
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.storage import Location

REPOSITORY = Path(__file__).resolve().parents[2]
EVERY_KIND = {kind: 1.0 for kind in ("passkey", "key_value", "repetition", *BODIES)}


@cache
def tokenizer() -> Any:
    return load_tokenizer(str(REPOSITORY / "jobs/models/tiny-512"))


def answer_of(segments: list[tuple[str, int]]) -> str:
    return "".join(text for text, weight in segments if weight > 1)


@pytest.mark.parametrize("seed", range(40))
def test_needles_ask_for_values_that_the_text_gives_to_those_keys(seed: int) -> None:
    context, question, segments = needles(random.Random(seed), 60)
    values = re.split(r", and |, ", answer_of(segments).strip())
    lines = [line for line in re.split(r"\n|(?<=\.) (?=One|The|Remember)", context) if line]
    for value in values:
        holders = [line for line in lines if re.search(rf"\b{re.escape(value)}\.", line)]
        assert holders, value
        assert any(word in question for line in holders for word in re.findall(r"[\w-]+", line) if len(word) > 3)


@pytest.mark.parametrize("seed", range(20))
def test_variables_are_the_chain_of_the_value(seed: int) -> None:
    context, question, segments = variables(random.Random(seed), 80)
    value = re.findall(r"\d{4,5}", question)[-1]
    names = answer_of(segments).split()
    pairs = re.findall(r"([A-Z]{3,5}) (?:=|be) (?:VAR )?(\w+)", context.rsplit("\n\n", 1)[-1])
    reached = {name for name, given in pairs if given == value}
    for name, given in pairs:  # assignments come after what they refer to
        if given in reached:
            reached.add(name)
    assert set(names) == reached


@pytest.mark.parametrize("seed", range(20))
def test_common_words_are_the_most_frequent_of_the_list(seed: int) -> None:
    context, _, segments = common_words(random.Random(seed), 80)
    counts = Counter(re.findall(r"\d+\. (\w+)", context))
    asked = re.findall(r"\d+\. (\w+)", answer_of(segments))
    others = max(count for word, count in counts.items() if word not in asked)
    assert min(counts[word] for word in asked) > others


@pytest.mark.parametrize("seed", range(20))
def test_frequent_words_come_in_the_order_of_their_counts(seed: int) -> None:
    context, _, segments = frequent_words(random.Random(seed), 80)
    counts = Counter(word for word in context.split() if re.fullmatch("[a-z]{5,7}", word))
    asked = answer_of(segments).split()
    assert [counts[word] for word in asked] == sorted((counts[word] for word in asked), reverse=True)
    assert counts[asked[2]] > max(counts[word] for word in counts if word not in asked) - 1


@pytest.mark.parametrize("seed", range(20))
def test_questions_are_answered_by_the_documents(seed: int) -> None:
    context, question, segments = questions(random.Random(seed), 60)
    assert answer_of(segments).strip() in " ".join(context.split())
    assert question


def test_copies_and_sums() -> None:
    for seed in range(20):
        context, _, segments = copying(random.Random(seed), 20)
        assert context.endswith("\n" + answer_of(segments))
        _, question, segments = arithmetic(random.Random(seed), 9)
        asked = [question.removeprefix("What is ").rstrip("?"), *(text.strip(" =\n") for text, _ in segments[2::2])]
        answers = [int(text) for text, weight in segments if weight > 1]
        assert [eval(text) for text in asked] == answers


def test_documents_fit_and_depend_on_seed_and_index_alone() -> None:
    made = list(task_documents(tokenizer(), 0, 60, 300, 5, EVERY_KIND))
    again = list(task_documents(tokenizer(), 40, 20, 300, 5, EVERY_KIND))
    assert {document.domain for document in made} == set(EVERY_KIND)
    assert max(len(document.input_ids) for document in made) <= 300
    for first, second in zip(made[40:], again, strict=True):
        assert (first.id, first.domain) == (second.id, second.domain)
        assert np.array_equal(first.input_ids, second.input_ids)
        assert first.loss_weight is not None and second.loss_weight is not None
        assert np.array_equal(first.loss_weight, second.loss_weight)


def test_a_conversation_learns_from_its_answer_alone() -> None:
    mix = {kind: 1.0 for kind in EVERY_KIND if kind != "repetition"}
    header, whole = "assistant<|end_header_id|>\n\n", 0
    for document in task_documents(tokenizer(), 0, 40, 400, 5, mix, conversations=True):
        assert document.loss_weight is not None
        text = tokenizer().decode(document.input_ids)
        assert set(np.unique(document.loss_weight)) <= {0, 1}
        if text.endswith(tokenizer().eos_token):  # not cut at the budget
            targets = tokenizer().decode(document.input_ids[document.loss_weight > 0])
            answers = [turn.split(tokenizer().eos_token)[0] + tokenizer().eos_token for turn in text.split(header)[1:]]
            assert "".join(answers) == targets
            whole += 1
    assert whole > 20


@pytest.mark.parametrize("seed", range(20))
def test_rounds_ask_for_every_key_once_and_the_text_gives_each_value_once(seed: int) -> None:
    context, question, segments = rounds(random.Random(seed), 400)
    asked = [question, *(text for text, weight in segments if weight == 0)]
    values = [text.strip() for text, weight in segments if weight > 1]
    assert len(asked) == len(values) == 400 // UNITS_PER_ROUND
    assert len(set(asked)) == len(asked)
    facts = re.findall(r"The ([a-z]+ (?:[a-z]+|of [\w-]+)) is (\d+)\.", context)
    assert len(facts) == len(dict(facts)) == len(asked)
    for words, value in zip(asked, values, strict=True):
        assert dict(facts)[words.rstrip("?").split(" the ")[-1]] == value
    assert [value for _, value in facts] != values, "asked in another order"
    assert sum(" of " not in name for name, _ in facts) == len(facts) // 4 and "pass key" in dict(facts)


def test_rounds_from_start_put_half_of_the_facts_by_the_logarithm_of_their_place() -> None:
    fact = re.compile(r"The ([a-z]+ (?:[a-z]+|of [\w-]+)) is (\d+)\.")

    def shares(*, from_start: bool) -> list[float]:
        """Of the facts of four texts, those within the first tenth and the first hundredth."""
        places: list[float] = []
        for seed in range(4):
            context, _, _ = rounds(random.Random(seed), 100_000, from_start=from_start)
            found = [one.start() / len(context) for one in fact.finditer(context)]
            assert len(found) == MOST_ROUNDS
            places += found
        return [sum(place < limit for place in places) / len(places) for limit in (0.1, 0.01)]

    # of 50,000 to 100,000 lines a tenth has the logarithms up to 3.7 or 4 of 4.7 or 5, a hundredth those up to 2.7 or 3
    assert shares(from_start=True) == pytest.approx([0.05 + 0.395, 0.005 + 0.295], abs=0.05)
    assert shares(from_start=False) == pytest.approx([0.1, 0.01], abs=0.03)


def test_rounds_are_turns_of_the_chat_template_and_fill_their_window() -> None:
    lengths = []
    for document in task_documents(tokenizer(), 0, 7, 12000, 1, {"rounds": 1.0}, conversations=True):
        text = tokenizer().decode(document.input_ids)
        turns = re.findall(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", text, re.DOTALL)
        assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2) and len(turns) > 8
        messages = [{"role": role, "content": words} for role, words in turns]
        again = tokenizer().apply_chat_template(messages, tokenize=False)
        assert again == re.sub(r"(assistant<\|end_header_id\|>\n\n) ", r"\1", text)  # a space may stand before answers
        lengths.append(len(document.input_ids))
    assert max(lengths) <= 12000 and np.median(lengths) > 11000


def test_turns_end_as_the_template_ends_them_where_that_is_not_the_eos_token() -> None:
    other = deepcopy(tokenizer())
    other.add_tokens(["<|im_end|>"], special_tokens=True)
    other.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    for document in task_documents(other, 0, 4, 2000, 1, {"rounds": 1.0, "passkey": 1.0}, conversations=True):
        text = other.decode(document.input_ids)
        turns = re.findall(r"<(user|assistant)>(.*?)<\|im_end\|>\n?", text, re.DOTALL)
        messages = [{"role": role, "content": words} for role, words in turns]
        assert text + "\n" == other.apply_chat_template(messages, tokenize=False)
        targets = other.decode(document.input_ids[np.array(document.loss_weight) > 0])
        assert targets == "".join(words + "<|im_end|>" for role, words in turns if role == "assistant")


def test_two_sources_of_tasks_make_different_documents(tmp_path: Path) -> None:
    name = str(REPOSITORY / "jobs/models/tiny-512")
    short, long = (
        SourceConfig(kind="tasks", num_documents=3, max_tokens_per_document=n, task_mix={"passkey": 1.0})
        for n in (192, 384)
    )
    folder = Location.of(tmp_path)
    alone, _ = tokenize_items([(short, "text")], (name, None), folder, 384, 0)
    items, _ = tokenize_items([(short, "text"), (long, "text")], (name, None), folder, 384, 0)
    assert items[: len(alone)] == alone, "what stands behind a source changes nothing of it"
    counts = [tokenize_part(item) for item in items]
    assert all(set(count["seconds"]) == {"make", "write"} for count in counts), "each phase by its own name"
    shards = [(item.name, count["weights"], item.source) for item, count in zip(items, counts, strict=True)]
    table = read_document_table(folder, shards)
    assert len(table) == 6 and len(table.repeated()) == 0
    assert max(table.num_tokens[:3]) <= 192 < max(table.num_tokens[3:])


def test_mixes_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValidationError, match="task_mix is of sources of kind"):
        SourceConfig(kind="installed", task_mix={"needles": 1.0})
    with pytest.raises(ValidationError, match="Input should be"):
        SourceConfig(kind="tasks", num_documents=1, max_tokens_per_document=64, task_mix={"riddles": 1.0})  # type: ignore[dict-item]
    longer = SourceConfig(kind="tasks", num_documents=1, max_tokens_per_document=65, task_mix={"needles": 1.0})
    with pytest.raises(ValidationError, match=r"exceeds sft\.max_sample_tokens 64"):
        SftConfig(
            sources=(longer,), sequence_length=64, max_sample_tokens=64, global_batch_sequences=1, learning_rate=1
        )
    tasks = SourceConfig(kind="tasks", num_documents=1, max_tokens_per_document=64)
    with pytest.raises(ValidationError, match='"repetition" asks nothing'):
        SftConfig(sources=(tasks,), sequence_length=64, max_sample_tokens=64, global_batch_sequences=1, learning_rate=1)
