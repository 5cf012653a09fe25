"""Packed sequence files: any slice of any sequence reads back exactly, and touches only the row groups it needs."""

from pathlib import Path

import numpy as np
import pytest

from ultralong_ray.packed import (
    PackedFile,
    PackedManifest,
    PackedReader,
    chunking,
    file_name,
    write_placements,
    write_sequences,
)
from ultralong_ray.storage import Location
from ultralong_ray.types import PackedSequence, Placement


def write(folder: Location, tokens: np.ndarray, weights: np.ndarray, first_file: int) -> None:
    count, length = tokens.shape
    sequences = [PackedSequence(i, tokens[i], weights[i]) for i in range(count)]
    write_sequences(folder / file_name(0), sequences[:first_file], length, True)
    write_sequences(folder / file_name(1), sequences[first_file:], length, True)
    files = (PackedFile(file_name(0), 0, first_file), PackedFile(file_name(1), first_file, count - first_file))
    PackedManifest(length, count, *chunking(length), True, 2000, files).write(folder)


@pytest.mark.parametrize(("length", "count"), [(40_000, 7), (512, 300), (16_384, 9)])
def test_random_slices(tmp_path: Path, length: int, count: int):
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, 2000, (count, length)).astype(np.int32)
    weights = rng.integers(0, 9, (count, length)).astype(np.uint8)
    folder = Location.of(tmp_path)
    write(folder, tokens, weights, 4)
    reader = PackedReader(folder)
    for _ in range(60):
        sequence = int(rng.integers(count))
        start = int(rng.integers(0, length))
        end = int(rng.integers(start + 1, length + 2))  # one beyond the end is clipped
        ids, loss_weight = reader.read(sequence, start, end)
        np.testing.assert_array_equal(ids, tokens[sequence, start:end])
        np.testing.assert_array_equal(loss_weight, weights[sequence, start:end])
        assert ids.dtype == np.int32


def test_a_slice_reads_only_its_row_groups(tmp_path: Path):
    length = 2**20
    tokens = np.arange(length, dtype=np.int32)[None]
    folder = Location.of(tmp_path)
    write_sequences(folder / file_name(0), [PackedSequence(0, tokens[0])], length, False)
    PackedManifest(length, 1, *chunking(length), False, 2**20, (PackedFile(file_name(0), 0, 1),)).write(folder)
    reader = PackedReader(folder)
    ids, weights = reader.read(0, 3 * length // 8, 4 * length // 8)
    assert weights is None
    np.testing.assert_array_equal(ids, tokens[0, 3 * length // 8 : 4 * length // 8])
    assert len(reader._groups) == 8  # 131,072 tokens of 1,048,576: 8 of 64 groups


def test_document_starts(tmp_path: Path):
    folder = Location.of(tmp_path)
    write(folder, np.zeros((5, 64), np.int32), np.zeros((5, 64), np.uint8), 2)
    write_placements(folder, [Placement(1, 30, 64, "b", "d", 0, 0, 34), Placement(1, 0, 28, "a", "d", 0, 0, 28)])
    reader = PackedReader(folder)
    assert reader.document_starts(1).tolist() == [0, 30]
    assert reader.document_starts(0).tolist() == [0]


def test_a_sequence_of_another_length_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="sequence 3 has 10 tokens, not 12"):
        write_sequences(Location.of(tmp_path) / "x", [PackedSequence(3, np.zeros(10, np.int32))], 12, False)
