"""Cuts of long texts: the pieces have the tokens of the whole, or the tokenizer is known not to promise that."""

from __future__ import annotations

import copy
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
# other scripts, with marks of their own; numbers of other kinds; what only some take for white space; emoji
ALPHABET += [
    "\u0416",
    "\u0435\u0449\u0451",
    "\ud55c\uad6d",
    "\u1112\u1161",
    "\u3044",
    "\u0915\u093f",
    "\u0e01\u0e32",
    "\u0627",
]
ALPHABET += [
    "\u00b2",
    "\u2167",
    "\u0663",
    "_",
    "\u2019",
    "/",
    "!",
    "\u3001",
    "\uff01",
    "\uff1f",
    "\u060c",
    "\u061f",
    "\u0964",
]
ALPHABET += ["\x1c", "\x85", "\u180e", "\u2028", "\u3000", "\u200d", "\U0001f642", "\u0301"]

SENTENCES = {
    "Russian": "\u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u0431\u0443\u043b\u043e\u043a, \u0434\u0430. ",
    "Arabic": "\u0646\u0635 \u062d\u0643\u064a\u0645\u060c \u0648\u0630\u0648 \u0634\u0623\u0646 ",
    "Japanese": "\u3044\u308d\u306f\u306b\u307b\u3078\u3068\u3001\u3061\u308a\u306c\u308b\u3092\u3002",
    "Korean": "\ub2e4\ub78c\uc950 \ud5cc \uccc7\ubc14\ud034\uc5d0 \ud0c0\uace0\ud30c. ",
    "Hindi": "\u092f\u0939 \u090f\u0915 \u0935\u093e\u0915\u094d\u092f \u0939\u0948\u0964 ",
    "digits": "123 456 7890, ",
}


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


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
@pytest.mark.parametrize("pattern", sorted(pieces.KNOWN_PATTERNS))
def test_the_known_patterns_split_pieces_as_they_split_the_whole(tokenizer: Any, pattern: str, normalizer: Any) -> None:
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    known = copy.deepcopy(tokenizer)
    known.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, by_bytes])
    if normalizer is not None:
        known.backend_tokenizer.normalizer = normalizer
    assert pieces.cuts_are_exact(known)
    rng = random.Random(0)
    assert sum(same_tokens(known, "".join(rng.choices(ALPHABET, k=60))) for _ in range(300)) > 900


@pytest.mark.parametrize("script", SENTENCES)
def test_long_texts_of_every_script_are_cut(tokenizer: Any, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1000)
    text = SENTENCES[script] * 1000
    assert max(map(len, pieces.pieces(text, exact=True))) < 1000 + len(SENTENCES[script])
    assert same_tokens(tokenizer, text) > 10


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
    across = changed()
    across.add_tokens(["\u4f60\uff0c\u597d"])
    assert not pieces.cuts_are_exact(across)


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
