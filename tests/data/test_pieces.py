"""Cuts of long texts: the pieces have the tokens of the whole, or the tokenizer is known not to promise that."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import write_tiny_tokenizer
from ultralong_ray.data import passes, pieces
from ultralong_ray.data.passes import Stopwatch
from ultralong_ray.data.tokenize import encode_batch, load_tokenizer
from ultralong_ray.types import Document

# letters, marks, digits, punctuation, all kinds of white space, an apostrophe, Chinese, what a special token looks like
ALPHABET = ["a", "b", "Z", "\u00e9", "e\u0301", "7", "42", ".", ",", "'", "'s", " ", "  ", "\n", "\r\n", "\t", "\u00a0"]
ALPHABET += ["\u4f60", "\u597d", "\u3002", "\uff0c", "<|end|>", "|||IP_ADDRESS|||", "-", "\u200b"]


def same_tokens(tokenizer: Any, text: str) -> int:
    """Assert that pieces and whole agree; the number of pieces."""
    parts = list(pieces.pieces(text, exact=True))
    assert "".join(parts) == text
    whole = encode_batch(tokenizer, [text])[0]
    np.testing.assert_array_equal(np.concatenate(encode_batch(tokenizer, parts)), whole)
    return len(parts)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1)


@pytest.mark.usefixtures("short_pieces")
def test_real_text_has_the_same_tokens_in_pieces(shared_data: Path) -> None:
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "dolma2-llama3-shaped"))
    assert pieces.cuts_are_exact(tokenizer)
    for name in ("code-00000-of-00002", "specs-00000-of-00001"):
        texts = pq.read_table(shared_data / "corpus" / f"{name}.parquet")["text"].to_pylist()
        assert sum(same_tokens(tokenizer, text[:20_000]) for text in texts[:12]) > 5_000
    rng = random.Random(0)
    assert sum(same_tokens(tokenizer, "".join(rng.choices(ALPHABET, k=60))) for _ in range(300)) > 900


@pytest.mark.usefixtures("short_pieces")
def test_random_text_has_the_same_tokens_in_pieces(tokenizer: Any, tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    rng = random.Random(0)
    for exact in (tokenizer, load_tokenizer(str(tmp_path))):
        assert pieces.cuts_are_exact(exact)
        assert sum(same_tokens(exact, "".join(rng.choices(ALPHABET, k=60))) for _ in range(300)) > 900


def changed(**parts: Any) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(backend, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokenizers_that_look_beyond_a_word_are_told_apart() -> None:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    unknown = pre_tokenizers.Split(Regex(r"\\w+\\s"), "isolated")
    assert pieces.cuts_are_exact(changed(normalizer=normalizers.NFC()))
    assert not pieces.cuts_are_exact(changed(normalizer=normalizers.NFKC()))
    assert not pieces.cuts_are_exact(changed(pre_tokenizer=pre_tokenizers.Metaspace()))
    assert not pieces.cuts_are_exact(changed(pre_tokenizer=by_bytes))
    assert not pieces.cuts_are_exact(changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not pieces.cuts_are_exact(changed(pre_tokenizer=pre_tokenizers.Sequence([unknown, by_bytes])))
    swallowing = changed()
    swallowing.add_tokens([AddedToken("fox", rstrip=True)])
    assert not pieces.cuts_are_exact(swallowing)


def test_a_text_stays_whole_where_cuts_are_not_exact_or_there_is_no_place() -> None:
    text = "word " * 400_000
    assert list(pieces.pieces(text, exact=False)) == [text]
    assert [len(p) for p in pieces.pieces(text, exact=True)] == [2**20 + 3, 2 * 10**6 - 2**20 - 3]
    assert list(pieces.pieces("7" * 2**21, exact=True)) == ["7" * 2**21]
    assert len(list(pieces.pieces("word " * 4 * 10**6, exact=False))) > 10


def test_documents_are_put_together_again(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(passes, "BATCH_CHARACTERS", 250)
    rng = random.Random(1)
    documents = [
        Document(str(i), "x", " ".join(rng.choices(["the", "quick", "fox"], k=rng.choice([1, 10, 40, 700]))))
        for i in range(60)
    ]
    found = list(passes._tokenize_texts(tokenizer, documents, Stopwatch()))
    assert [d.id for d in found] == [d.id for d in documents]
    for document, whole in zip(found, encode_batch(tokenizer, [d.text for d in documents]), strict=True):
        np.testing.assert_array_equal(document.input_ids, whole)


MEASURE = """
import sys
from pathlib import Path
from ultralong_ray.data.passes import Stopwatch, _tokenize_texts
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.types import Document
tokenizer = load_tokenizer(sys.argv[1])
text = "The quick brown fox " * (int(sys.argv[2]) // 20)
def peak():  # of this program alone: ru_maxrss would start from the parent's
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])
before = peak()
(document,) = _tokenize_texts(tokenizer, [Document("long", "x", text)], Stopwatch())
print(len(document.input_ids), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_text_but_by_its_tokens(tmp_path: Path) -> None:
    """In one call the tokenizer would take some 100 bytes a character; in pieces the ids are what remains."""
    write_tiny_tokenizer(tmp_path)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    grown = []
    for characters in (1_000_000, 3_000_000):
        tokens, kilobytes = subprocess.check_output([*command, str(characters)], text=True).split()
        grown.append(int(kilobytes) * 1024 - 8 * int(tokens))
    assert grown[1] - grown[0] < 16 * 2_000_000
