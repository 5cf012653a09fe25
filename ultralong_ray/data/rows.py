"""Parts of shards in, checked documents out, in bounded memory; rows that are no documents are set aside.

A bad row (null, empty or undecodable text, no id, ids of tokens that the vocabulary does not have, ...) goes to the
`Quarantine` of its part with its number, the reason and a glimpse of it, and reading goes on. A shard that cannot be
read at all raises BadShard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from ultralong_ray.config import SourceConfig
from ultralong_ray.data.corpus import (
    COMPRESSION,
    BadShard,
    ShardPart,
    open_arrow,
    open_parquet,
    shard_domain,
    unreadable,
)
from ultralong_ray.types import Document, IntArray, TokenizedDocument

ROWS_PER_BATCH = 64  # rows decoded at a time: a long document is megabytes
READ_BYTES = 2**20
EXCERPT_CHARACTERS = 200
STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # the last bytes of an Arrow IPC stream
ALL_BAD_ROWS = 16  # as many rows without one good one among them: the mapping of columns is wrong, not the rows

Row = TypeVar("Row")
Rows = Iterator[tuple[int, dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that was set aside. `row` counts from the start of its part."""

    row: int
    reason: str
    excerpt: str


@dataclass(slots=True)
class Quarantine:
    """The rows of one part: how many were read, and those set aside."""

    part: ShardPart
    rows: int = 0
    lines: int = 0  # of a JSONL part, empty ones included: where the numbers of the next part begin
    bad: list[BadRow] = field(default_factory=list)

    def add(self, row: int, reason: str, value: Any = None) -> None:
        self.bad.append(BadRow(row, reason, _excerpt(value)))

    def check(self) -> None:
        """Raises BadShard when there was no row, or none of many was good."""
        location = self.part.shard.location
        whole = self.part.start == 0
        if self.rows == 0 and whole:
            raise BadShard(f"{location}: the shard holds no rows. Remove it or write it again")
        if self.rows >= ALL_BAD_ROWS and len(self.bad) == self.rows:
            first = self.bad[0]
            number = first.row + (self.part.first_row or 0) + self.part.first_number
            raise BadShard(
                f"{location}: every one of its {self.rows} rows is bad, the first is {self.part.row_unit} {number}: "
                f"{first.reason}. Check the columns that the source names, or leave such shards out with "
                f'on_bad_shard = "skip"'
            )


def _excerpt(value: Any) -> str:
    """The beginning of a bad row, without making a text of the whole of a long one first."""
    if isinstance(value, dict):
        value = {
            key: item[:EXCERPT_CHARACTERS] if isinstance(item, str | list) else item for key, item in value.items()
        }
    return "" if value is None else repr(value)[:EXCERPT_CHARACTERS]


@dataclass(frozen=True, slots=True)
class DocumentColumns:
    """Which columns of a source make a document, and what stands for those that are not read."""

    text: str
    id: str
    domain_column: str | None
    domain: str | None  # of every document of the source
    domain_pattern: str | None = None  # gives the domain of every document of a shard
    input_ids: str | None = None  # token ids instead of text
    names: tuple[str, ...] = ()

    @staticmethod
    def of(source: SourceConfig, text_column: str | None = None) -> DocumentColumns:
        text = text_column or source.text_column
        content = source.input_ids_column or text
        domain_column = None if source.domain or source.domain_pattern else source.domain_column
        names = tuple(dict.fromkeys(c for c in (source.id_column, domain_column, content) if c))
        return DocumentColumns(
            text, source.id_column, domain_column, source.domain, source.domain_pattern, source.input_ids_column, names
        )

    def for_part(self, part: ShardPart) -> DocumentColumns:
        """The same columns with the domain of this part's shard filled in where its address gives it."""
        if self.domain_pattern is None:
            return self
        domain = shard_domain(part.shard, self.domain_pattern)
        return DocumentColumns(self.text, self.id, None, domain, None, self.input_ids, self.names)


def read_documents(part: ShardPart, columns: DocumentColumns, quarantine: Quarantine) -> Iterator[Document]:
    """The documents of a part. Raises BadShard, and UserError for a store that does not answer."""
    columns = columns.for_part(part)

    def document(row: dict[str, Any]) -> Document:
        return Document(row_id(row, columns), row_domain(row, columns), _text(row[columns.text], columns.text))

    return read_checked(part, columns, document, quarantine)


def read_tokenized(
    part: ShardPart, columns: DocumentColumns, vocab_size: int, quarantine: Quarantine
) -> Iterator[TokenizedDocument]:
    """The documents of a part whose tokens are given; ids outside [0, vocab_size) make a row bad."""
    columns = columns.for_part(part)
    assert columns.input_ids is not None
    name = columns.input_ids

    def document(row: dict[str, Any]) -> TokenizedDocument:
        return TokenizedDocument(row_id(row, columns), row_domain(row, columns), _ids(row[name], name, vocab_size))

    return read_checked(part, columns, document, quarantine)


def read_checked(
    part: ShardPart, columns: DocumentColumns, parse: Callable[[dict[str, Any]], Row], quarantine: Quarantine
) -> Iterator[Row]:
    """`parse` applied to every row; a row for which it raises ValueError goes to the quarantine."""
    columns = columns.for_part(part)
    for number, row in read_rows(part, columns, quarantine):
        try:
            value = parse(row)
        except ValueError as error:
            quarantine.add(number, str(error), row)
            continue
        yield value
    quarantine.check()


def read_rows(
    part: ShardPart, columns: DocumentColumns, quarantine: Quarantine
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number within the part, {column: value}) of the rows that can be decoded."""
    read = {"parquet": _parquet_rows, "arrow": _arrow_rows, "jsonl": _jsonl_rows}[part.shard.format]
    try:
        for number, row in read(part, columns, quarantine):
            quarantine.rows += 1
            if row is not None:
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise unreadable(part.shard, error) from error


def _parquet_rows(part: ShardPart, columns: DocumentColumns, quarantine: Quarantine) -> Rows:
    number = 0
    with open_parquet(part.shard, columns.names) as file:
        groups = list(range(part.start, file.num_row_groups if part.end is None else part.end))
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=list(columns.names)):
            yield from _batch_rows(batch, number, columns, quarantine)
            number += batch.num_rows


def _arrow_rows(part: ShardPart, columns: DocumentColumns, quarantine: Quarantine) -> Rows:
    reader, source = open_arrow(part.shard, columns.names)
    if isinstance(reader, ipc.RecordBatchStreamReader):
        batches = _whole_stream(reader, source)
    else:
        batches = (reader.get_batch(i) for i in range(part.start, part.end or reader.num_record_batches))
    number = 0
    for whole in batches:
        for name in columns.names:
            _check_column(whole.column(name))
        for start in range(0, whole.num_rows, ROWS_PER_BATCH):
            batch = whole.slice(start, ROWS_PER_BATCH)
            yield from _batch_rows(batch, number, columns, quarantine)
            number += batch.num_rows


def _whole_stream(reader: ipc.RecordBatchStreamReader, source: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The batches of an IPC stream. Raises ArrowInvalid where it stops without its end mark, or has more behind it.

    The reader takes the end of the file and any word of zeros for the end of the stream.
    """
    yield from reader
    end, size = source.tell(), source.size()
    if source.read_at(len(STREAM_END), max(0, end - len(STREAM_END))) != STREAM_END:
        raise pa.ArrowInvalid(
            f"the stream stops at byte {end:,} of {size:,} without its end mark, so rows may be missing; a whole one "
            f"of an old writer gets its mark when pyarrow.ipc reads and writes it"
        )
    if end != size:
        raise pa.ArrowInvalid(
            f"the stream ends at byte {end:,} of {size:,}; streams that were joined have to be files of their own"
        )


def _check_column(column: pa.Array) -> None:
    """Raises ArrowInvalid for a damaged column: pyarrow follows its offsets unchecked, out of its memory if need be.

    Text that is no UTF-8 is a fault of its row alone, and found there.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def _batch_rows(batch: pa.RecordBatch, first: int, columns: DocumentColumns, quarantine: Quarantine) -> Rows:
    values = {name: _values(batch.column(name), as_arrays=name == columns.input_ids) for name in columns.names}
    for i in range(batch.num_rows):
        row = {name: column[i] for name, column in values.items()}
        undecodable = next((name for name, value in row.items() if isinstance(value, UnicodeDecodeError)), None)
        if undecodable is not None:
            quarantine.add(first + i, f"{undecodable} is not valid UTF-8 ({row[undecodable].reason})")
        yield first + i, None if undecodable is not None else row


def _values(column: pa.Array, *, as_arrays: bool) -> list[Any]:
    """Python values; lists of numbers as numpy arrays if asked; the error itself where a string is no UTF-8."""
    if as_arrays and pa.types.is_list(column.type) | pa.types.is_large_list(column.type):
        return [None if not item.is_valid else item.values.to_numpy(zero_copy_only=False) for item in column]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value_or_error(item) for item in column]


def _value_or_error(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error


def _jsonl_rows(part: ShardPart, columns: DocumentColumns, quarantine: Quarantine) -> Rows:
    """Lines that hold something; an empty line counts in the numbers but is no row."""
    for number, line in enumerate(_lines(part)):
        quarantine.lines = number + 1
        if line.strip():
            yield number, _parse_line(number, line, columns.names, quarantine)


def _parse_line(number: int, line: bytes, columns: tuple[str, ...], quarantine: Quarantine) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits, a value nested too deep
        quarantine.add(number, f"not JSON that can be read ({error})", line[:EXCERPT_CHARACTERS])
        return None
    if not isinstance(value, dict):
        quarantine.add(number, f"a JSON {type(value).__name__}, not an object", value)
        return None
    missing = [c for c in columns if c not in value]
    if missing:
        quarantine.add(number, f"no field {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
        return None
    return {c: value[c] for c in columns}


def _lines(part: ShardPart) -> Iterator[bytes]:
    """Lines that begin in [start, end) of a file, decompressed as read. A truncated stream raises OSError."""
    location = part.shard.location
    compression = next((name for suffix, name in COMPRESSION.items() if location.name.endswith(suffix)), None)
    if part.end is None:
        with location.filesystem.open_input_stream(location.path, compression=compression) as stream:
            yield from _split_lines(stream.read, None)
        return
    with location.open_input() as file:
        # One byte earlier: the line that begins exactly at `start` belongs here, the rest of an earlier one does not.
        file.seek(max(part.start - 1, 0))
        lines = _split_lines(file.read, part.end - max(part.start - 1, 0))
        if part.start:
            next(lines, None)
        yield from lines


def _split_lines(read: Callable[[int], bytes], limit: int | None) -> Iterator[bytes]:
    """Lines without their ends; none that begins at or behind `limit` bytes."""
    position, pending = 0, []  # where the line in `pending` begins
    while block := read(READ_BYTES):
        *lines, rest = block.split(b"\n")
        for line in lines:
            pending.append(line)
            whole = b"".join(pending)
            yield whole
            position, pending = position + len(whole) + 1, []
            if limit is not None and position >= limit:
                return
        pending.append(rest)
    if whole := b"".join(pending):
        yield whole


def row_id(row: dict[str, Any], columns: DocumentColumns) -> str:
    """The id as text; whole numbers are taken too. Raises ValueError when it is missing."""
    value = row[columns.id]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, columns.id)


def row_domain(row: dict[str, Any], columns: DocumentColumns) -> str:
    """The domain of a row, or the fixed one of its source or shard. Raises ValueError when it is missing."""
    if columns.domain is not None:
        return columns.domain
    assert columns.domain_column is not None
    return _text(row[columns.domain_column], columns.domain_column)


def _text(value: Any, column: str) -> str:
    if value is None:
        raise ValueError(f"{column} is null")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, not a string")
    if not value:
        raise ValueError(f"{column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column} is not valid Unicode ({error.reason})") from None
    return value


def _ids(value: Any, column: str, vocab_size: int) -> IntArray:
    """Token ids as int32 [num_tokens]."""
    if value is None:
        raise ValueError(f"{column} is null")
    if not isinstance(value, list | np.ndarray):
        raise ValueError(f"{column} is {type(value).__name__}, not a list of integers")
    if not len(value):
        raise ValueError(f"{column} is empty")
    ids = np.asarray(value) if all(type(i) is int for i in value[:1]) or isinstance(value, np.ndarray) else None
    if ids is None or not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
        raise ValueError(f"{column} holds something other than integers")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise ValueError(f"{column} holds id {outside[0]}, the vocabulary has {vocab_size} entries")
    return ids.astype(np.int32)
