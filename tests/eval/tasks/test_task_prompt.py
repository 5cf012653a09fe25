"""A prompt's text, ids and estimate, with and without a chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from ultralong_ray.eval.tasks.infinitebench import CALCULATOR_TURNS
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample, Turn
from ultralong_ray.types import UserError

SAMPLE = Sample("t", 0, "Some text.", " Which?", " It is", (), 5, "string_match_all")
TALK = Sample(
    "t", 0, "", "And?", " Well", (), 5, "string_match_all", turns=(Turn("user", "Hi"), Turn("assistant", "Yes"))
)


def test_texts(mark_tokenizer: Any) -> None:
    plain, chat = (Prompts(mark_tokenizer, chat_template=chosen) for chosen in (False, True))
    assert plain.text(SAMPLE) == "Some text. Which? It is"
    assert chat.text(SAMPLE) == "<user>Some text. Which?</><assistant> It is"  # the prefix is behind the header
    assert plain.text(TALK) == "User: Hi\n\nAssistant: Yes\n\nUser: And?\n\nAssistant: Well"
    assert chat.text(TALK) == "<user>Hi</><assistant>Yes</><user>And?</><assistant> Well"


def test_a_template_that_refuses_the_turns_is_told(mark_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> str:
        raise TemplateError("Only user and assistant roles are supported!")

    monkeypatch.setattr(mark_tokenizer, "apply_chat_template", refuses)
    prompts = Prompts(mark_tokenizer, chat_template=True)
    calculator = replace(SAMPLE, task="infinitebench/math_calc", turns=CALCULATOR_TURNS)
    with pytest.raises(UserError, match="infinitebench/math_calc") as caught:
        prompts.text(calculator)
    for words in ("system, user, system, user", "Only user", 'template = "yarn-mistral"', "chat_template = false"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match="chat_template = false") as caught:
        prompts.text(TALK)
    assert "yarn-mistral" not in str(caught.value)


def test_one_bos_either_way(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for chat_template in (False, True):
        prompts = Prompts(tokenizer, chat_template=chat_template)
        ids = prompts.ids(prompts.text(SAMPLE))
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert prompts.measured(SAMPLE).prompt_tokens == len(ids)


def test_the_estimate_counts_every_word_once_remembered(tiny_llama: Path) -> None:
    prompts = Prompts(AutoTokenizer.from_pretrained(tiny_llama), chat_template=False)
    text = "The grass is green. The sky is blue.\nHere we go. 12 and 345. " * 50
    assert abs(prompts.estimate(text) - len(prompts.ids(text))) <= 2
    prompts.tokenizer = None  # from memory alone
    assert abs(prompts.estimate(text + text) - 2 * prompts.estimate(text)) <= 2
