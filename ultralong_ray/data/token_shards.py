"""Tokenised documents on disk between the two passes: written once per part of the corpus, read by byte range.

    <folder>/<name>.ids            little-endian int32, the documents of a part one after the other
    <folder>/<name>.weights        uint8, as long; only for parts whose documents carry loss weights
    <folder>/<name>.parquet        one row per document: id, domain, num_tokens
    <folder>/<name>.json           counts; written last, so that a part which has it is whole and is not done twice

Raw arrays, since the second pass takes documents in the order of a hash: two numbers give the bytes of any document,
and a part of one, in one range request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.storage import Location
from ultralong_ray.types import ByteArray, IntArray, TokenizedDocument

_INDEX_SCHEMA = pa.schema([("id", pa.string()), ("domain", pa.string()), ("num_tokens", pa.int64())])
_IDS = np.dtype("<i4")


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """Where a tokenised document lies: `num_tokens` tokens from token `offset` of shard `shard`."""

    id: str
    domain: str
    num_tokens: int
    shard: str
    offset: int
    weighted: bool


def read_counts(folder: Location, name: str) -> dict[str, Any] | None:
    """What `write_token_shard` recorded, or None when the shard is not whole."""
    location = folder / f"{name}.json"
    return location.read_json() if location.exists() else None


def write_token_shard(
    folder: Location, name: str, documents: Iterable[TokenizedDocument | None], weights: bool
) -> dict[str, Any]:
    """Write the documents (None: one that was left out) and return the counts. Memory holds one document at a time."""
    index: dict[str, list[Any]] = {column: [] for column in _INDEX_SCHEMA.names}
    left_out = 0
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context((folder / f"{name}.ids").open_for_write())
        weight = stack.enter_context((folder / f"{name}.weights").open_for_write()) if weights else None
        for document in documents:
            if document is None:
                left_out += 1
                continue
            ids.write(document.input_ids.astype(_IDS).tobytes())
            if weight is not None:
                ones = np.ones(len(document.input_ids), np.uint8)
                weight.write((ones if document.loss_weight is None else document.loss_weight).tobytes())
            index["id"].append(document.id)
            index["domain"].append(document.domain)
            index["num_tokens"].append(len(document.input_ids))
    with (folder / f"{name}.parquet").open_for_write() as sink:
        pq.write_table(pa.table(index, schema=_INDEX_SCHEMA), sink)
    counts = {
        "documents": len(index["id"]),
        "tokens": sum(index["num_tokens"]),
        "left_out": left_out,
        "weights": weights,
    }
    (folder / f"{name}.json").write_json(counts)
    return counts


def read_index(folder: Location, name: str, weighted: bool) -> list[StoredDocument]:
    """The documents of a token shard, in its order."""
    location = folder / f"{name}.parquet"
    with location.filesystem.open_input_file(location.path) as source:
        rows = pq.read_table(source).to_pydict()
    offsets = np.cumsum([0, *rows["num_tokens"]]).tolist()
    columns = zip(rows["id"], rows["domain"], rows["num_tokens"], offsets[:-1], strict=True)
    return [StoredDocument(i, d, n, name, offset, weighted) for i, d, n, offset in columns]


class TokenReader:
    """Random access to the documents of the token shards below `folder`; keeps its files open."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._files: dict[str, pa.NativeFile] = {}

    def read(self, document: StoredDocument, start: int, end: int) -> tuple[IntArray, ByteArray | None]:
        """Tokens [start, end) of a document: int32 ids [n] and uint8 weights [n], None where it has none."""
        first, count = document.offset + start, end - start
        ids = np.frombuffer(self._bytes(f"{document.shard}.ids", first * _IDS.itemsize, count * _IDS.itemsize), _IDS)
        if not document.weighted:
            return ids.astype(np.int32), None
        return ids.astype(np.int32), np.frombuffer(self._bytes(f"{document.shard}.weights", first, count), np.uint8)

    def _bytes(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._files:
            location = self.folder / name
            self._files[name] = location.filesystem.open_input_file(location.path)
        return self._files[name].read_at(length, offset)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
