"""Normalisation, piecewise numbering, n-gram hashes and the longest common subsequence."""

from __future__ import annotations

import random

import numpy as np
import pytest

from ultralong_ray.data import ngrams
from ultralong_ray.data.ngrams import character_spans, common_subsequence_length, ngram_hashes, number_words, words


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("Don\u2019t pay $80,000 for 'it'!", "dont pay 80000 for it"),
        ("[1,2,3] is not 1,234", "1 2 3 is not 1234"),
        ("a well-known  snake_case\tname\u2014here", "a well known snake case name here"),
        ("\ufb01ve \u00bd caf\u0065\u0301 NA\u00cfVE so\u00adft", "five 1 2 caf\u00e9 na\u00efve soft"),
        ("\uff21\uff22\uff23 \u4e2d\u6587ok", "abc \u4e2d \u6587 ok"),
        ("... \u201c\u201d !?", ""),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert b" ".join(words(text)).decode() == normalised


def naive_lcs(first: list[int], second: list[int]) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b and a else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_common_subsequence_is_that_of_the_textbook() -> None:
    rng = random.Random(0)
    for _ in range(200):
        first, second = ([rng.randint(0, 6) for _ in range(rng.randint(0, 90))] for _ in range(2))
        assert common_subsequence_length(first, second) == naive_lcs(first, second)


def test_hashes_are_those_of_the_windows_alone() -> None:
    ids = np.array([5, 1, 2, 3, 9, 1, 2, 3, 1, 3, 2], np.int32)
    hashes = ngram_hashes(ids, 3)
    assert len(hashes) == 9 and hashes[1] == hashes[5]
    assert len(set(hashes.tolist())) == 8  # [1 2 3] twice; an order of its own for [1 3 2]
    assert len(ngram_hashes(ids, 12)) == 0


def test_pieces_change_neither_words_nor_places(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The  caf\u00e9\u2019s owner\u2014a \u4e2d\u6587 speaker \u00bd asleep\u2014paid $1,234!\n" * 30
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words(text)), 1)}
    whole = number_words(text, vocabulary)
    monkeypatch.setattr(ngrams, "PIECE_CHARACTERS", 50)
    pieces = number_words(text, vocabulary)
    assert len(pieces.starts) > 20 and (pieces.ids == whole.ids).all() and whole.ids.all()
    places = character_spans(text, pieces, list(range(len(pieces.ids))))
    assert places == character_spans(text, whole, list(range(len(whole.ids))))
    spelled = list(vocabulary)
    for word, (start, end) in zip(pieces.ids, places, strict=True):
        assert spelled[word - 1] in words(text[start:end])
        assert len(text[start:end].split()) == 1


def test_a_text_without_spaces_is_cut_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "PIECE_CHARACTERS", 10)
    numbered = number_words("x" * 95, {b"x" * 10: 1})
    assert len(numbered.starts) > 3 and numbered.starts[-1] == 95
