"""Chat samples to weighted tokens: exactly the assistant's words and the end of its turn are targets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ultralong_ray.data.chat import check_template, parse_messages, tokenize_chat
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.types import UserError

MESSAGES = [
    {"role": "user", "content": "where is the fox"},
    {"role": "assistant", "content": "over the dog"},
    {"role": "user", "content": "and now"},
    {"role": "assistant", "content": "lazy"},
]


def targets(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    sample = tokenize_chat(tokenizer, "s", "d", messages)
    assert sample.loss_weight is not None
    return tokenizer.decode(sample.input_ids[sample.loss_weight == 1])


def test_targets_are_the_assistants_turns(tokenizer: Any) -> None:
    assert targets(tokenizer, MESSAGES) == "over the dog<|end|>lazy<|end|>"


def test_ids_are_those_of_the_template(tokenizer: Any) -> None:
    sample = tokenize_chat(tokenizer, "s", "d", MESSAGES)
    assert sample.input_ids.tolist() == tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert sample.loss_weight is not None and sample.loss_weight[0] == 0


def test_content_that_repeats_the_users_words_is_told_apart(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "fox"}]
    assert targets(tokenizer, messages) == "fox<|end|>"


def test_first_token_is_never_a_target(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    sample = tokenize_chat(
        bare, "s", "d", [{"role": "user", "content": "x"}, {"role": "assistant", "content": "the fox"}]
    )
    assert sample.loss_weight is not None
    assert sample.loss_weight[0] == 0 and sample.loss_weight[1:].all()


WITHOUT_PROMPT = "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
NAMED = "{% for m in messages %}{{ m['role'] | upper + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
WITHOUT_HEADER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (WITHOUT_PROMPT, "over the dog<|end|>lazy<|end|>"),
        (NAMED, " over the dog<|end|> lazy<|end|>"),
        (WITHOUT_HEADER, " over the dog<|end|> lazy<|end|>"),
    ],
    ids=["ChatML", "named", "no header"],
)
def test_headers_are_no_targets_of_a_template_without_generation_prompt(
    tokenizer: Any, template: str, expected: str
) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = template
    assert targets(bare, MESSAGES) == expected


@pytest.mark.parametrize("answer", ["a", "assistant", "turn", "end"])
def test_an_answer_that_its_header_holds_is_told_apart(tokenizer: Any, answer: str) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = WITHOUT_PROMPT
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
    assert targets(bare, messages) == f"{answer}<|end|>"


def test_template_that_fails_refuses_the_messages(tokenizer: Any) -> None:
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"
    with pytest.raises(ValueError, match="refused by the chat template"):
        tokenize_chat(broken, "s", "d", MESSAGES)


def test_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else '...') + '<|end|>' }}{% endfor %}"
    )
    with pytest.raises(UserError, match="chat template"):
        tokenize_chat(rewriting, "s", "d", MESSAGES)


def test_no_template(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        check_template(bare)


def test_messages_nested_or_as_json() -> None:
    assert parse_messages(MESSAGES) == parse_messages(json.dumps(MESSAGES)) == MESSAGES


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("{", "not valid JSON"),
        pytest.param("[" * 100_000, "not valid JSON", id="nested too deep"),
        (None, "empty or no list"),
        ([], "empty or no list"),
        (["hello"], "messages\\[0\\] is str"),
        ([{"role": "user", "content": None}], "messages\\[0\\].content is NoneType"),
        ('[{"role": "user", "content": "\\ud83d"}]', "messages\\[0\\].content is not valid Unicode"),
        ('[{"role": "\\udc00", "content": "x"}]', "messages\\[0\\].role is not valid Unicode"),
        ([{"role": "user", "content": "x"}], "no turn of role assistant"),
        ([{"role": "assistant", "content": "x"}], "opens with the assistant"),
    ],
)
def test_bad_messages(value: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_messages(value)


def test_real_samples_with_the_llama3_template(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "dolma2-llama3-shaped"))
    for name in ("code", "general", "math"):
        for row in pq.read_table(shared_data / "sft" / f"{name}.parquet").slice(0, 20).to_pylist():
            messages = parse_messages(row["messages"])
            answers = [m["content"].strip() + "<|eot_id|>" for m in messages if m["role"] == "assistant"]
            assert targets(tokenizer, messages) == "".join(answers), row["id"]
