"""A prompt's text, ids and estimate, with and without a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample, Turn

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
