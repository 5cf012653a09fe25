"""What was read and what was packed, as `plan.json` and `report.json`: counts per domain and length. Pure.

Counts "before" are of the whole corpus, counts "after" of the tokens that stand in packed sequences; a document's
length is that of the whole document, however much of it was used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.data.pack import DocumentPlaces
from ultralong_ray.data.token_shards import DocumentTable

FIRST_EDGE_TOKENS = 1024


def length_edges(longest_tokens: int) -> list[int]:
    """Powers of two from 1024 up to the longest document: bucket i holds lengths [edges[i-1], edges[i])."""
    edges = [FIRST_EDGE_TOKENS]
    while edges[-1] < longest_tokens:
        edges.append(edges[-1] * 2)
    return edges


def prepare_report(
    table: DocumentTable, places: DocumentPlaces, shares_asked: Mapping[str, float], long_above_tokens: int
) -> dict[str, Any]:
    """`domains`, `length_edges_tokens`, `histogram_before`, `histogram_after` (tokens), `buckets` (documents too)."""
    edges = length_edges(int(table.num_tokens.max(initial=0)))
    cell = table.domain * np.int64(len(edges) + 1) + np.searchsorted(edges, table.num_tokens, side="right")
    used = places.end - places.start
    num_cells = len(table.domains) * (len(edges) + 1)

    def count(rows: NDArray[np.int64] | slice, tokens: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Documents, or tokens, per domain and bucket: [domains, buckets]."""
        return np.bincount(cell[rows], tokens, num_cells).astype(np.int64).reshape(len(table.domains), -1)

    copies = np.unique(np.stack([places.row, places.copy.astype(np.int64)]), axis=1)[0]
    everything = slice(None)
    before = {"documents": count(everything), "tokens": count(everything, table.num_tokens)}
    after = {"documents": count(np.unique(places.row)), "copies": count(copies), "tokens": count(places.row, used)}
    long = table.num_tokens > long_above_tokens
    long_before = np.bincount(table.domain[long], table.num_tokens[long], len(table.domains))
    is_long = long[places.row]
    long_after = np.bincount(table.domain[places.row[is_long]], used[is_long], len(table.domains))
    domains = {}
    for d, name in enumerate(table.domains):
        tokens_before, tokens_after = int(before["tokens"][d].sum()), int(after["tokens"][d].sum())
        domains[name] = {
            "documents_before": int(before["documents"][d].sum()),
            "tokens_before": tokens_before,
            "share_before": _share(tokens_before, before["tokens"].sum()),
            "share_asked": shares_asked.get(name, 0.0),
            "documents_after": int(after["copies"][d].sum()),
            "distinct_documents_after": int(after["documents"][d].sum()),
            "tokens_after": tokens_after,
            "share_after": _share(tokens_after, after["tokens"].sum()),
            "long_share_before": _share(long_before[d], tokens_before),
            "long_share_after": _share(long_after[d], tokens_after),
        }
    return {
        "domains": domains,
        "length_edges_tokens": edges,
        "histogram_before": {name: before["tokens"][d].tolist() for d, name in enumerate(table.domains)},
        "histogram_after": {name: after["tokens"][d].tolist() for d, name in enumerate(table.domains)},
        "buckets": _buckets(table.domains, edges, before, after),
    }


def _buckets(
    domains: tuple[str, ...],
    edges: list[int],
    before: Mapping[str, NDArray[np.int64]],
    after: Mapping[str, NDArray[np.int64]],
) -> list[dict[str, Any]]:
    """One row per domain and length bucket that holds a document; `repeats` is copies per document used."""
    bounds = [0, *edges, None]
    rows = []
    for d, name in enumerate(domains):
        for b in range(len(edges) + 1):
            if before["documents"][d, b]:
                used = int(after["documents"][d, b])
                rows.append(
                    {
                        "domain": name,
                        "from_tokens": bounds[b],
                        "below_tokens": bounds[b + 1],
                        "documents_before": int(before["documents"][d, b]),
                        "tokens_before": int(before["tokens"][d, b]),
                        "documents_after": used,
                        "repeats": _share(int(after["copies"][d, b]), used),
                        "tokens_after": int(after["tokens"][d, b]),
                    }
                )
    return rows


def sft_report(table: DocumentTable, places: DocumentPlaces, too_long: int, supervised_tokens: int) -> dict[str, Any]:
    """The parts of an SFT report that count. `table` holds the samples short enough, before any were drawn."""
    domain = table.domain[places.row]
    read = np.bincount(table.domain, minlength=len(table.domains)).tolist()
    packed = np.bincount(domain, minlength=len(table.domains)).tolist()
    tokens = np.bincount(domain, places.end - places.start, len(table.domains)).astype(int).tolist()
    return {
        "domains": {
            name: {
                "samples_before": read[d],
                "samples": packed[d],
                "tokens": tokens[d],
                "share": _share(tokens[d], sum(tokens)),
            }
            for d, name in enumerate(table.domains)
        },
        "samples": sum(packed),
        "dropped_too_long": too_long,
        "supervised_tokens": supervised_tokens,
        "supervised_share": _share(supervised_tokens, sum(tokens)),
    }


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else 0.0
