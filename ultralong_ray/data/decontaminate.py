"""Documents and chat samples in; those that quote an evaluation set out of the data, each with the reason. Pure.

A text overlaps an item when they share `ngram_words` normalised words in a row, or, for an item that is shorter, when
the text holds all of it. In the mathematics domains the longest common subsequence with the item must also exceed a
share of the item's words (AceMath, arXiv 2412.15084, section 3.2.3); it is taken within a window of the text in which
the item would stand, half its length wider on both sides, since a long text has a long subsequence with anything.

A hash only proposes: every overlap is confirmed word by word. What happens to a text depends on that text, the index
and the configuration alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ultralong_ray.config import DecontaminateConfig
from ultralong_ray.data.benchmarks import BenchmarkIndex
from ultralong_ray.data.ngrams import NumberedText, WordArray, character_spans, common_subsequence_length, number_words
from ultralong_ray.types import Document

MAX_REPORTED_SPANS = 20  # of one document; a copy of a whole benchmark has thousands
MAX_CUT_ROUNDS = 3  # what a cut brings together may match again
WORD_REACH = 40  # characters within which a margin is moved to white space

_SPACE = re.compile(r"\s")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Words [start, end) of a text that an item holds too."""

    start: int
    end: int
    item: int
    place: int  # first word of the n-gram in the index's stream
    length: int  # words of the n-gram
    lcs_share: float | None = None  # of the item's words; only where the rule asks for it


@dataclass(frozen=True, slots=True)
class Finding:
    """One overlap, for the report."""

    id: str
    domain: str
    action: str  # "cut" or "dropped"
    benchmark: str
    item: str
    column: str
    ngram: str
    lcs_share: float | None
    characters: int  # taken out of the text for this overlap and those that it touches


def find_overlaps(index: BenchmarkIndex, ids: WordArray, lcs_share: float | None) -> list[Overlap]:
    """Overlaps of a text, ascending and apart from each other; `lcs_share` is None where the n-gram is enough."""
    hits = sorted(_ngram_hits(index, ids, lcs_share), key=lambda o: (o.start, o.place))
    merged: list[Overlap] = []
    for hit in hits:
        if merged and hit.start <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Overlap(last.start, max(last.end, hit.end), last.item, last.place, last.length, last.lcs_share)
        else:
            merged.append(hit)
    return merged


def _ngram_hits(index: BenchmarkIndex, ids: WordArray, lcs_share: float | None) -> Iterator[Overlap]:
    """The n-grams of a text that some item has, each with the first such item that the rule accepts."""
    shares: dict[tuple[int, int], float] = {}

    def accepted(item: int, start: int, place: int) -> bool:
        if lcs_share is None:
            return True
        # All n-grams of an item that stand in the same alignment ask the same question.
        key = (item, start - place)
        if key not in shares:
            shares[key] = _lcs_share(index, ids, start, place)
        return shares[key] > lcs_share

    for table in (index.ngrams, index.short):
        positions, rows = table.candidates(ids)
        for start, row in zip(positions.tolist(), rows.tolist(), strict=True):
            for place in table.same_hash(row):
                item = index.item_at(place)
                length = table.length if table is index.ngrams else len(index.item_words(item))
                same = np.array_equal(ids[start : start + length], index.stream[place : place + length])
                if same and accepted(item, start, place):
                    yield Overlap(start, start + length, item, place, length, shares.get((item, start - place)))
                    break


def _lcs_share(index: BenchmarkIndex, ids: WordArray, start: int, place: int) -> float:
    item = index.item_at(place)
    words = index.item_words(item)
    first = start - (place - int(index.starts[item]))
    slack = len(words) // 2
    window = ids[max(0, first - slack) : max(0, first + len(words) + slack)]
    return common_subsequence_length(words.tolist(), window.tolist()) / len(words)


def screen_sample(
    index: BenchmarkIndex, config: DecontaminateConfig, sample_id: str, domain: str, turns: Sequence[str]
) -> list[Finding]:
    """Why a chat sample must be dropped, or nothing. Every turn is searched, whoever says it."""
    findings: list[Finding] = []
    for text in turns:
        numbered = number_words(text, index.vocabulary)
        for overlap in find_overlaps(index, numbered.ids, _lcs_limit(config, domain)):
            findings.append(_finding(index, sample_id, domain, "dropped", overlap, len(text)))
    return findings[:MAX_REPORTED_SPANS]


def screen_document(
    index: BenchmarkIndex, config: DecontaminateConfig, document: Document
) -> tuple[Document | None, list[Finding]]:
    """The document without what overlaps an evaluation set (None: it is dropped) and the reasons."""
    text, kept, findings = document.text, len(document.text), []
    for _ in range(MAX_CUT_ROUNDS):
        numbered = number_words(text, index.vocabulary)
        overlaps = find_overlaps(index, numbered.ids, _lcs_limit(config, document.domain))
        if not overlaps:
            return (document if not findings else Document(document.id, document.domain, text)), findings
        spans = _widened(text, numbered, overlaps, config.cut_margin_characters)
        for overlap, (start, end) in zip(overlaps[:MAX_REPORTED_SPANS], spans, strict=False):
            findings.append(_finding(index, document.id, document.domain, "cut", overlap, end - start))
        merged = _union(spans)
        kept -= sum(end - start for start, end in merged)
        if config.documents == "drop" or len(document.text) - kept > config.max_cut_share * len(document.text):
            break
        text = _without(text, merged)
        if not text.strip():
            break
    dropped = [Finding(**{**asdict(f), "action": "dropped", "characters": len(document.text)}) for f in findings]
    return None, dropped[:MAX_REPORTED_SPANS]


def _lcs_limit(config: DecontaminateConfig, domain: str) -> float | None:
    return config.mathematics_lcs_share if domain in config.mathematics_domains else None


def _finding(
    index: BenchmarkIndex, text_id: str, domain: str, action: str, overlap: Overlap, characters: int
) -> Finding:
    ngram = index.spell(index.stream[overlap.place : overlap.place + overlap.length])
    return Finding(text_id, domain, action, *index.names[overlap.item], ngram, overlap.lcs_share, characters)


def _widened(text: str, numbered: NumberedText, overlaps: Sequence[Overlap], margin: int) -> list[tuple[int, int]]:
    """Characters of each overlap with its margin, moved outwards to white space unless that is far away."""
    starts = character_spans(text, numbered, [overlap.start for overlap in overlaps])
    ends = character_spans(text, numbered, [overlap.end - 1 for overlap in overlaps])
    spans = []
    for (start, _), (_, end) in zip(starts, ends, strict=True):
        start, end = max(0, start - margin), min(len(text), end + margin)
        # A margin ends between words; where no white space is near, in the middle of one.
        space_before = [m.end() for m in _SPACE.finditer(text, max(0, start - WORD_REACH), start)]
        space_after = _SPACE.search(text, end, end + WORD_REACH)
        spans.append(
            (space_before[-1] if space_before and start else start, space_after.start() if space_after else end)
        )
    return spans


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same characters as spans that are apart."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _without(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without the spans; a paragraph break stands where one was, so that no sentence runs into another."""
    borders = [0, *(border for span in spans for border in span), len(text)]
    first, *middle, last = (text[start:end] for start, end in list(pairwise(borders))[::2])
    pieces = [first.rstrip(), *(piece.strip() for piece in middle), last.lstrip()]
    return "\n\n".join(piece for piece in pieces if piece)


def summarise(findings: Iterable[dict[str, Any]], counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """For report.json: texts dropped and cut, over all and per benchmark, beside what the index could look for."""
    texts: dict[str, tuple[str, set[str]]] = {}
    spans: Counter[str] = Counter()
    for finding in findings:
        texts.setdefault(finding["id"], (finding["action"], set()))[1].add(finding["benchmark"])
        spans[finding["benchmark"]] += 1

    def total(action: str, benchmark: str | None = None) -> int:
        return sum(a == action and (benchmark is None or benchmark in b) for a, b in texts.values())

    return {
        "dropped": total("dropped"),
        "cut": total("cut"),
        "benchmarks": {
            name: {**count, "dropped": total("dropped", name), "cut": total("cut", name), "spans": spans[name]}
            for name, count in counts.items()
        },
    }
