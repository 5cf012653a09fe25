"""Ranks, groups, segments and the split of a global batch, as integers."""

from __future__ import annotations

import pytest

from ultralong_ray.parallel.topology import Topology, local_segments, sequences_of_micro_batch

DEGREES = [(1, 1), (3, 1), (1, 3), (2, 2), (3, 2), (2, 4), (4, 2)]


def places(ulysses: int, ring: int, groups: int = 1) -> list[Topology]:
    world_size = ulysses * ring * groups
    return [Topology(world_size, rank, ulysses, ring) for rank in range(world_size)]


def test_groups_are_neighbours() -> None:
    eight = places(2, 2, groups=2)
    assert [p.dp_rank for p in eight] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [p.sp_rank for p in eight] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [p.ring_rank for p in eight] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [p.ulysses_rank for p in eight] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert eight[0].sp_groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert eight[0].ulysses_groups == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert eight[0].ring_groups == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_a_rank_stands_in_its_groups_at_its_own_place(ulysses: int, ring: int) -> None:
    for place in places(ulysses, ring, groups=2):
        assert place.sp_groups[place.dp_rank][place.sp_rank] == place.rank
        mine = [group for group in place.ulysses_groups if place.rank in group]
        assert len(mine) == 1 and mine[0][place.ulysses_rank] == place.rank
        mine = [group for group in place.ring_groups if place.rank in group]
        assert len(mine) == 1 and mine[0][place.ring_rank] == place.rank
        assert {rank // place.degree for rank in mine[0]} == {place.dp_rank}


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_segments_hold_every_position_once_and_as_many_each(ulysses: int, ring: int) -> None:
    length = 48
    held = [local_segments(length, place) for place in places(ulysses, ring)]
    sizes = {sum(end - start for start, end in segments) for segments in held}
    assert sizes == {length // (ulysses * ring)}
    assert sorted(p for segments in held for start, end in segments for p in range(start, end)) == list(range(length))
    for segments in held:
        assert len(segments) in (1, 2) and all(start < end for start, end in segments)
        assert len(segments) == 1 or segments[0][1] < segments[1][0]  # ascending, and neighbours are merged


def test_the_zigzag_gives_ring_ranks_an_early_and_a_late_chunk() -> None:
    assert [local_segments(48, place) for place in places(1, 3)] == [
        ((0, 8), (40, 48)),
        ((8, 16), (32, 40)),
        ((16, 32),),
    ]
    assert [local_segments(16, place) for place in places(2, 2)] == [((0, 4),), ((12, 16),), ((4, 8),), ((8, 12),)]
    # three Ulysses ranks share two chunks of 6: the second has the end of one and the start of the other
    assert [local_segments(24, place) for place in places(3, 2)][:3] == [((0, 4),), ((4, 6), (18, 20)), ((20, 24),)]
    assert local_segments(24, places(3, 2)[4]) == ((10, 14),)


@pytest.mark.parametrize(("ulysses", "ring"), DEGREES)
def test_causal_work_is_the_same_for_every_ring_rank(ulysses: int, ring: int) -> None:
    work: dict[int, int] = {}
    for place in places(ulysses, ring):
        keys = sum(position + 1 for start, end in local_segments(48, place) for position in range(start, end))
        work[place.ring_rank] = work.get(place.ring_rank, 0) + keys
    assert len(set(work.values())) == 1


@pytest.mark.parametrize(
    ("length", "ulysses", "ring", "words"),
    [
        (50, 4, 1, "length 50 is not divisible by ulysses_degree 4 x ring_degree 1; .* 48 and 52"),
        (50, 2, 2, "length 50 is not divisible by ulysses_degree 2 x ring_degree 2; .* 48 and 52"),
        (54, 1, 2, "length 54 is divisible by .* ring_degree 2 two equal chunks .* no multiple of 4; .* 52 and 56"),
        (54, 3, 2, "no multiple of 12; the nearest lengths that are: 48 and 60"),
    ],
)
def test_a_length_that_cannot_be_split_names_the_nearest_that_can(
    length: int, ulysses: int, ring: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        local_segments(length, places(ulysses, ring)[0])


@pytest.mark.parametrize(
    ("world_size", "ulysses", "ring", "micro"), [(1, 1, 1, 3), (4, 2, 1, 1), (4, 1, 1, 3), (8, 2, 2, 2), (8, 1, 4, 1)]
)
def test_every_sequence_of_a_batch_is_computed_by_one_group_once(
    world_size: int, ulysses: int, ring: int, micro: int
) -> None:
    passes, degree = 2, ulysses * ring
    batch = list(range(100, 100 + passes * micro * (world_size // degree)))
    for sp_rank in range(degree):
        seen = []
        for group in range(world_size // degree):
            place = Topology(world_size, group * degree + sp_rank, ulysses, ring)
            for index in range(passes):
                part = sequences_of_micro_batch(batch, place, index, micro)
                assert len(part) == micro
                seen += part
        assert sorted(seen) == batch


def test_degrees_that_do_not_divide_the_world_are_refused() -> None:
    words = r"6 ranks cannot form sequence-parallel groups of 4 \(ulysses_degree 2 x ring_degree 2\)"
    with pytest.raises(ValueError, match=words):
        Topology(6, 0, 2, 2)
