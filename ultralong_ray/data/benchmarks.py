"""Evaluation sets as files in, an index of their word n-grams out: built once, shared by tasks as three small files.

    <folder>/index.npz          arrays of `BenchmarkIndex`
    <folder>/vocabulary.txt     the words of all items, one a line; the first has number 1
    <folder>/items.json         names of the items, counts per benchmark

Read against pyarrow 26: `open_input_stream(compression="detect")` goes by the file's name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultralong_ray.config import BenchmarkConfig, DecontaminateConfig
from ultralong_ray.data.ngrams import HashArray, WordArray, ngram_hashes, words
from ultralong_ray.storage import Location
from ultralong_ray.types import StorageOptions, UserError

INDEX_VERSION = 1  # of what is written and of the normalisation
DEFAULT_COLUMNS = ("question", "prompt", "problem", "text", "query", "input")
_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_BITMAP_SLOTS_PER_NGRAM = 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads a hash over its high bits


@dataclass(frozen=True, slots=True)
class NgramTable:
    """Sorted hashes of n-grams, where each stands in the items' words, and a bitmap that rules most others out."""

    length: int  # words
    hashes: HashArray  # [num_ngrams], sorted
    places: NDArray[np.int64]  # [num_ngrams], first word of the n-gram in `BenchmarkIndex.stream`
    bitmap: NDArray[np.bool_]  # [power of two]

    @staticmethod
    def of(length: int, hashes: HashArray, places: NDArray[np.int64]) -> NgramTable:
        bits = max(10, int(np.ceil(np.log2(max(1, len(hashes)) * _BITMAP_SLOTS_PER_NGRAM))))
        bitmap = np.zeros(1 << bits, bool)
        bitmap[_slots(hashes, bits)] = True
        return NgramTable(length, hashes, places, bitmap)

    def candidates(self, ids: WordArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where n-grams of `ids` have a hash of the table: (positions in ids, ascending; rows of the table)."""
        found = ngram_hashes(ids, self.length)
        positions = np.flatnonzero(self.bitmap[_slots(found, self.bitmap.size.bit_length() - 1)])
        rows = np.searchsorted(self.hashes, found[positions])
        same = self.hashes[np.minimum(rows, len(self.hashes) - 1)] == found[positions] if len(self.hashes) else rows < 0
        return positions[same], rows[same]

    def same_hash(self, row: int) -> list[int]:
        """The places of all n-grams with the hash of `row`, the first of them; ascending."""
        end = int(np.searchsorted(self.hashes, self.hashes[row], side="right"))
        return self.places[row:end].tolist()


def _slots(hashes: HashArray, bits: int) -> NDArray[np.int64]:
    return ((hashes * _GOLDEN) >> np.uint64(64 - bits)).astype(np.int64)


@dataclass(frozen=True, slots=True)
class BenchmarkIndex:
    """The words of all items, one item after the other, and the n-grams by which a text is searched for them."""

    vocabulary: dict[bytes, int]
    spelled: list[str]  # word number - 1 -> word
    stream: WordArray  # [num_words_of_all_items]
    starts: NDArray[np.int64]  # [num_items + 1], first word of each item
    names: list[tuple[str, str, str]]  # [num_items], (benchmark, item, column)
    ngrams: NgramTable  # n-grams of the items that have as many words
    short: NgramTable  # the first words of the items that do not
    counts: dict[str, dict[str, int]]  # benchmark -> items, items matched as a whole, items too short

    def item_at(self, place: int) -> int:
        """The item that word `place` of the stream belongs to."""
        return int(np.searchsorted(self.starts, place, side="right")) - 1

    def item_words(self, item: int) -> WordArray:
        return self.stream[self.starts[item] : self.starts[item + 1]]

    def spell(self, ids: WordArray) -> str:
        return " ".join(self.spelled[i - 1] if i else "?" for i in ids)


def index_name(config: DecontaminateConfig, options: StorageOptions) -> str:
    """A name for the index of these benchmarks: another one when a rule, a file or what is in a file changes."""
    content: list[Any] = [INDEX_VERSION, config.fingerprint_fields()]
    for benchmark in config.benchmarks:
        for file in _files(benchmark, options):
            info = file.filesystem.get_file_info(file.path)
            content.append([file.uri, info.size, info.mtime_ns])
    return f"benchmarks-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]}"


def write_index(config: DecontaminateConfig, folder: Location) -> dict[str, dict[str, int]]:
    """Read the benchmarks, write their index and return its counts per benchmark.

    Raises UserError for files that are missing, unreadable or without the columns, and for a benchmark without items.
    """
    vocabulary: dict[bytes, int] = {}
    names: list[tuple[str, str, str]] = []
    lengths: list[int] = []
    arrays: list[WordArray] = []
    counts: dict[str, dict[str, int]] = {}
    for benchmark in config.benchmarks:
        count = counts[benchmark.name] = {"items": 0, "whole_item": 0, "too_short": 0}
        for item, column, text in _items(benchmark, folder.options):
            found = words(text)
            count["items"] += 1
            count["whole_item"] += config.min_item_words <= len(found) < config.ngram_words
            if len(found) < config.min_item_words:
                count["too_short"] += 1
                continue
            names.append((benchmark.name, item, column))
            lengths.append(len(found))
            arrays.append(np.array([vocabulary.setdefault(w, len(vocabulary) + 1) for w in found], np.int32))
        if not count["items"]:
            raise UserError(f"decontaminate.benchmarks {benchmark.name!r}: {benchmark.uri} holds no item")
    starts = np.cumsum([0, *lengths])
    stream = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, stream=stream, starts=starts, **_tables(stream, starts, config))
    (folder / "vocabulary.txt").write_bytes(b"\n".join(vocabulary))
    (folder / "items.json").write_json({"names": names, "counts": counts})
    (folder / "index.npz").write_bytes(buffer.getvalue())
    return counts


def _tables(stream: WordArray, starts: NDArray[np.int64], config: DecontaminateConfig) -> dict[str, Any]:
    """Hashes and places of both tables. An n-gram that occurs again has a row for each place, in order of place."""
    lengths = np.diff(starts)
    full = starts[:-1][lengths >= config.ngram_words]
    ends = starts[1:][lengths >= config.ngram_words] - config.ngram_words
    long_places = [np.arange(start, end + 1) for start, end in zip(full, ends, strict=True)]
    short_places = starts[:-1][lengths < config.ngram_words]
    arrays: dict[str, Any] = {}
    for name, length, places in (
        ("ngrams", config.ngram_words, np.concatenate([np.empty(0, np.int64), *long_places])),
        ("short", config.min_item_words, short_places),
    ):
        hashes = ngram_hashes(stream, length)[places]
        order = np.argsort(hashes, kind="stable")
        arrays |= {f"{name}_length": length, f"{name}_hashes": hashes[order], f"{name}_places": places[order]}
    return arrays


@lru_cache(maxsize=2)
def read_index(folder: Location) -> BenchmarkIndex:
    """The index that `write_index` wrote; kept by the process, since every part of a corpus needs it."""
    arrays = np.load(io.BytesIO((folder / "index.npz").read_bytes()))
    spelled = (folder / "vocabulary.txt").read_bytes().split(b"\n")
    items = (folder / "items.json").read_json()
    ngrams, short = (
        NgramTable.of(int(arrays[f"{n}_length"]), arrays[f"{n}_hashes"], arrays[f"{n}_places"])
        for n in ("ngrams", "short")
    )
    return BenchmarkIndex(
        {word: i for i, word in enumerate(spelled, 1)},
        [word.decode() for word in spelled],
        arrays["stream"],
        arrays["starts"],
        [(benchmark, item, column) for benchmark, item, column in items["names"]],
        ngrams,
        short,
        items["counts"],
    )


def _files(benchmark: BenchmarkConfig, options: StorageOptions) -> list[Location]:
    """The files of a benchmark, sorted by path. Raises UserError when there are none."""
    location = Location.of(benchmark.uri, options)
    files = [f for f in location.files(recursive=True) if _suffix(f)] if location.is_dir() else [location]
    if not files or not files[0].exists() or not all(map(_suffix, files)):
        raise UserError(
            f"decontaminate.benchmarks {benchmark.name!r}: uri {benchmark.uri} is no file or folder of "
            f"{', '.join(_SUFFIXES)} (.gz, .zst); check the path"
        )
    return files


def _items(benchmark: BenchmarkConfig, options: StorageOptions) -> Iterator[tuple[str, str, str]]:
    """(item, column, text) of a benchmark, in the order of its files and rows."""
    for file in _files(benchmark, options):
        try:
            yield from _file_items(benchmark, file)
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"decontaminate.benchmarks {benchmark.name!r}: {file} cannot be read ({error}). Check that it is whole "
                f"and that its name says its format"
            ) from error


def _suffix(file: Location) -> str | None:
    plain = file.name.removesuffix(".gz").removesuffix(".zst")
    return next((s for s in _SUFFIXES if plain.endswith(s)), None)


def _file_items(benchmark: BenchmarkConfig, file: Location) -> Iterator[tuple[str, str, str]]:
    columns = benchmark.columns
    for number, row in enumerate(_rows(file)):
        columns = columns or next(((c,) for c in DEFAULT_COLUMNS if c in row), ())
        missing = [c for c in (*columns, *filter(None, [benchmark.id_column])) if c not in row]
        if missing or not columns:
            raise UserError(
                f"decontaminate.benchmarks {benchmark.name!r}: row {number} of {file} has no column "
                f"{', '.join(missing or DEFAULT_COLUMNS)}; it has {', '.join(map(str, row))}. Set columns and id_column"
            )
        item = str(row[benchmark.id_column]) if benchmark.id_column else f"{file.name}:{number}"
        for column in columns:
            value = row[column]
            text = " ".join(map(str, value)) if isinstance(value, list) else value
            if isinstance(text, str) and text.strip():
                yield item, column, text


def _rows(file: Location) -> Iterator[dict[str, Any]]:
    """Rows of a file, whole in memory: evaluation sets are megabytes."""
    with file.filesystem.open_input_stream(file.path, compression="detect") as stream:
        content = stream.read()
    if _suffix(file) == ".parquet":
        yield from pq.read_table(pa.BufferReader(content)).to_pylist()
        return
    for line in content.decode("utf-8-sig").split("\n"):
        if line.strip():
            row = {"text": line} if _suffix(file) == ".txt" else json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"a line holds a JSON {type(row).__name__}, not an object")
            yield row
