"""The files of a checkpoint: written with checksums, committed by a manifest, checked as they are read.

    manifest.json       step, identity, layout, where every part stands, sizes and checksums of the other files
    state-00000.bin     rank 0's float32 numbers, little-endian: per part its master weight and two Adam moments
    random-00000.pt     rank 0's random states

In go parts of tensors and the folder, local or remote; out come ranges of files. The manifest is written last: a
folder without one is no checkpoint. Files carry a CRC-32 for every block, so that a reader of a range checks just the
blocks it reads; the manifest carries a SHA-256 of itself and must be byte for byte what this module would write.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultralong_ray.object_store import retried
from ultralong_ray.storage import Location

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
BLOCK_BYTES = 4 * 2**20
Buffer = bytes | memoryview


class Damaged(Exception):
    """A file of a checkpoint is not what was written. The message names it and says how it differs."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What the manifest says of a file: bytes, and the CRC-32 of every block, the last one shorter."""

    num_bytes: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartEntry:
    """Elements [start, start + numel) of a parameter: in `file` from byte `offset`, one kind after the other."""

    start: int
    numel: int
    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Manifest:
    step: int
    identity: dict[str, Any]  # what a run that continues must share
    layout: dict[str, Any]  # of the ranks that wrote it, for the reader's information
    cursor: dict[str, int]  # epoch and sequence that training has read up to
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # parameter -> shape
    parts: dict[str, list[PartEntry]] = field(default_factory=dict)  # parameter -> where its elements stand
    files: dict[str, FileEntry] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        body = {**asdict(self), "format_version": FORMAT_VERSION}
        return _dump({**body, "sha256": hashlib.sha256(_dump(body)).hexdigest()})

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Raises Damaged unless `data` is exactly what `to_bytes` gave."""
        body: dict[str, Any] = {}
        try:
            body = json.loads(data)
            found = body.pop("sha256")
            sound = hashlib.sha256(_dump(body)).hexdigest() == found and _dump({**body, "sha256": found}) == data
        except (ValueError, KeyError, AttributeError, TypeError):
            sound = False
        if not sound:
            raise Damaged(f"{MANIFEST_FILE} is damaged ({len(data)} bytes)")
        if body["format_version"] != FORMAT_VERSION:
            raise Damaged(f"{MANIFEST_FILE} has format {body['format_version']}, this code reads {FORMAT_VERSION}")
        return Manifest(
            body["step"],
            body["identity"],
            body["layout"],
            body["cursor"],
            {name: tuple(shape) for name, shape in body["shapes"].items()},
            {name: [PartEntry(**entry) for entry in entries] for name, entries in body["parts"].items()},
            {name: FileEntry(e["num_bytes"], tuple(e["blocks"])) for name, e in body["files"].items()},
        )


def _dump(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def write_file(target: Location, pieces: Callable[[], Iterable[Buffer]]) -> FileEntry:
    """Write the pieces one after the other and return the file's size and checksums."""

    def fill(sink: Any) -> FileEntry:
        checksum = _Checksum()
        for piece in pieces():
            view = memoryview(piece).cast("B")
            checksum.add(view)
            sink.write(view)
        return checksum.entry()

    return target.write_with(fill)


def pieces_of(file: Path) -> Iterator[Buffer]:
    """A file of this machine, for `write_file`."""
    with file.open("rb") as source:
        while piece := source.read(BLOCK_BYTES):
            yield piece


class _Checksum:
    """CRC-32 of every block of a stream."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.num_bytes = 0

    def add(self, data: memoryview) -> None:
        while data:
            room = BLOCK_BYTES - self.num_bytes % BLOCK_BYTES
            if room == BLOCK_BYTES:
                self.blocks.append(0)
            self.blocks[-1] = zlib.crc32(data[:room], self.blocks[-1])
            self.num_bytes += len(data[:room])
            data = data[room:]

    def entry(self) -> FileEntry:
        return FileEntry(self.num_bytes, tuple(self.blocks))


class FileReader:
    """Ranges of one file of a checkpoint. Raises Damaged when the file is missing, of another size, or altered."""

    def __init__(self, folder: Location, name: str, manifest: Manifest) -> None:
        self.name, self.entry = name, manifest.files[name]
        self.last_index, self.last_block = -1, b""
        self.location = folder / name
        try:
            self.input = self.location.open_input()
            found = self.input.size()
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        if found != self.entry.num_bytes:
            raise Damaged(f"{name} has {found} bytes, {self.entry.num_bytes} were written")

    def read(self, start: int, num_bytes: int) -> bytes:
        """Bytes [start, start + num_bytes). Whole blocks are read and checked around them."""
        if num_bytes == 0:
            return b""
        first, last = start // BLOCK_BYTES, (start + num_bytes - 1) // BLOCK_BYTES
        # Small tensors share a block: the last one read is at hand.
        known = self.last_block if first == self.last_index else b""
        data = known + self._blocks(first + bool(known), last)
        self.last_index, self.last_block = last, data[(last - first) * BLOCK_BYTES :]
        begin = start - first * BLOCK_BYTES
        return data[begin : begin + num_bytes]

    def _blocks(self, first: int, last: int) -> bytes:
        """Blocks first..last in one read, none where first > last. What is not as it should be is read once more."""
        if first > last:
            return b""
        data, altered = self._read_blocks(first, last)
        if altered is not None:
            self.input = self.location.open_input()
            data, altered = self._read_blocks(first, last)
        if altered is not None:
            raise Damaged(f"{self.name} is altered within {BLOCK_BYTES} bytes from byte {altered * BLOCK_BYTES}")
        return data

    def _read_blocks(self, first: int, last: int) -> tuple[bytes, int | None]:
        """The blocks, and the first of them that is not what was written."""
        begin = first * BLOCK_BYTES
        num_bytes = min((last + 1) * BLOCK_BYTES, self.entry.num_bytes) - begin
        data = retried(lambda: self.input.read_at(num_bytes, begin), self.location.options.max_attempts)
        view = memoryview(data)
        for index in range(first, last + 1):
            block = view[(index - first) * BLOCK_BYTES : (index - first + 1) * BLOCK_BYTES]
            if zlib.crc32(block) != self.entry.blocks[index]:
                return data, index
        return data, None

    def close(self) -> None:
        self.input.close()


def damage_of(folder: Location, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the files of a checkpoint, a line for each that is; reads all of them."""
    for name, entry in sorted(manifest.files.items()):
        try:
            reader = FileReader(folder, name, manifest)
            for start in range(0, entry.num_bytes, BLOCK_BYTES):
                reader.read(start, min(BLOCK_BYTES, entry.num_bytes - start))
            reader.close()
        except Damaged as damage:
            yield str(damage)
