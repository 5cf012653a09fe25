"""What was read and what was packed, as `report.json`: counts per domain and length, and a sample to look at. Pure.

Counts "before" are of the whole corpus, counts "after" of the tokens that stand in packed sequences; a document's
length is that of the whole document, however much of it was used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ultralong_ray.types import DocumentLength, Placement

FIRST_EDGE_TOKENS = 1024


def length_edges(longest_tokens: int) -> list[int]:
    """Powers of two from 1024 up to the longest document: bucket i holds lengths [edges[i-1], edges[i])."""
    edges = [FIRST_EDGE_TOKENS]
    while edges[-1] < longest_tokens:
        edges.append(edges[-1] * 2)
    return edges


def prepare_report(
    documents: Sequence[DocumentLength],
    placements: Iterable[Placement],
    shares_asked: Mapping[str, float],
    long_above_tokens: int,
) -> dict[str, Any]:
    """The parts of report.json that count: `domains`, `length_edges_tokens`, `histogram_before`, `histogram_after`."""
    lengths = {d.id: d.num_tokens for d in documents}
    before = [(d.domain, d.num_tokens, d.num_tokens) for d in documents]
    used: Counter[tuple[str, str]] = Counter()
    copies: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
    for p in placements:
        used[p.domain, p.id] += p.end - p.start
        copies[p.domain].add((p.id, p.copy))
    after = [(domain, lengths[i], tokens) for (domain, i), tokens in used.items()]
    edges = length_edges(max(lengths.values(), default=0))
    names = sorted({d.domain for d in documents})
    tokens_before, tokens_after = _tokens(before), _tokens(after)
    long_before, long_after = (_tokens([r for r in rows if r[1] > long_above_tokens]) for rows in (before, after))
    documents_before = Counter(d.domain for d in documents)
    domains = {
        name: {
            "documents_before": documents_before[name],
            "tokens_before": tokens_before[name],
            "share_before": _share(tokens_before[name], tokens_before.total()),
            "share_asked": shares_asked.get(name, 0.0),
            "documents_after": len(copies[name]),
            "tokens_after": tokens_after[name],
            "share_after": _share(tokens_after[name], tokens_after.total()),
            "long_share_before": _share(long_before[name], tokens_before[name]),
            "long_share_after": _share(long_after[name], tokens_after[name]),
        }
        for name in names
    }
    return {
        "domains": domains,
        "length_edges_tokens": edges,
        "histogram_before": _histogram(before, names, edges),
        "histogram_after": _histogram(after, names, edges),
    }


def sft_report(
    read: Sequence[DocumentLength], placements: Sequence[Placement], too_long: int, supervised_tokens: int
) -> dict[str, Any]:
    """The parts of an SFT report that count. `read` are the samples short enough, before any were drawn."""
    packed = Counter(p.domain for p in placements)
    tokens: Counter[str] = Counter()
    for p in placements:
        tokens[p.domain] += p.end - p.start
    samples = Counter(d.domain for d in read)
    return {
        "domains": {
            name: {
                "samples_before": samples[name],
                "samples": packed[name],
                "tokens": tokens[name],
                "share": _share(tokens[name], tokens.total()),
            }
            for name in sorted(samples)
        },
        "samples": packed.total(),
        "dropped_too_long": too_long,
        "supervised_tokens": supervised_tokens,
        "supervised_share": _share(supervised_tokens, tokens.total()),
    }


# A row of the counts below: (domain, length of the whole document, tokens counted).
Counted = Sequence[tuple[str, int, int]]


def _tokens(rows: Counted) -> Counter[str]:
    total: Counter[str] = Counter()
    for domain, _, tokens in rows:
        total[domain] += tokens
    return total


def _histogram(rows: Counted, names: Sequence[str], edges: Sequence[int]) -> dict[str, list[int]]:
    """Tokens per length bucket: len(edges) + 1 buckets, the last one for documents of edges[-1] tokens or more."""
    buckets = {name: [0] * (len(edges) + 1) for name in names}
    for domain, length, tokens in rows:
        buckets[domain][bisect_right(edges, length)] += tokens
    return buckets


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
