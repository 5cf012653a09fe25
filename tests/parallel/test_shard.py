"""The label shift, at the edges of slices, sequences and documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.parallel.spawn import write_packed
from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.shard import read_slice
from ultralong_ray.parallel.topology import Topology

IDS = np.array([[10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24, 25, 26, 27]])
WEIGHTS = np.array([[1, 0, 2, 1, 1, 1, 1, 3], [0, 0, 0, 0, 5, 1, 0, 0]])
STARTS = [[0, 3, 4], [0, 5]]
ALONE = Topology(1, 0, 1)


@pytest.fixture
def reader(tmp_path: Path) -> PackedReader:
    return PackedReader(write_packed(tmp_path, IDS, WEIGHTS, STARTS))


def test_the_last_label_of_a_slice_is_the_first_token_of_the_next(reader: PackedReader) -> None:
    part = read_slice(reader, [0], Topology(2, 0, 2), mask_documents=False)
    assert part.input_ids.tolist() == [[10, 11, 12, 13]]
    assert part.labels.tolist() == [[-100, 12, 13, 14]]  # 11 has weight 0
    assert part.loss_weight.tolist() == [[0, 2, 1, 1]]
    assert part.document_ids is None
    last = read_slice(reader, [0], Topology(2, 1, 2), mask_documents=False)
    assert last.position_ids.tolist() == [[4, 5, 6, 7]]
    assert last.labels.tolist() == [[15, 16, 17, -100]]
    assert last.loss_weight.tolist() == [[1, 1, 3, 0]]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_slices_of_any_degree_join_to_the_whole(reader: PackedReader, degree: int, mask_documents: bool) -> None:
    whole = read_slice(reader, [1, 0], ALONE, mask_documents)
    parts = [read_slice(reader, [1, 0], Topology(degree, rank, degree), mask_documents) for rank in range(degree)]
    for name in ("input_ids", "labels", "loss_weight", "position_ids"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole, name), err_msg=name)
    for part in parts:
        assert (part.document_ids is None) == (not mask_documents)
        if part.document_ids is not None:
            np.testing.assert_array_equal(part.document_ids, whole.document_ids)


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 2), (2, 2), (1, 4), (4, 1)])
def test_what_a_ring_holds_is_the_whole_in_another_order(reader: PackedReader, ulysses: int, ring: int) -> None:
    whole = read_slice(reader, [1, 0], ALONE, mask_documents=False)
    degree = ulysses * ring
    parts = [read_slice(reader, [1, 0], Topology(degree, r, ulysses, ring), False) for r in range(degree)]
    positions = np.concatenate([part.position_ids for part in parts], axis=1)
    assert sorted(positions[0].tolist()) == list(range(8)) and (positions[0] == positions[1]).all()
    for name in ("input_ids", "labels", "loss_weight"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole, name)[:, positions[0]], err_msg=name)


def test_both_ends_of_a_ring_rank_have_their_label(reader: PackedReader) -> None:
    part = read_slice(reader, [0], Topology(2, 0, 1, 2), mask_documents=False)
    assert part.input_ids.tolist() == [[10, 11, 16, 17]]
    assert part.position_ids.tolist() == [[0, 1, 6, 7]]
    assert part.labels.tolist() == [[-100, 12, 17, -100]]  # 11 has weight 0, nothing follows 17
    assert part.loss_weight.tolist() == [[0, 2, 3, 0]]


def test_documents_are_not_masked_in_a_ring(reader: PackedReader) -> None:
    with pytest.raises(ValueError, match="documents cannot be masked with ring_degree 2; use ulysses_degree"):
        read_slice(reader, [0], Topology(2, 0, 1, 2), mask_documents=True)


def test_with_documents_masked_no_document_predicts_the_next(reader: PackedReader) -> None:
    part = read_slice(reader, [0, 1], ALONE, mask_documents=True)
    assert part.document_ids is not None
    assert part.document_ids.tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert part.position_ids.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert part.labels.tolist() == [
        [-100, 12, -100, -100, 15, 16, 17, -100],
        [-100, -100, -100, 24, -100, -100, -100, -100],
    ]
    assert part.loss_weight.tolist() == [[0, 2, 0, 0, 1, 1, 3, 0], [0, 0, 0, 5, 0, 0, 0, 0]]


def test_without_weights_every_token_but_the_first_is_a_target_once(tmp_path: Path) -> None:
    reader = PackedReader(write_packed(tmp_path, IDS, None, STARTS))
    part = read_slice(reader, [0], ALONE, mask_documents=False)
    assert part.labels.tolist() == [[11, 12, 13, 14, 15, 16, 17, -100]]
    assert part.loss_weight.tolist() == [[1] * 7 + [0]]
