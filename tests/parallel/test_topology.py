"""Ranks, groups and the split of a global batch, as integers."""

from __future__ import annotations

import pytest

from ultralong_ray.parallel.topology import Topology, sequences_of_micro_batch


def test_groups_are_neighbours() -> None:
    places = [Topology(8, rank, 4) for rank in range(8)]
    assert [(p.dp_rank, p.sp_rank) for p in places] == [(d, s) for d in range(2) for s in range(4)]
    assert all(p.sp_groups[p.dp_rank][p.sp_rank] == p.rank for p in places)


@pytest.mark.parametrize(("world_size", "degree", "micro"), [(1, 1, 3), (4, 2, 1), (4, 1, 3), (8, 4, 2)])
def test_every_sequence_of_a_batch_is_computed_by_one_group_once(world_size: int, degree: int, micro: int) -> None:
    passes = 2
    batch = list(range(100, 100 + passes * micro * (world_size // degree)))
    for sp_rank in range(degree):
        seen = []
        for group in range(world_size // degree):
            place = Topology(world_size, group * degree + sp_rank, degree)
            for index in range(passes):
                part = sequences_of_micro_batch(batch, place, index, micro)
                assert len(part) == micro
                seen += part
        assert sorted(seen) == batch


def test_a_degree_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="6 ranks cannot form sequence-parallel groups of 4"):
        Topology(6, 0, 4)
