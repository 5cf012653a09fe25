"""Passkey prompts: budget, depth, repeatability and scoring, for several tokenizers."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ultralong_ray.eval import passkey
from ultralong_ray.eval.passkey import (
    ANSWER_PREFIX,
    INTRODUCTION,
    NEEDLE,
    NOISE,
    QUESTION,
    build_prompt,
    encode_prompt,
    first_number,
    is_right,
    passkey_text,
)
from ultralong_ray.types import PasskeyPrompt, UserError

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
NEW_TOKENS = 8


@lru_cache(maxsize=4)
def shared_tokenizer(name: str) -> Any:
    folder = SHARED / "data/tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"no tokenizer {name} beside this checkout")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["tiny", "dolma2", "dolma2-llama3-shaped"])
def tokenizer(request: pytest.FixtureRequest, tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama) if request.param == "tiny" else shared_tokenizer(request.param)


def build(
    tokenizer: Any, length: int, depth: float, *, sample: int = 0, seed: int = 7, chat: bool | None = None
) -> Any:
    chat = bool(tokenizer.chat_template) if chat is None else chat
    return build_prompt(
        tokenizer,
        context_length_tokens=length,
        depth_percent=depth,
        sample=sample,
        seed=seed,
        max_new_tokens=NEW_TOKENS,
        chat_template=chat,
    )


@pytest.mark.parametrize("length", [300, 511, 2048, 16_384])
@pytest.mark.parametrize("depth", [0.0, 33.0, 100.0])
def test_budget_and_depth(tokenizer: Any, length: int, depth: float) -> None:
    chat = bool(tokenizer.chat_template)
    prompt: PasskeyPrompt = build(tokenizer, length, depth)
    needle = NEEDLE.format(key=prompt.expected)
    assert prompt.prompt.count(needle) == 1 and prompt.prompt.count(prompt.expected) == 2
    assert prompt.ids == encode_prompt(tokenizer, prompt.prompt, chat_template=chat)
    line_tokens = len(encode_prompt(tokenizer, f"{NOISE} " * 11, chat_template=chat)) - len(
        encode_prompt(tokenizer, f"{NOISE} " * 10, chat_template=chat)
    )
    assert length - line_tokens < len(prompt.ids) + NEW_TOKENS <= length
    before, after = (part.count(NOISE) for part in prompt.prompt.split(needle))
    assert before == int(depth / 100 * (before + after) + 0.5)


def test_text_is_in_the_published_order(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = build(tokenizer, 600, 50.0, chat=False).prompt
    assert plain.startswith(f"{INTRODUCTION}\n{NOISE} {NOISE} ")
    assert plain.endswith(f" {NOISE}\n{QUESTION} {ANSWER_PREFIX}")
    assert len(plain.split("\n")) == 5
    chat = build(tokenizer, 600, 50.0, chat=True).prompt
    assert chat.startswith("<s><|user|>\n" + INTRODUCTION)
    assert chat.endswith(f"{QUESTION}<|end|>\n<|assistant|>\n{ANSWER_PREFIX}")
    ids = encode_prompt(tokenizer, chat, chat_template=True)
    assert ids.count(0) == 1 and ids[0] == 0, "exactly one BOS"
    assert encode_prompt(tokenizer, plain, chat_template=False).count(0) == 1


def test_wording_of_published_prompts() -> None:
    """Introduction, needle and noise as in the prompts that the Landmark and LongLoRA generators print."""
    file = SHARED / "data/vectors/passkey/passkey.jsonl"
    if not file.is_file():
        pytest.skip("no passkey vectors beside this checkout")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    whole = [row for row in rows if row["chars"] > 2000 and row["prompt"]]
    assert whole
    for row in whole:
        assert row["prompt"].startswith(INTRODUCTION) and NOISE in row["prompt"]
        assert f"\n{NEEDLE.format(key=row['answer'])}\n" in row["prompt"]
        assert row["prompt"].endswith(f"\n{QUESTION} {ANSWER_PREFIX}")
        assert row["prompt"].count("\n") == passkey_text("1", 1, 1).count("\n") == 4


def test_pure_function_of_its_arguments(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert build(tokenizer, 512, 50.0) == build(tokenizer, 512, 50.0)
    keys = {
        build(tokenizer, length, depth, sample=sample, seed=seed).expected
        for length in (512, 513)
        for depth in (0.0, 50.0)
        for sample in (0, 1)
        for seed in (1, 2)
    }
    assert len(keys) == 16, "length, depth, sample and seed each give another key"
    assert all(len(key) == 5 and key.isdigit() for key in keys)


def test_whole_prompt_is_tokenised_few_times(tiny_llama: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    long_texts = []

    class Counting:
        chat_template = tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, **kwargs: Any) -> Any:
            long_texts.append(len(text))
            return tokenizer(text, **kwargs)

    prompt = build(Counting(), 32_768, 50.0)
    assert sum(size > len(prompt.prompt) // 2 for size in long_texts) <= 3


def test_too_short_a_context_names_the_shortest(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    with pytest.raises(UserError, match=r"60 tokens are too few .* the shortest is (\d+)") as error:
        build(tokenizer, 60, 0.0)
    shortest = int(str(error.value).rsplit(" ", 1)[1])
    assert len(build(tokenizer, shortest, 0.0).ids) + NEW_TOKENS == shortest
    with pytest.raises(UserError, match="too few"):
        build(tokenizer, shortest - 1, 0.0)


def test_a_long_prompt_is_tokenised_once(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a million tokens once takes seconds, and a grid has hundreds of prompts."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    lengths: list[int] = []

    def counted(*arguments: Any, **options: Any) -> list[int]:
        ids = encode_prompt(*arguments, **options)
        lengths.append(len(ids))
        return ids

    monkeypatch.setattr(passkey, "encode_prompt", counted)
    prompt = build(tokenizer, 65_536, 50.0)
    assert [length for length in lengths if length > 10_000] == [len(prompt.ids)]


def test_chat_template_must_exist(tiny_llama: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        build(tokenizer, 512, 0.0, chat=True)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (" 01234.", "01234", True),
        ("1234", "01234", False),  # leading zeros count: keys are strings
        ("the key 12345, not 99999", "12345", True),
        ("99999, no: 12345", "12345", False),
        ("123456", "12345", False),
        ("", "12345", False),
    ],
)
def test_score_is_the_first_run_of_digits(answer: str, expected: str, right: bool) -> None:
    assert is_right(answer, expected) is right
    assert (first_number(answer) == expected) is right
