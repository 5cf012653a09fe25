"""Tokenised documents on disk between the two passes: written once per part of the corpus, read by byte range.

    <folder>/<name>.ids            little-endian int32, the documents of a part one after the other
    <folder>/<name>.weights        uint8, as long; only for parts whose documents carry loss weights
    <folder>/<name>.parquet        one row per document: id, id_hash, domain, num_tokens
    <folder>/<name>.bad.jsonl      one line per row that was set aside; only where there are some
    <folder>/<name>.json           counts; written last, so that a part which has it is whole and is not done twice

Raw arrays, since the second pass takes documents in the order of a hash: two numbers give the bytes of any document,
and a part of one, in one range request. A name is a hash of everything that decides the content, so shards are found
again by any recipe that reads the same parts with the same tokenizer.

The driver never holds a Python object per document: it reads `DocumentTable`, 32 bytes a document. Ids stay in the
shards; those of the documents that were chosen are fetched when they are named in the output.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultralong_ray.data.rows import Quarantine
from ultralong_ray.storage import Location
from ultralong_ray.types import TokenizedDocument

READ_THREADS = 16
IDS = np.dtype("<i4")
_INDEX_SCHEMA = pa.schema(
    [("id", pa.string()), ("id_hash", pa.uint64()), ("domain", pa.string()), ("num_tokens", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """All documents of a corpus as columns, in the order of their shards. Row numbers stand for documents."""

    folder: Location
    shards: tuple[str, ...]
    weighted: tuple[bool, ...]  # [shards], whether a shard holds loss weights
    sources: tuple[int, ...]  # [shards], which source of the recipe a shard belongs to
    domains: tuple[str, ...]
    first_row: NDArray[np.int64]  # [shards + 1]
    id_hash: NDArray[np.uint64]  # [documents]
    domain: NDArray[np.int32]  # [documents], index into `domains`
    num_tokens: NDArray[np.int64]  # [documents]
    offset: NDArray[np.int64]  # [documents], first token within the shard

    def __len__(self) -> int:
        return len(self.id_hash)

    def shard_of(self, rows: NDArray[np.int64]) -> NDArray[np.int32]:
        """The shard of each row: int32 [rows]."""
        return (np.searchsorted(self.first_row, rows, side="right") - 1).astype(np.int32)

    def ids(self, rows: NDArray[np.int64]) -> list[str]:
        """The ids of rows (any order, repeats allowed), read from the shards that hold them."""
        unique, back = np.unique(rows, return_inverse=True)
        shards = self.shard_of(unique)
        edges = np.flatnonzero(np.diff(shards, prepend=-1))
        groups = np.split(unique, edges[1:]) if len(unique) else []

        def read(group: NDArray[np.int64]) -> list[str]:
            shard = int(self.shard_of(group[:1])[0])
            column = _read_index(self.folder, self.shards[shard], ["id"]).column("id")
            return column.take(pa.array(group - self.first_row[shard])).to_pylist()

        with ThreadPoolExecutor(READ_THREADS) as pool:
            found = [name for names in pool.map(read, groups) for name in names]
        return [found[i] for i in back.tolist()]

    def repeated(self) -> NDArray[np.int64]:
        """Rows whose id another row has before them; hashes that meet by chance are told apart by the ids."""
        order = np.argsort(self.id_hash, kind="stable")
        same = np.flatnonzero(self.id_hash[order][1:] == self.id_hash[order][:-1])
        if not len(same):
            return np.zeros(0, np.int64)
        suspects = np.unique(np.concatenate([order[same], order[same + 1]]))
        seen: set[str] = set()
        repeats = []
        for row, name in zip(suspects.tolist(), self.ids(suspects), strict=True):
            if name in seen:
                repeats.append(row)
            seen.add(name)
        return np.array(repeats, np.int64)


def id_hash(document_id: str) -> int:
    """64 bits of blake2b: what all sampling decisions start from."""
    return int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8).digest(), "little")


def read_counts(folder: Location, name: str) -> dict[str, Any] | None:
    """What `write_token_shard` recorded, or None when the shard is not whole."""
    try:
        return (folder / f"{name}.json").read_json()
    except (FileNotFoundError, NotADirectoryError):  # where a file is in the way, writing will say so
        return None


def write_token_shard(
    folder: Location,
    name: str,
    documents: Iterable[TokenizedDocument | None],
    weights: bool,
    quarantine: Quarantine | None = None,
) -> dict[str, Any]:
    """Write the documents (None: one that was left out) and return the counts. Memory holds one document at a time.

    `quarantine` is read when `documents` has come to its end.
    """
    index: dict[str, list[Any]] = {column: [] for column in _INDEX_SCHEMA.names}
    left_out = 0
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context((folder / f"{name}.ids").open_for_write())
        weight = stack.enter_context((folder / f"{name}.weights").open_for_write()) if weights else None
        for document in documents:
            if document is None:
                left_out += 1
                continue
            ids.write(pa.py_buffer(np.ascontiguousarray(document.input_ids, IDS)))
            if weight is not None:
                ones = np.ones(len(document.input_ids), np.uint8)
                weight.write((ones if document.loss_weight is None else document.loss_weight).tobytes())
            index["id"].append(document.id)
            index["id_hash"].append(id_hash(document.id))
            index["domain"].append(document.domain)
            index["num_tokens"].append(len(document.input_ids))
    with (folder / f"{name}.parquet").open_for_write() as sink:
        pq.write_table(pa.table(index, schema=_INDEX_SCHEMA), sink, compression="zstd")
    bad = quarantine.bad if quarantine is not None else []
    if bad:
        (folder / f"{name}.bad.jsonl").write_bytes("".join(json.dumps(asdict(row)) + "\n" for row in bad).encode())
    counts = {
        "documents": len(index["id"]),
        "tokens": sum(index["num_tokens"]),
        "left_out": left_out,
        "weights": weights,
        "rows": quarantine.rows if quarantine is not None else len(index["id"]) + left_out,
        "lines": quarantine.lines if quarantine is not None else 0,
        "bad_rows": len(bad),
    }
    (folder / f"{name}.json").write_json(counts)
    return counts


def read_bad_rows(folder: Location, name: str) -> list[dict[str, Any]]:
    """The rows of a part that were set aside: {row, reason, excerpt}, row counted from the start of the part."""
    return [json.loads(line) for line in (folder / f"{name}.bad.jsonl").read_bytes().splitlines()]


def delete_token_shards(folder: Location, names: Iterable[str]) -> None:
    """Remove these shards and what broken writes of them left, the record that makes one whole first."""
    mine = set(names)
    files = [file for file in folder.files() if file.name.split(".")[0] in mine]
    for file in sorted(files, key=lambda file: not file.name.endswith(".json")):
        file.delete_file()


def _read_index(folder: Location, name: str, columns: list[str]) -> pa.Table:
    location = folder / f"{name}.parquet"
    with location.open_input() as source:
        return pq.ParquetFile(source, pre_buffer=False).read(columns)


def read_document_table(folder: Location, shards: Sequence[tuple[str, bool, int]]) -> DocumentTable:
    """The documents of token shards, given as (name, weighted, source)."""
    codes: dict[str, int] = {}
    hashes, domains, lengths, offsets = [], [], [], []
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = pool.map(lambda s: _read_index(folder, s[0], ["id_hash", "domain", "num_tokens"]), shards)
        for table in tables:
            domain = table.column("domain").combine_chunks().dictionary_encode()
            found = domain.dictionary.to_pylist()
            local = np.array([codes.setdefault(name, len(codes)) for name in found], np.int32)
            length = table.column("num_tokens").to_numpy()
            hashes.append(table.column("id_hash").to_numpy())
            domains.append(local[domain.indices.to_numpy()])
            lengths.append(length)
            offsets.append(np.cumsum(length) - length)
    # Codes in the order of the names, so that nothing depends on which shard came first.
    names = sorted(codes)
    recode = np.empty(len(codes), np.int32)
    recode[[codes[name] for name in names]] = np.arange(len(codes), dtype=np.int32)
    counts = [len(h) for h in hashes]
    return DocumentTable(
        folder,
        tuple(name for name, _, _ in shards),
        tuple(weighted for _, weighted, _ in shards),
        tuple(source for _, _, source in shards),
        tuple(names),
        np.cumsum([0, *counts], dtype=np.int64),
        _joined(hashes, np.uint64),
        recode[_joined(domains, np.int32)] if codes else np.zeros(0, np.int32),
        _joined(lengths, np.int64),
        _joined(offsets, np.int64),
    )


def _joined(columns: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *columns]).astype(dtype, copy=False)


class TokenReader:
    """Random access to token shards below `folder`; keeps its files open."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self._files: dict[str, pa.NativeFile] = {}

    def ids(self, shard: str, first: int, count: int) -> NDArray[np.int32]:
        """Tokens [first, first + count) of a shard: int32 [count]."""
        return np.frombuffer(self._bytes(f"{shard}.ids", first * IDS.itemsize, count * IDS.itemsize), IDS)

    def weights(self, shard: str, first: int, count: int) -> NDArray[np.uint8]:
        """Weights of tokens [first, first + count) of a shard: uint8 [count]."""
        return np.frombuffer(self._bytes(f"{shard}.weights", first, count), np.uint8)

    def _bytes(self, name: str, offset: int, length: int) -> bytes:
        if name not in self._files:
            location = self.folder / name
            self._files[name] = location.open_input()
        found = self._files[name].read_at(length, offset)
        if len(found) != length:
            raise OSError(f"{self.folder / name} ends at byte {offset + len(found)}, {offset + length} are needed")
        return found

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
