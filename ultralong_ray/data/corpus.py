"""Shards of a corpus in, checked rows and `Document`s out, in bounded memory. Parquet and JSONL (plain, gz, zst).

A source is a file, a folder or a glob on any `Location`. A shard is cut into parts (ranges of Parquet row groups of
about `PART_BYTES`; a JSONL file is one part), which are the units of parallel work: how many workers there are never
changes them. A bad row stops the run, with the number of bad rows of its part and the first of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.config import SourceConfig
from ultralong_ray.storage import Location
from ultralong_ray.types import Document, UserError

PART_BYTES = 2**26  # uncompressed bytes of the row groups that one task reads
ROWS_PER_BATCH = 64  # rows decoded at a time: a long document is megabytes
READ_BYTES = 2**20
FOOTER_THREADS = 16

_SUFFIXES = {
    "parquet": (".parquet",),
    "jsonl": tuple(name + zipped for name in (".jsonl", ".ndjson", ".json") for zipped in ("", ".gz", ".zst")),
}
_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
Format = Literal["parquet", "jsonl"]
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a source."""

    location: Location
    format: Format


@dataclass(frozen=True, slots=True)
class ShardPart:
    """The unit of work. Parquet: row groups [first_group, end_group), whose first row is `first_row` of the file."""

    shard: Shard
    first_group: int = 0
    end_group: int = 0
    first_row: int = 0
    version: str = ""  # size and time of the file, so that work on a replaced file is not taken for work on this one


@dataclass(slots=True)
class BadRows:
    """What is wrong with the rows of a part: how many, and the first."""

    part: ShardPart
    count: int = 0
    first: str = ""
    rows: int = 0

    def add(self, row: int, complaint: str) -> None:
        if not self.count:
            unit = "row" if self.part.shard.format == "parquet" else "line"
            self.first = f"{unit} {row}: {complaint}"
        self.count += 1

    def raise_if_any(self) -> None:
        """UserError naming the shard, the number of bad rows and the first of them."""
        if self.count:
            raise UserError(
                f"{self.part.shard.location}: {self.count} bad row{'s' * (self.count > 1)} of {self.rows} read, the "
                f"first is {self.first}. Mend or drop these rows and submit again (shards already tokenised are kept)"
            )


def list_shards(source: SourceConfig) -> list[Shard]:
    """The files of a source of kind "files", sorted by path.

    Raises UserError when nothing is there, when a folder or glob holds no shard, or when a file's format is unclear.
    """
    assert source.uri is not None
    try:
        found = _find(source, Location.of(source.uri))
    except OSError as error:
        raise UserError(
            f"corpus source {source.uri}: cannot be listed ({error}). Check the address, and the "
            f"credentials and their rights"
        ) from error
    if not found:
        raise UserError(
            f"corpus source {source.uri}: holds no shard (looked for .parquet, .jsonl, .jsonl.gz, .jsonl.zst). "
            f"Point uri at the shards, or set format where file names do not say it"
        )
    return [_shard(f, source) for f in found]


def _find(source: SourceConfig, location: Location) -> list[Location]:
    assert source.uri is not None
    if re.search(r"[*?\[]", source.uri) and not location.exists():
        pattern = _glob_pattern(location.path)
        files = [f for f in _fixed_parent(location).files(recursive=True) if pattern.fullmatch(f.path)]
        return [f for f in files if source.format or _format_of(f)]
    if location.is_dir():
        wanted = _SUFFIXES[source.format] if source.format else (*_SUFFIXES["parquet"], ".jsonl", ".ndjson")
        plain = [(f, f.name.removesuffix(".gz").removesuffix(".zst")) for f in location.files(recursive=True)]
        return [f for f, name in plain if name.endswith(wanted) and not f.name.startswith(("_", "."))]
    if location.exists():
        return [location]
    raise UserError(f"corpus source {source.uri}: nothing is there. Check the path, the bucket and its credentials")


def _shard(location: Location, source: SourceConfig) -> Shard:
    kind = source.format or _format_of(location)
    if kind is None:
        raise UserError(f'{location}: format unknown from the file name; set format = "parquet" or "jsonl"')
    return Shard(location, kind)


def _format_of(location: Location) -> Format | None:
    if location.name.endswith(_SUFFIXES["parquet"]):
        return "parquet"
    return "jsonl" if location.name.endswith(_SUFFIXES["jsonl"]) else None


def _fixed_parent(location: Location) -> Location:
    """The folder above the first path segment that holds a wildcard."""
    segments = location.uri.split("/")
    first = next(i for i, segment in enumerate(segments) if re.search(r"[*?\[]", segment))
    return Location("/".join(segments[:first]))


def _glob_pattern(path: str) -> re.Pattern[str]:
    """Shell wildcards: * and ? stay within a folder, ** crosses folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", path)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(p) or (p if p.startswith("[") else re.escape(p)) for p in parts))


def list_parts(shards: list[Shard], columns: tuple[str, ...]) -> list[ShardPart]:
    """Cut shards into parts, reading only sizes and Parquet footers. `columns` must be there.

    Raises UserError for an empty or truncated shard and for a missing column, before any work starts.
    """
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return [part for parts in pool.map(lambda shard: _parts_of(shard, columns), shards) for part in parts]


def _parts_of(shard: Shard, columns: tuple[str, ...]) -> list[ShardPart]:
    info = shard.location.filesystem.get_file_info(shard.location.path)
    version = f"{info.size}-{info.mtime_ns}"
    if info.size == 0:
        raise UserError(f"{shard.location}: the shard is empty (0 bytes). Remove it or write it again")
    if shard.format == "jsonl":
        return [ShardPart(shard, version=version)]
    metadata = _open_parquet(shard, columns).metadata
    if metadata.num_rows == 0:
        raise UserError(f"{shard.location}: the shard holds no rows. Remove it or write it again")
    parts: list[ShardPart] = []
    first_group, first_row, row, size = 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        row += metadata.row_group(group).num_rows
        size += metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == metadata.num_row_groups - 1:
            parts.append(ShardPart(shard, first_group, group + 1, first_row, version))
            first_group, first_row, size = group + 1, row, 0
    return parts


def _open_parquet(shard: Shard, columns: tuple[str, ...]) -> pq.ParquetFile:
    location = shard.location
    try:
        file = pq.ParquetFile(location.filesystem.open_input_file(location.path))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(shard, error) from error
    missing = [c for c in columns if c not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{location}: no column {', '.join(map(repr, missing))}; it has {', '.join(file.schema_arrow.names)}. "
            f"Set text_column, domain_column (or domain) and id_column of this source"
        )
    return file


def _unreadable(shard: Shard, error: Exception) -> UserError:
    return UserError(
        f"{shard.location}: cannot be read as {shard.format} ({error}). The shard is truncated, damaged or of another "
        f"format: write it again, or set format"
    )


def read_rows(part: ShardPart, columns: tuple[str, ...], bad: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, {column: value}) of a part; numbers count rows from 0 in Parquet, lines from 1 in JSONL.

    Rows that cannot be decoded go to `bad`. Raises UserError when the shard itself cannot be read.
    """
    read = _parquet_rows if part.shard.format == "parquet" else _jsonl_rows
    try:
        for number, row in read(part, columns, bad):
            bad.rows += 1
            if row is not None:
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(part.shard, error) from error


def _parquet_rows(
    part: ShardPart, columns: tuple[str, ...], bad: BadRows
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    file = _open_parquet(part.shard, columns)
    groups = list(range(part.first_group, part.end_group))
    number = part.first_row
    for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=list(columns)):
        for i in range(batch.num_rows):
            row: dict[str, Any] | None = None
            try:
                row = {name: batch.column(name)[i].as_py() for name in columns}
            except UnicodeDecodeError as error:
                bad.add(number, f"not valid UTF-8 ({error.reason})")
            yield number, row
            number += 1


def _jsonl_rows(part: ShardPart, columns: tuple[str, ...], bad: BadRows) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, line in enumerate(_lines(part.shard), 1):
        if line.strip():
            yield number, _parse_line(number, line, columns, bad)


def _parse_line(number: int, line: bytes, columns: tuple[str, ...], bad: BadRows) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        bad.add(number, f"not valid JSON ({error})")
        return None
    if not isinstance(value, dict):
        bad.add(number, f"a JSON {type(value).__name__}, not an object")
        return None
    missing = [c for c in columns if c not in value]
    if missing:
        bad.add(number, f"no field {', '.join(map(repr, missing))}; it has {', '.join(map(str, value))}")
        return None
    return {c: value[c] for c in columns}


def _lines(shard: Shard) -> Iterator[bytes]:
    """Lines of a file, decompressed as it is read. A truncated gzip or zstd stream raises OSError."""
    location = shard.location
    compression = next((name for suffix, name in _COMPRESSION.items() if location.name.endswith(suffix)), None)
    with location.filesystem.open_input_stream(location.path, compression=compression) as stream:
        rest = b""
        while block := stream.read(READ_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        if rest:
            yield rest


@dataclass(frozen=True, slots=True)
class DocumentColumns:
    """Which columns of a source make a document; `domain` fixed means that no column is read for it."""

    text: str
    id: str
    domain_column: str | None
    domain: str | None
    names: tuple[str, ...] = field(default=())

    @staticmethod
    def of(source: SourceConfig, text_column: str | None = None) -> DocumentColumns:
        text = text_column or source.text_column
        domain_column = None if source.domain else source.domain_column
        names = tuple(dict.fromkeys(c for c in (source.id_column, domain_column, text) if c))
        return DocumentColumns(text, source.id_column, domain_column, source.domain, names)


def read_documents(part: ShardPart, columns: DocumentColumns) -> Iterator[Document]:
    """The documents of a part.

    Raises UserError after the last row when texts were null, empty, not strings or not valid Unicode, or when ids or
    domains were missing.
    """

    def document(row: dict[str, Any]) -> Document:
        return Document(row_id(row, columns), row_domain(row, columns), _text(row[columns.text], columns.text))

    return read_checked(part, columns, document)


def read_checked(part: ShardPart, columns: DocumentColumns, parse: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    """`parse` applied to every row; a ValueError it raises makes the row bad, all of which are reported at the end."""
    bad = BadRows(part)
    for number, row in read_rows(part, columns.names, bad):
        try:
            value = parse(row)
        except ValueError as error:
            bad.add(number, str(error))
            continue
        yield value
    bad.raise_if_any()
    if bad.rows == 0:
        raise UserError(f"{part.shard.location}: the shard holds no rows. Remove it or write it again")


def row_id(row: dict[str, Any], columns: DocumentColumns) -> str:
    """The id as text; whole numbers are taken too. Raises ValueError when it is missing."""
    value = row[columns.id]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(value, columns.id)


def row_domain(row: dict[str, Any], columns: DocumentColumns) -> str:
    """The domain of a row, or the fixed one of its source. Raises ValueError when it is missing."""
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
