"""Packed sequences on disk: the format that data preparation writes and training reads.

    <folder>/manifest.json              PackedManifest: lengths, chunking, which file holds which sequences
    <folder>/documents.parquet          one row per Placement, ordered by (sequence, start)
    <folder>/sequences/part-NNNNN.parquet

A sequence is stored as rows of `chunk_tokens` token ids (its last chunk may be shorter), a Parquet row group holds
`rows_per_group` rows. A row group is the unit that is compressed (zstd) and that a range request fetches, so a rank of
any sequence-parallel degree reads the groups that cover its slice and little else, from local disk or from an object
store, without any rank holding a whole 4M-token sequence. Groups hold 1/32 of a sequence, at least 4,096 and at most
16,384 tokens: at degree 8 a rank's two segments of a 1M-token sequence are whole groups, at degree 64 of a 4M-token one
nearly so, while the footer (some 100 bytes a group) stays below 1 % of the file. The manifest holds the footer's size,
so that it is fetched to the byte. Token ids are int32: vocabularies stay below 2^31, and plain 4-byte values under zstd
take about 1.7 bytes a token; dictionaries and statistics are left out, which makes files smaller and writing faster.

`documents.parquet` says where every document stands; its `start` column is where a run that masks documents gets its
boundaries from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.storage import Location
from ultralong_ray.types import ByteArray, IntArray, PackedSequence, Placement, UserError

GROUPS_PER_SEQUENCE = 32
MIN_GROUP_TOKENS = 4_096
MAX_GROUP_TOKENS = 16_384
CACHE_BYTES = 2**28  # decoded row groups kept per reading process


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One Parquet file: sequences [first_sequence, first_sequence + num_sequences)."""

    name: str
    first_sequence: int
    num_sequences: int
    footer_bytes: int = 0  # at the end of the file; 0: not known


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
    group_tokens = min(max(sequence_length // GROUPS_PER_SEQUENCE, MIN_GROUP_TOKENS), MAX_GROUP_TOKENS)
    chunk_tokens = min(sequence_length, group_tokens)
    return chunk_tokens, group_tokens // chunk_tokens


def file_name(index: int) -> str:
    return f"sequences/part-{index:05d}.parquet"


def write_sequences(target: Location, sequences: Iterable[PackedSequence], sequence_length: int, weights: bool) -> int:
    """Write one packed file and return the size of its footer in bytes. Sequences must arrive in order.

    Raises ValueError when a sequence has another length than `sequence_length`.
    """
    columns = [("input_ids", pa.list_(pa.int32()))] + ([("loss_weight", pa.list_(pa.uint8()))] if weights else [])
    schema = pa.schema(columns)
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    with target.open_for_write() as sink:
        with pq.ParquetWriter(sink, schema, **options) as writer:
            data_end = _write_rows(writer, sink, sequences, sequence_length, schema)
        return sink.tell() - data_end


def _write_rows(
    writer: pq.ParquetWriter, sink: Any, sequences: Iterable[PackedSequence], sequence_length: int, schema: pa.Schema
) -> int:
    """Write the sequences as rows; where in the sink their data ends."""
    chunk_tokens, rows_per_group = chunking(sequence_length)
    rows: list[tuple[IntArray | ByteArray, ...]] = []
    for sequence in sequences:
        if len(sequence.input_ids) != sequence_length:
            raise ValueError(f"sequence {sequence.index} has {len(sequence.input_ids)} tokens, not {sequence_length}")
        for start in range(0, sequence_length, chunk_tokens):
            part = slice(start, start + chunk_tokens)
            row: tuple[IntArray | ByteArray, ...] = (sequence.input_ids[part],)
            if len(schema.names) > 1:
                assert sequence.loss_weight is not None
                row = (*row, sequence.loss_weight[part])
            rows.append(row)
            if len(rows) == rows_per_group:
                writer.write_table(_table(rows, schema))
                rows = []
    if rows:
        writer.write_table(_table(rows, schema))
    return sink.tell()


def _table(rows: Sequence[tuple[IntArray | ByteArray, ...]], schema: pa.Schema) -> pa.Table:
    offsets = pa.array(np.cumsum([0, *(len(row[0]) for row in rows)]), pa.int32())
    columns = zip(*rows, strict=True)
    return pa.table([pa.ListArray.from_arrays(offsets, np.concatenate(c)) for c in columns], schema=schema)


def write_placements(folder: Location, placements: Iterable[Placement]) -> None:
    """documents.parquet of a few placements; those of a corpus are written as columns."""
    ordered = sorted(placements, key=lambda p: (p.sequence, p.start))
    write_placement_columns(folder, {f.name: [getattr(p, f.name) for p in ordered] for f in fields(Placement)})


def write_placement_columns(folder: Location, columns: Mapping[str, Any]) -> None:
    """documents.parquet of columns named as the fields of `Placement`, ordered by (sequence, start)."""
    table = pa.table({f.name: columns[f.name] for f in fields(Placement)})
    with (folder / "documents.parquet").open_for_write() as sink:
        pq.write_table(table, sink, compression="zstd", row_group_size=2**20)


def read_placements(folder: Location) -> list[Placement]:
    location = folder / "documents.parquet"
    with location.open_input() as source:
        return [Placement(**row) for row in pq.read_table(source).to_pylist()]


class PackedReader:
    """Random access to slices of packed sequences: `reader.read(sequence, start, end)`."""

    def __init__(self, folder: Location) -> None:
        self.folder = folder
        self.manifest = PackedManifest.read(folder)
        self._files: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], tuple[list[IntArray], list[ByteArray] | None]] = OrderedDict()
        self._cached_bytes = 0
        self._starts: tuple[IntArray, IntArray] | None = None  # sequence and start of every placement

    def read(self, sequence: int, start: int, end: int) -> tuple[IntArray, ByteArray | None]:
        """Token ids and loss weights of positions [start, end), end clipped to the sequence: int32, uint8 [n]."""
        manifest = self.manifest
        if not 0 <= sequence < manifest.num_sequences:
            raise IndexError(f"sequence {sequence} of {manifest.num_sequences} in {self.folder}")
        end = min(end, manifest.sequence_length)
        file = self._file_of(sequence)
        chunk, per_group = manifest.chunk_tokens, manifest.rows_per_group
        rows = range(start // chunk, -(-end // chunk))
        first_row = (sequence - file.first_sequence) * manifest.chunks_per_sequence
        self._fetch(file, range((first_row + rows.start) // per_group, -(-(first_row + rows.stop) // per_group)))
        ids: list[IntArray] = []
        weights: list[ByteArray] = []
        for index in rows:
            group, row = divmod(first_row + index, per_group)
            group_ids, group_weights = self._groups[file.name, group]
            part = slice(max(start - index * chunk, 0), end - index * chunk)
            ids.append(group_ids[row][part])
            if group_weights is not None:
                weights.append(group_weights[row][part])
        self._shrink_cache()
        return np.concatenate(ids), np.concatenate(weights) if weights else None

    def document_starts(self, sequence: int) -> IntArray:
        """Positions at which a document (or the rest of one) begins, ascending, the first one 0. int32 [documents]."""
        if self._starts is None:
            location = self.folder / "documents.parquet"
            with location.open_input() as source:
                table = pq.read_table(source, columns=["sequence", "start"])
            self._starts = (
                table.column("sequence").to_numpy().astype(np.int32),
                table.column("start").to_numpy().astype(np.int32),
            )
        low, high = np.searchsorted(self._starts[0], [sequence, sequence + 1])
        return np.unique(np.append(self._starts[1][low:high], np.int32(0)))

    def _file_of(self, sequence: int) -> PackedFile:
        for file in self.manifest.files:
            if file.first_sequence <= sequence < file.first_sequence + file.num_sequences:
                return file
        raise UserError(f"{self.folder}: manifest.json names no file for sequence {sequence}; prepare the corpus again")

    def _fetch(self, file: PackedFile, groups: range) -> None:
        """Have these row groups decoded: those that are not yet, with one request per run of neighbours."""
        missing = []
        for group in groups:
            if (file.name, group) in self._groups:
                self._groups.move_to_end((file.name, group))
            else:
                missing.append(group)
        if not missing:
            return
        if file.name not in self._files:
            self._files[file.name] = _open(self.folder / file.name, file.footer_bytes)
        table = self._files[file.name].read_row_groups(missing)
        ids = _rows(table.column("input_ids"))
        weights = _rows(table.column("loss_weight")) if self.manifest.has_loss_weight else None
        per_group = self.manifest.rows_per_group
        for i, group in enumerate(missing):
            part = slice(i * per_group, (i + 1) * per_group)
            self._groups[file.name, group] = (ids[part], None if weights is None else weights[part])
        self._cached_bytes += table.nbytes

    def _shrink_cache(self) -> None:
        while self._cached_bytes > CACHE_BYTES and len(self._groups) > 1:
            _, (ids, weights) = self._groups.popitem(last=False)
            self._cached_bytes -= sum(a.nbytes for a in ids) + sum(a.nbytes for a in weights or [])


def _open(location: Location, footer_bytes: int) -> pq.ParquetFile:
    """With a footer of known size nothing else is fetched; Parquet readers guess 64 KiB (pyarrow 26.0)."""
    source = location.open_input()
    metadata = None
    if footer_bytes:
        metadata = pq.read_metadata(pa.BufferReader(source.read_at(footer_bytes, source.size() - footer_bytes)))
    return pq.ParquetFile(source, metadata=metadata, pre_buffer=True)


def _rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    rows = []
    for chunk in column.chunks:
        offsets = chunk.offsets.to_numpy()
        rows += np.split(chunk.flatten().to_numpy(), offsets[1:-1] - offsets[0])
    return rows
