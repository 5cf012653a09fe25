"""Text in, numbers of normalised words out; hashes of word n-grams and the longest common subsequence. Pure.

Normalisation, the same for benchmarks and for training text: Unicode NFKC; lower case; apostrophes, zero-width
characters and the comma before three digits vanish ("don't" is one word, "80,000" is "80000"); everything else that is
neither letter nor digit separates words. A Chinese or Japanese character is a word by itself, since those scripts put
no space between words.

A word becomes its number in a vocabulary (0: not in it), so texts are compared as integers: exactly, and the same in
every process, which Python's own string hashes are not.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

# Normalised at a time: a document may be a hundred million characters long, and most pieces of this size are plain
# ASCII once the common punctuation is gone, which is many times faster.
PIECE_CHARACTERS = 2**16

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_VANISHING = re.compile("[\u2018\u2019\u02bc\u00ad\u200b-\u200d\u2060\ufeff]")
_COMMON = {"\u2019": "", "\u2018": ""} | dict.fromkeys("\u201c\u201d\u2013\u2014\u2026\u00a0", " ")
_SEPARATING = re.compile(r"[^\w\x00-\x7f]+")
# Behind the comma, so that the search runs from comma to comma.
_DIGIT_COMMA = re.compile(rb",(?<=[0-9],)(?=[0-9]{3}(?![0-9]))")
_ASCII = bytes(b if b >= 128 or chr(b).isalnum() else ord(" ") for b in range(256)).lower()
_SPACE = re.compile(r"\s")
_CHUNK = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that a word's number reaches the high bits of the hash

WordArray = NDArray[np.int32]
HashArray = NDArray[np.uint64]


def words(text: str) -> list[bytes]:
    """The normalised words of a text, in UTF-8."""
    if not text.isascii():
        for character, replacement in _COMMON.items():
            text = text.replace(character, replacement)
    if not text.isascii():
        text = _VANISHING.sub("", unicodedata.normalize("NFKC", text).lower())
        text = _SEPARATING.sub(" ", text)
        if _IDEOGRAPH.search(text):
            text = _IDEOGRAPH.sub(r" \g<0> ", text)
    return _DIGIT_COMMA.sub(b"", text.encode("utf-8", "replace")).translate(_ASCII, b"'`").split()


@dataclass(frozen=True, slots=True)
class NumberedText:
    """The words of a text as numbers, and where its pieces begin: piece i is text[starts[i]:starts[i + 1]]."""

    ids: WordArray  # [num_words], 0: not in the vocabulary
    starts: tuple[int, ...]  # [num_pieces + 1], characters
    first_words: tuple[int, ...]  # [num_pieces + 1]


def number_words(text: str, vocabulary: Mapping[bytes, int]) -> NumberedText:
    """The text as numbers, normalised piece by piece so that memory holds the words of one piece at a time."""
    starts, first_words, arrays = [0], [0], []
    while starts[-1] < len(text):
        end = _piece_end(text, starts[-1])
        found = words(text[starts[-1] : end])
        arrays.append(np.fromiter(map(vocabulary.get, found, repeat(0)), np.int32, len(found)))
        starts.append(end)
        first_words.append(first_words[-1] + len(found))
    ids = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    return NumberedText(ids, tuple(starts), tuple(first_words))


def _piece_end(text: str, start: int) -> int:
    """The first white space at or after `start + PIECE_CHARACTERS`; without one in reach, the cut may split a word."""
    end = start + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    space = _SPACE.search(text, end, end + PIECE_CHARACTERS)
    return space.start() if space else end


def character_spans(text: str, numbered: NumberedText, word_numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Characters [start, end) of each of the given words (ascending), whole up to the white space around it.

    Where the runs of characters of a piece do not add up to its words, the span is the whole piece.
    """
    spans: list[tuple[int, int]] = []
    known, chunks, last_words = -1, [(0, 0)], np.empty(0, np.int64)
    for word in word_numbers:
        piece = int(np.searchsorted(numbered.first_words, word, side="right")) - 1
        whole = (numbered.starts[piece], numbered.starts[piece + 1])
        first, last = numbered.first_words[piece], numbered.first_words[piece + 1]
        if piece != known:
            found = [(chunk.span(), len(words(chunk[0]))) for chunk in _CHUNK.finditer(text, *whole)]
            known, chunks = piece, [span for span, _ in found]
            last_words = first + np.cumsum([count for _, count in found], dtype=np.int64)
        agrees = len(last_words) > 0 and last_words[-1] == last
        spans.append(chunks[int(np.searchsorted(last_words, word, side="right"))] if agrees else whole)
    return spans


def ngram_hashes(ids: WordArray, length: int) -> HashArray:
    """Polynomial hash modulo 2^64 of every run of `length` words: [max(0, num_words - length + 1)]."""
    count = max(0, len(ids) - length + 1)
    hashes = np.zeros(count, np.uint64)
    wide = ids.astype(np.uint64)
    for i in range(length):
        hashes *= _BASE
        hashes += wide[i : i + count]
    return hashes


def common_subsequence_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence of two word sequences; 0 (an unknown word) matches nothing.

    Bit-parallel: one addition on integers of len(first) bits per word of `second` (Hyyro, "Bit-parallel LCS-length
    computation revisited", 2004).
    """
    places: dict[int, int] = {}
    for i, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << i
    places.pop(0, None)
    everything = (1 << len(first)) - 1
    unmatched = everything
    for word in second:
        hit = unmatched & places.get(word, 0)
        unmatched = ((unmatched + hit) | (unmatched - hit)) & everything
    return len(first) - unmatched.bit_count()
