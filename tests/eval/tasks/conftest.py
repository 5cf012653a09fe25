"""A tokenizer of words and marks, data made up on the spot, and the official vectors where they are at hand."""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.ruler import RulerData
from ultralong_ray.eval.tasks.ruler_questions import Question, QuestionPool
from ultralong_ray.eval.tasks.words import BUILT_IN, Words

SHARED = Path(__file__).resolve().parents[3].parent / "shared"


class MarkTokenizer:
    """Token = a word with the space before it, a mark, or a white space character. BOS is one more."""

    chat_template = "yes"

    def __init__(self) -> None:
        self.calls: list[int] = []  # characters of every single text

    def __call__(self, text: Any, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self._ids(one) for one in text]}
        self.calls.append(len(text))
        return {"input_ids": [0] * add_special_tokens + self._ids(text)}

    def _ids(self, text: str) -> list[int]:
        return [zlib.crc32(token.encode()) % 1000 for token in re.findall(r" ?\w+| ?[^\w\s]|\s", text)]

    def apply_chat_template(self, turns: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}</>" for turn in turns) + "<assistant>"


@pytest.fixture
def mark_tokenizer() -> MarkTokenizer:
    return MarkTokenizer()


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def prompts(request: pytest.FixtureRequest, mark_tokenizer: MarkTokenizer) -> Prompts:
    return Prompts(mark_tokenizer, chat_template=request.param)


@pytest.fixture(scope="session")
def essay() -> Haystack:
    """60 sentences of 3 to 9 words, every word of its own."""
    rng = random.Random(5)
    words = [
        f"w{sentence}x{word}" + ("." if word == length - 1 else "")
        for sentence in range(60)
        for length in [rng.randint(3, 9)]
        for word in range(length)
    ]
    return Haystack("made up", tuple(words))


@pytest.fixture(scope="session")
def pool() -> QuestionPool:
    """30 paragraphs of 12 words; question k is answered by paragraph k, related to its neighbour."""
    paragraphs = tuple(f"Paragraph {k:02d} says that answer{k:02d} is " + "so " * 6 + "." for k in range(30))
    questions = tuple(Question(f"What is {k}?", (f"answer{k:02d}",), (k,), ((k + 1) % 30,), (k,)) for k in range(30))
    return QuestionPool("made up", paragraphs, questions)


@pytest.fixture(scope="session")
def words() -> Words:
    """The built-in words, whatever is installed."""
    nouns, adjectives, verbs = (tuple(BUILT_IN[name].split()) for name in ("noun", "adjective", "verb"))
    return Words("built in", nouns, adjectives, verbs)


@pytest.fixture(scope="session")
def ruler_data(words: Words, essay: Haystack, pool: QuestionPool) -> RulerData:
    return RulerData(words, essay, pool, pool)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of vectors and stand-in data beside the checkout."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside this checkout: the official vectors are not here")
    return folder


@pytest.fixture(scope="session")
def vectors(shared_data: Path) -> Callable[[str], Any]:
    """`vectors("ruler/metric_pairs.jsonl")`: a list of rows, or the value of a JSON file."""

    def read(name: str) -> Any:
        data = (shared_data / "vectors" / name).read_bytes()
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
        return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.split("\n") if line]

    return read
