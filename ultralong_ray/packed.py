"""Packed sequences on disk: the format that data preparation writes and training reads.

    <folder>/manifest.json              PackedManifest: lengths, chunking, which file holds which sequences
    <folder>/documents.parquet          one row per Placement, ordered by (sequence, start)
    <folder>/sequences/part-NNNNN.parquet

A sequence is stored as rows of `chunk_tokens` token ids (its last chunk may be shorter) and a Parquet row group holds
about `ROW_GROUP_TOKENS` tokens. A row group is the unit that one range request fetches and zstd compresses, so a
rank of any sequence-parallel degree reads the groups that cover its slice and little else, from local disk or from an
object store, without any rank holding a whole 4M-token sequence. Token ids are int32: vocabularies stay below 2^31 and
1B tokens cost 4 GB before compression.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.storage import Location
from ultralong_ray.types import ByteArray, IntArray, PackedSequence, Placement, UserError

CHUNK_TOKENS = 16_384
ROW_GROUP_TOKENS = 65_536
CACHE_BYTES = 2**30  # decoded row groups kept per reading process


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One Parquet file: sequences [first_sequence, first_sequence + num_sequences)."""

    name: str
    first_sequence: int
    num_sequences: int


@dataclass(frozen=True, slots=True)
class PackedManifest:
    """Everything a reader must know before it opens a file."""

    sequence_length: int
    num_sequences: int
    chunk_tokens: int
    rows_per_group: int
    has_loss_weight: bool
    vocab_size: int
    files: tuple[PackedFile, ...]

    @property
    def chunks_per_sequence(self) -> int:
        return -(-self.sequence_length // self.chunk_tokens)

    def write(self, folder: Location) -> None:
        (folder / "manifest.json").write_json(asdict(self))

    @staticmethod
    def read(folder: Location) -> PackedManifest:
        value = (folder / "manifest.json").read_json()
        return PackedManifest(**{**value, "files": tuple(PackedFile(**f) for f in value["files"])})


def chunking(sequence_length: int) -> tuple[int, int]:
    """(chunk_tokens, rows_per_group) for a sequence length."""
    chunk_tokens = min(sequence_length, CHUNK_TOKENS)
    return chunk_tokens, max(1, ROW_GROUP_TOKENS // chunk_tokens)


def file_name(index: int) -> str:
    return f"sequences/part-{index:05d}.parquet"


def write_sequences(target: Location, sequences: Iterable[PackedSequence], sequence_length: int, weights: bool) -> int:
    """Write one packed file and return the number of sequences. Sequences must arrive in order.

    Raises ValueError when a sequence has another length than `sequence_length`.
    """
    chunk_tokens, rows_per_group = chunking(sequence_length)
    columns = [("input_ids", pa.list_(pa.int32()))] + ([("loss_weight", pa.list_(pa.uint8()))] if weights else [])
    schema = pa.schema(columns)
    rows: list[dict[str, IntArray | ByteArray]] = []
    count = 0
    with target.open_for_write() as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for sequence in sequences:
            if len(sequence.input_ids) != sequence_length:
                raise ValueError(
                    f"sequence {sequence.index} has {len(sequence.input_ids)} tokens, not {sequence_length}"
                )
            count += 1
            for start in range(0, sequence_length, chunk_tokens):
                row: dict[str, IntArray | ByteArray] = {"input_ids": sequence.input_ids[start : start + chunk_tokens]}
                if weights:
                    assert sequence.loss_weight is not None
                    row["loss_weight"] = sequence.loss_weight[start : start + chunk_tokens]
                rows.append(row)
                if len(rows) == rows_per_group:
                    writer.write_table(_table(rows, schema))
                    rows = []
        if rows:
            writer.write_table(_table(rows, schema))
    return count


def _table(rows: Sequence[dict[str, IntArray | ByteArray]], schema: pa.Schema) -> pa.Table:
    return pa.table({name: [row[name] for row in rows] for name in schema.names}, schema=schema)


def write_placements(folder: Location, placements: Iterable[Placement]) -> None:
    ordered = sorted(placements, key=lambda p: (p.sequence, p.start))
    table = pa.table({f.name: [getattr(p, f.name) for p in ordered] for f in fields(Placement)})
    with (folder / "documents.parquet").open_for_write() as sink:
        pq.write_table(table, sink, compression="zstd")


def read_placements(folder: Location) -> list[Placement]:
    location = folder / "documents.parquet"
    with location.filesystem.open_input_file(location.path) as source:
        return [Placement(**row) for row in pq.read_table(source).to_pylist()]


class PackedReader:
    """Random access to slices of packed sequences: `reader.read(sequence, start, end)`."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.manifest = PackedManifest.read(folder)
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], tuple[list[IntArray], list[ByteArray] | None]] = OrderedDict()
        self._cached_bytes = 0
        self._starts: dict[int, IntArray] | None = None

    def read(self, sequence: int, start: int, end: int) -> tuple[IntArray, ByteArray | None]:
        """Token ids and loss weights of positions [start, end), end clipped to the sequence: int32, uint8 [n]."""
        manifest = self.manifest
        if not 0 <= sequence < manifest.num_sequences:
            raise IndexError(f"sequence {sequence} of {manifest.num_sequences} in {self.folder}")
        end = min(end, manifest.sequence_length)
        file = self._file_of(sequence)
        chunk = manifest.chunk_tokens
        ids: list[IntArray] = []
        weights: list[ByteArray] = []
        for index in range(start // chunk, -(-end // chunk)):
            row = (sequence - file.first_sequence) * manifest.chunks_per_sequence + index
            group_ids, group_weights = self._group(file.name, row // manifest.rows_per_group)
            part = slice(max(start - index * chunk, 0), end - index * chunk)
            ids.append(group_ids[row % manifest.rows_per_group][part])
            if group_weights is not None:
                weights.append(group_weights[row % manifest.rows_per_group][part])
        return np.concatenate(ids), np.concatenate(weights) if weights else None

    def document_starts(self, sequence: int) -> IntArray:
        """Positions at which a document (or the rest of one) begins, ascending, the first one 0. int32 [documents]."""
        if self._starts is None:
            starts: dict[int, list[int]] = {}
            for placement in read_placements(self.folder):
                starts.setdefault(placement.sequence, [0]).append(placement.start)
            self._starts = {s: np.unique(np.array(v, np.int32)) for s, v in starts.items()}
        return self._starts.get(sequence, np.zeros(1, np.int32))

    def _file_of(self, sequence: int) -> PackedFile:
        for file in self.manifest.files:
            if file.first_sequence <= sequence < file.first_sequence + file.num_sequences:
                return file
        raise UserError(f"{self.folder}: manifest.json names no file for sequence {sequence}; prepare the corpus again")

    def _group(self, name: str, group: int) -> tuple[list[IntArray], list[ByteArray] | None]:
        key = (name, group)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        if name not in self._files:
            location = self.folder / name
            self._files[name] = pq.ParquetFile(location.filesystem.open_input_file(location.path))
        table = self._files[name].read_row_group(group)
        ids = _rows(table.column("input_ids"))
        weights = _rows(table.column("loss_weight")) if self.manifest.has_loss_weight else None
        self._groups[key] = (ids, weights)
        self._cached_bytes += table.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._groups) > 1:
            _, (old_ids, old_weights) = self._groups.popitem(last=False)
            self._cached_bytes -= sum(a.nbytes for a in old_ids) + sum(a.nbytes for a in old_weights or [])
        return ids, weights


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [
        row for chunk in column.chunks for row in np.split(chunk.flatten().to_numpy(), chunk.offsets[1:-1].to_numpy())
    ]
