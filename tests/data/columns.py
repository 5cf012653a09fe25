"""Small corpora and copies as the columns that sampling and packing work on, and places as rows to compare."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from ultralong_ray.data.pack import DocumentPlaces
from ultralong_ray.data.sample import Copies, Group, Lengths
from ultralong_ray.data.token_shards import DocumentTable, id_hash
from ultralong_ray.storage import Location

Row = tuple[str, str, int]  # id, domain, tokens


def lengths_of(rows: Sequence[Row], weights: dict[str, float] | None = None) -> Lengths:
    """`weights` gives the weight of a document by id (default 1)."""
    keys = [(domain, (weights or {}).get(name, 1.0)) for name, domain, _ in rows]
    groups = sorted(set(keys))
    return Lengths(
        tuple(Group(*key) for key in groups),
        np.array([id_hash(name) for name, _, _ in rows], np.uint64),
        np.array([tokens for _, _, tokens in rows], np.int64),
        np.array([groups.index(key) for key in keys], np.int32),
    )


def copies_of(*tokens: int) -> Copies:
    """One copy each of documents 0, 1, ... of these lengths."""
    return Copies(np.arange(len(tokens)), np.zeros(len(tokens), np.int32), np.array(tokens, np.int64))


def copies_from(rows: Sequence[tuple[int, int, int]]) -> Copies:
    """Copies from (document, copy, tokens)."""
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Copies(columns[0], columns[1].astype(np.int32), columns[2])


def table_of(rows: Sequence[Row], shard_sizes: Sequence[int], folder: str = "/nowhere") -> DocumentTable:
    """A table of documents lying in shards "s0", "s1", ... of `shard_sizes` documents each."""
    domains = sorted({domain for _, domain, _ in rows})
    tokens = np.array([n for _, _, n in rows], np.int64)
    first = np.cumsum([0, *shard_sizes])
    offsets = [np.cumsum(tokens[a:b]) - tokens[a:b] for a, b in pairwise(first)]
    count = len(shard_sizes)
    return DocumentTable(
        Location(folder),
        tuple(f"s{i}" for i in range(count)),
        (False,) * count,
        tuple(range(count)),
        tuple(domains),
        first,
        np.array([id_hash(name) for name, _, _ in rows], np.uint64),
        np.array([domains.index(domain) for _, domain, _ in rows], np.int32),
        tokens,
        np.concatenate(offsets),
    )


def place_rows(places: DocumentPlaces) -> list[tuple[int, int, int, int, int, int, int]]:
    """(sequence, start, end, row, copy, document_start, document_end) of every place."""
    names = ("sequence", "start", "end", "row", "copy", "document_start", "document_end")
    return list(zip(*(getattr(places, name).tolist() for name in names), strict=True))
