"""The shards of a corpus and the parts they are cut into: Parquet, Arrow (IPC file or stream), JSONL (plain, gz, zst).

A source is a file, a folder or a glob on any `Location`. A shard is cut into parts of about `PART_BYTES`, which are the
units of parallel work; how many workers there are never changes them:

    Parquet           ranges of row groups
    Arrow IPC file    ranges of record batches (an IPC stream is one part: its batches have no index)
    JSONL, plain      ranges of bytes; a line belongs to the part in which it begins
    JSONL, gz or zst  one part: such a file can be read from its beginning only

What is in the parts is read by rows.py.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq

from ultralong_ray.config import SourceConfig, StorageConfig
from ultralong_ray.object_store import explained, meaning_of
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

PART_BYTES = 2**26  # uncompressed bytes that one task reads
FOOTER_THREADS = 16
FILE_MAGIC = b"ARROW1"  # an IPC file opens with it, an IPC stream does not

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_SUFFIXES = {
    "parquet": (".parquet",),
    "arrow": (".arrow", ".feather", ".ipc"),
    "jsonl": tuple(name + zipped for name in (".jsonl", ".ndjson", ".json") for zipped in ("", ".gz", ".zst")),
}
_WILDCARD = re.compile(r"[*?\[]")
Format = Literal["parquet", "jsonl", "arrow"]


class BadShard(UserError):
    """A shard that cannot be read as what it should be. A source may ask to leave such shards out."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a source."""

    location: Location
    format: Format


@dataclass(frozen=True, slots=True)
class ShardPart:
    """The unit of work: [start, end) of a shard's row groups, record batches or bytes; end None: up to its end."""

    shard: Shard
    start: int = 0
    end: int | None = None
    first_row: int | None = 0  # of the file; None where that takes reading the parts before
    version: str = ""  # size and time of the file, so that work on a replaced file is not taken for work on this one

    @property
    def row_unit(self) -> str:
        return "line" if self.shard.format == "jsonl" else "row"

    @property
    def first_number(self) -> int:
        """Rows of Parquet and Arrow count from 0, lines from 1."""
        return 1 if self.row_unit == "line" else 0


@dataclass(frozen=True, slots=True)
class SkippedShard:
    """A shard, or the rest of one, that was left out, and why."""

    address: str
    reason: str


def list_shards(source: SourceConfig) -> list[Shard]:
    """The files of a source of kind "files", sorted by path.

    Raises UserError when uri is no address, when nothing is there, when a folder or glob holds no shard, or when a
    file's format is unclear.
    """
    assert source.uri is not None
    options = (source.storage or StorageConfig()).options
    try:
        found = _find(source, Location.of(source.uri, options))
    except OSError as error:
        raise explained(error, f"corpus source {source.uri}") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise UserError(
            f"corpus source: uri {source.uri!r} is no address ({error}). Write a path, or scheme://bucket/folder"
        ) from error
    if not found:
        raise UserError(
            f"corpus source {source.uri}: holds no shard (looked for .parquet, .arrow, .feather, .ipc, "
            f".jsonl, .jsonl.gz, .jsonl.zst). "
            f"Point uri at the shards. Files of other names are taken by a glob with format set, as in "
            f'uri = "folder/*", format = "parquet"'
        )
    return [_shard(f, source) for f in found]


def _find(source: SourceConfig, location: Location) -> list[Location]:
    assert source.uri is not None
    if _WILDCARD.search(source.uri) and not location.exists():
        folder = _fixed_parent(location)
        pattern = re.escape(folder.path) + _glob_pattern(location.path[len(folder.path) :])
        files = [f for f in folder.files(recursive=True) if re.fullmatch(pattern, f.path)]
        return [f for f in files if source.format or _format_of(f)]
    if location.is_dir():
        default = (*_SUFFIXES["parquet"], *_SUFFIXES["arrow"], ".jsonl", ".ndjson")
        wanted = _SUFFIXES[source.format] if source.format else default
        shown = [f for f in location.files(recursive=True) if not _is_hidden(f.path.removeprefix(location.path))]
        return [f for f in shown if f.name.removesuffix(".gz").removesuffix(".zst").endswith(wanted)]
    if location.exists():
        return [location]
    raise UserError(f"corpus source {source.uri}: nothing is there. Check the path, the bucket and its credentials")


def _is_hidden(path: str) -> bool:
    """Whether a file or a folder of this path is one of those that tools leave for themselves (`_temporary/0/`)."""
    return any(segment.startswith(("_", ".")) for segment in path.split("/"))


def _shard(location: Location, source: SourceConfig) -> Shard:
    kind = source.format or _format_of(location)
    if kind is None:
        raise UserError(f'{location}: format unknown from the file name; set format = "parquet", "jsonl" or "arrow"')
    return Shard(location, kind)


def _format_of(location: Location) -> Format | None:
    formats: tuple[Format, ...] = ("parquet", "arrow", "jsonl")
    return next((name for name in formats if location.name.endswith(_SUFFIXES[name])), None)


def _fixed_parent(location: Location) -> Location:
    """The folder above the first path segment that holds a wildcard and is no folder of this very name (`run[1]`)."""
    segments = location.uri.split("/")
    for i, segment in enumerate(segments):
        if _WILDCARD.search(segment) and not replace(location, uri="/".join(segments[: i + 1])).is_dir():
            return replace(location, uri="/".join(segments[:i]))
    return location.parent


def _glob_pattern(path: str) -> str:
    """Shell wildcards as a regular expression: * and ? stay within a folder, ** crosses folders.

    Raises UserError for a set that is none.
    """
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[!^]?[^/][^\]/]*\])", path)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join((known.get(p) or _glob_set(p)) if i % 2 else re.escape(p) for i, p in enumerate(parts))


def _glob_set(part: str) -> str:
    """`[a-c]`, or `[!a-c]` for any other character that is no slash."""
    negated = part[1] in "!^" and len(part) > 3
    characters = re.sub(r"([\\\[\]^&~|])", r"\\\1", part[1 + negated : -1])
    pattern = f"(?!/)[{'^' * negated}{characters}]"
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"corpus source: the set {part} in uri is none ({error}). Write the lower end of a range first, as in [a-z]"
        ) from error
    return pattern


def shard_domain(shard: Shard, pattern: str) -> str:
    """The domain that a shard's address gives: its folder's name ("folder"), or the first group of `pattern`.

    Raises UserError when the pattern is not found in the address.
    """
    if pattern == "folder":
        return shard.location.parent.name
    found = re.search(pattern, shard.location.uri)
    if found is None or not found.group(1):
        raise UserError(
            f"{shard.location}: domain_pattern {pattern!r} finds no domain in this address. Change the pattern, or "
            f"give these shards as a source of their own with domain"
        )
    return found.group(1)


def list_parts(
    shards: list[Shard], columns: tuple[str, ...], skip_bad: bool = False
) -> tuple[list[ShardPart], list[SkippedShard]]:
    """Cut shards into parts, reading only sizes and footers. `columns` must be there. Returns (parts, shards left out).

    Raises BadShard for an empty or truncated shard unless `skip_bad`, and UserError for a missing column or a store
    that does not answer, before any work starts.
    """

    def cut(shard: Shard) -> list[ShardPart] | SkippedShard:
        try:
            return _parts_of(shard, columns)
        except BadShard as error:
            if not skip_bad:
                raise
            return SkippedShard(str(shard.location), str(error))

    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        results = list(pool.map(cut, shards))
    skipped = [result for result in results if isinstance(result, SkippedShard)]
    return [part for result in results if isinstance(result, list) for part in result], skipped


def _parts_of(shard: Shard, columns: tuple[str, ...]) -> list[ShardPart]:
    try:
        info = shard.location.info()
    except OSError as error:
        raise explained(error, str(shard.location)) from error
    version = f"{info.size}-{info.mtime_ns}"
    if info.size == 0:
        raise BadShard(f"{shard.location}: the shard is empty (0 bytes). Remove it or write it again")
    if shard.format == "parquet":
        return _parquet_parts(shard, columns, version)
    if shard.format == "arrow":
        return _arrow_parts(shard, columns, version, info.size)
    if shard.location.name.endswith(tuple(COMPRESSION)) or info.size <= PART_BYTES:
        return [ShardPart(shard, version=version)]
    count = -(-info.size // PART_BYTES)
    edges = [info.size * i // count for i in range(count + 1)]
    return [ShardPart(shard, edges[i], edges[i + 1], None if i else 0, version) for i in range(count)]


def _parquet_parts(shard: Shard, columns: tuple[str, ...], version: str) -> list[ShardPart]:
    with open_parquet(shard, columns) as file:
        metadata = file.metadata
    if metadata.num_rows == 0:
        raise BadShard(f"{shard.location}: the shard holds no rows. Remove it or write it again")
    parts: list[ShardPart] = []
    first_group, first_row, row, size = 0, 0, 0, 0
    for group in range(metadata.num_row_groups):
        row += metadata.row_group(group).num_rows
        size += metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == metadata.num_row_groups - 1:
            parts.append(ShardPart(shard, first_group, group + 1, first_row, version))
            first_group, first_row, size = group + 1, row, 0
    return parts


def _arrow_parts(shard: Shard, columns: tuple[str, ...], version: str, size: int) -> list[ShardPart]:
    reader, _ = open_arrow(shard, columns)
    if isinstance(reader, ipc.RecordBatchStreamReader):
        return [ShardPart(shard, version=version)]
    batches = reader.num_record_batches
    count = max(1, min(batches, -(-size // PART_BYTES)))
    edges = [batches * i // count for i in range(count + 1)]
    return [ShardPart(shard, edges[i], edges[i + 1], None if i else 0, version) for i in range(count)]


def open_parquet(shard: Shard, columns: tuple[str, ...]) -> pq.ParquetFile:
    """Raises BadShard when the file is no Parquet, UserError when a column is missing or the store does not answer."""
    location = shard.location
    try:
        file = pq.ParquetFile(location.open_input(), pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(shard, error) from error
    _check_columns(location, file.schema_arrow.names, columns)
    return file


def open_arrow(
    shard: Shard, columns: tuple[str, ...]
) -> tuple[ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader, pa.NativeFile]:
    """(reader of an IPC file or stream, for the named columns alone; what it reads). Raises as `open_parquet` does."""
    location = shard.location
    try:
        source = location.open_input()
        is_file = source.read_at(len(FILE_MAGIC), 0) == FILE_MAGIC
        source.seek(0)
        if not is_file:
            reader: ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader = ipc.open_stream(source)
        else:
            reader = ipc.open_file(source)
            wanted = [i for i, name in enumerate(reader.schema.names) if name in columns]
            if len(wanted) == len(columns):
                reader = ipc.open_file(source, options=ipc.IpcReadOptions(included_fields=wanted))
    except (pa.ArrowException, OSError) as error:
        raise unreadable(shard, error) from error
    _check_columns(location, reader.schema.names, columns)
    return reader, source


def _check_columns(location: Location, names: list[str], columns: tuple[str, ...]) -> None:
    missing = [c for c in columns if c not in names]
    if missing:
        raise UserError(
            f"{location}: no column {', '.join(map(repr, missing))}; it has {', '.join(names)}. "
            f"Set text_column (or input_ids_column), domain_column (or domain, domain_pattern) and id_column of this "
            f"source"
        )
    twice = [c for c in columns if names.count(c) > 1]
    if twice:
        raise UserError(
            f"{location}: has {names.count(twice[0])} columns {twice[0]!r}. Name another column of {', '.join(names)}, "
            f"or write the shard again with names that differ"
        )


def unreadable(shard: Shard, error: Exception) -> UserError:
    """BadShard for a file that is damaged or of another format; UserError where the store is at fault."""
    if meaning_of(error):
        return explained(error, str(shard.location))
    return BadShard(
        f"{shard.location}: cannot be read as {shard.format} ({error}). The shard is truncated, damaged or of another "
        f'format or compression: write it again, set format, or leave such shards out with on_bad_shard = "skip"'
    )
