"""Packing: literal small cases, then every token exactly once in random ones; and the order that keeps copies apart."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.data.columns import copies_from, copies_of, place_rows, table_of
from ultralong_ray.data.fill import FilePlan, fill
from ultralong_ray.data.pack import (
    PackPlan,
    Separators,
    copies_apart,
    long_first,
    plan_concatenated,
    plan_whole,
    shuffled,
    split,
)
from ultralong_ray.data.sample import Copies
from ultralong_ray.data.token_shards import TokenReader, write_token_shard
from ultralong_ray.storage import Location
from ultralong_ray.types import TokenizedDocument

SEPARATORS = Separators(before=(7,), after=(8, 9), pad=99)
LONGEST = 600  # tokens that a document of these tests may have


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """Shards s0, s1, s2 of 20 documents each: document i holds 1000 * i, 1000 * i + 1, ...; s1 has weights 5 and 0."""
    folder = Location.of(tmp_path_factory.mktemp("tokens"))
    for shard in range(3):
        documents = []
        for i in range(20 * shard, 20 * shard + 20):
            ids = 1000 * i + np.arange(LONGEST, dtype=np.int32)
            weight = np.where(ids % 2 == 0, 5, 0).astype(np.uint8) if shard == 1 else None
            documents.append(TokenizedDocument(f"d{i}", "x", ids, weight))
        write_token_shard(folder, f"s{shard}", documents, weights=shard == 1)
    return folder


def filled(
    plan: PackPlan, tokens: Location, separators: Separators = SEPARATORS, **options: bool | int
) -> tuple[list[list[int]], np.ndarray | None]:
    table = table_of([(f"d{i}", "x", LONGEST) for i in range(60)], [20, 20, 20], str(tokens))
    reader = TokenReader(tokens)
    item = FilePlan.of(plan, separators, table)
    item = FilePlan(item.plan, separators, item.shards, tuple(s == "s1" for s in item.shards), item.shard, item.first)
    ids, weight = fill(item, reader, **{"weights": False, **options})  # type: ignore[arg-type]
    reader.close()
    return ids.tolist(), weight


def test_concatenated_literal(tokens: Location) -> None:
    plan = plan_concatenated(copies_of(3, 4), SEPARATORS, 6, 2)
    assert filled(plan, tokens)[0] == [[7, 0, 1, 2, 8, 9], [7, 1000, 1001, 1002, 1003, 8]]


def test_documents_and_separators_continue_in_the_next_sequence(tokens: Location) -> None:
    plan = plan_concatenated(copies_of(2, 7), SEPARATORS, 4, 3)
    assert filled(plan, tokens)[0] == [[7, 0, 1, 8], [9, 7, 1000, 1001], [1002, 1003, 1004, 1005]]
    assert place_rows(plan.documents) == [(0, 1, 3, 0, 0, 0, 2), (1, 2, 4, 1, 0, 0, 2), (2, 0, 4, 1, 0, 2, 6)]


def test_weights_of_documents_separators_and_padding(tokens: Location) -> None:
    weighted = copies_from([(20, 0, 3)])
    _, weight = filled(plan_whole(weighted, SEPARATORS, 8), tokens, weights=True)
    assert weight is not None and weight.tolist() == [[1, 5, 0, 5, 1, 1, 0, 0]]
    _, weight = filled(plan_whole(copies_of(3), SEPARATORS, 8), tokens, weights=True, separator_weight=0)
    assert weight is not None and weight.tolist() == [[0, 1, 1, 1, 0, 0, 0, 0]]


def test_stream_may_end_in_the_start_of_a_separator_and_no_earlier(tokens: Location) -> None:
    assert filled(plan_concatenated(copies_of(2), SEPARATORS, 6, 1), tokens)[0] == [[7, 0, 1, 8, 9, 7]]
    with pytest.raises(ValueError, match="the stream has 5 tokens"):
        plan_concatenated(copies_of(2), SEPARATORS, 7, 1)


def test_whole_takes_the_tightest_room(tokens: Location) -> None:
    none = Separators(pad=99)
    packed, _ = filled(plan_whole(copies_of(6, 5, 3, 4), none, 8), tokens, none)
    # 3 fits both rooms (2 is too small, 3 is exact): it goes behind the 5
    assert packed[1] == [1000, 1001, 1002, 1003, 1004, 2000, 2001, 2002]
    assert packed[2] == [3000, 3001, 3002, 3003, 99, 99, 99, 99]


def test_whole_cuts_only_what_is_longer_than_a_sequence(tokens: Location) -> None:
    none = Separators(pad=99)
    assert filled(plan_whole(copies_of(3, 10), none, 4), tokens, none)[0] == [
        [0, 1, 2, 99],
        [1000, 1001, 1002, 1003],
        [1004, 1005, 1006, 1007],
        [1008, 1009, 99, 99],
    ]


def test_copies_of_a_document_do_not_meet_in_a_sequence() -> None:
    copies = copies_from([(0, 0, 5), (0, 1, 5), (1, 0, 5), (2, 0, 5), (3, 0, 5), (4, 0, 5)])
    places = place_rows(plan_concatenated(copies, Separators(), 10, 3).documents)
    assert [(p[0], p[3], p[4]) for p in places if p[3] == 0] == [(0, 0, 0), (1, 0, 1)]
    assert sum(p[2] - p[1] for p in places) == 30


def order_by_scanning(copies: Copies, separator_tokens: int, length: int) -> list[int]:
    """The rule spelled out: the first waiting copy that is free goes first, then the next one, or it waits."""
    position, order, last, waiting = 0, [], {}, []

    def free(i: int) -> bool:
        return last.get(int(copies.row[i]), -1) < position // length

    def place(i: int) -> None:
        nonlocal position
        end = position + int(copies.num_tokens[i]) + separator_tokens
        last[int(copies.row[i])] = (end - 1) // length
        position = end
        order.append(i)

    def release() -> bool:
        found = next((w for w in waiting if free(w)), None)
        if found is not None:
            waiting.remove(found)
            place(found)
        return found is not None

    for i in range(len(copies)):
        while release():
            pass
        if free(i):
            place(i)
        else:
            waiting.append(i)
    while waiting:
        if not release():
            place(waiting.pop(0))
    return order


@pytest.mark.parametrize("seed", range(40))
def test_order_that_keeps_copies_apart(seed: int) -> None:
    rng = random.Random(seed)
    documents = rng.choice([3, 10, 60])
    rows = [(rng.randrange(documents), 0, rng.randrange(1, 60)) for _ in range(rng.choice([5, 80, 150]))]
    copies, length, separator = copies_from(rows), rng.choice([20, 100, 400]), rng.randrange(3)
    order, scanned = copies_apart(copies, separator, length).tolist(), order_by_scanning(copies, separator, length)
    assert order == scanned or num_beside(copies, scanned, separator, length) > 0
    assert sorted(order) == sorted(scanned)
    assert num_beside(copies, order, separator, length) in (0, num_beside(copies, scanned, separator, length))


def num_beside(copies: Copies, order: list[int], separator_tokens: int, length: int) -> int:
    """Copies that share a sequence with an earlier copy of their document."""
    position, held, found = 0, set[tuple[int, int]](), 0
    for i in order:
        end = position + int(copies.num_tokens[i]) + separator_tokens
        own = {(int(copies.row[i]), n) for n in range(position // length, (end - 1) // length + 1)}
        found += bool(own & held)
        held |= own
        position = end
    return found


def test_another_beginning_parts_copies_that_the_end_would_bring_together() -> None:
    """Two documents in the middle, then one that comes twice: its second copy has no later sequence to wait for."""
    copies = copies_from([(0, 0, 6), (1, 0, 4), (2, 0, 6), (3, 0, 4), (4, 0, 5), (4, 1, 5)])
    assert num_beside(copies, order_by_scanning(copies, 0, 10), 0, 10) == 1
    assert num_beside(copies, copies_apart(copies, 0, 10).tolist(), 0, 10) == 0


def test_whole_keeps_copies_apart_where_there_is_other_room() -> None:
    rows = [(0, 0, 7), (1, 0, 4), (0, 1, 3)]  # the tightest room for the second copy of 0 is behind the first one
    for copies, limit, expected in (
        (copies_from(rows), 2, [(0, 0), (1, 0), (1, 1)]),
        (copies_from([rows[0], (2, 0, 9), rows[2]]), None, [(0, 0), (1, 0), (2, 1)]),
        (copies_from([rows[0], (2, 0, 9), rows[2]]), 2, [(0, 0), (1, 0), (0, 1)]),
    ):
        places = place_rows(plan_whole(copies, Separators(), 10, limit).documents)
        assert sorted((place[0], place[4]) for place in places) == sorted(expected)


def test_order_of_many_copies() -> None:
    """Half of 100,000 copies have to wait: a list that is searched for each would take minutes."""
    order = copies_apart(copies_from([(i // 2, i % 2, 10) for i in range(100_000)]), 1, 1000)
    assert sorted(order.tolist()) == list(range(100_000)) and order.tolist() != list(range(100_000))


@pytest.mark.parametrize("seed", range(20))
def test_every_token_once_where_the_places_say(seed: int, tokens: Location) -> None:
    rng = random.Random(seed)
    separators = Separators(tuple(range(-rng.randrange(3), 0)), tuple(range(-9, -9 + rng.randrange(4))), -100)
    copies = copies_of(*(rng.randrange(1, 60) for _ in range(50)))
    length = rng.randrange(5, 40)
    total = int(copies.num_tokens.sum()) + len(copies) * separators.tokens
    concatenated = plan_concatenated(copies, separators, length, total // length)
    whole = plan_whole(copies, separators, length)
    expected = Counter(1000 * i + t for i, n in enumerate(copies.num_tokens.tolist()) for t in range(n))
    found: Counter[int] = Counter()
    for plan in (concatenated, whole):
        sequences, _ = filled(plan, tokens, separators)
        assert {len(s) for s in sequences} == {length}
        found = Counter(t for s in sequences for t in s if t >= 0)
        covered: Counter[int] = Counter()
        for sequence, start, end, row, _, first, last in place_rows(plan.documents):
            ids = list(range(1000 * row + first, 1000 * row + last))
            covered.update(ids)
            assert sequences[sequence][start:end] == ids
        assert found == covered
    assert found == expected  # packing whole leaves nothing out
    stream = [
        t
        for i, n in enumerate(copies.num_tokens.tolist())
        for t in (*separators.before, *range(1000 * i, 1000 * i + n), *separators.after)
    ]
    sequences, _ = filled(concatenated, tokens, separators)
    assert [t for s in sequences for t in s] == stream[: total // length * length]


def test_split_keeps_every_place(tokens: Location) -> None:
    plan = plan_concatenated(copies_of(9, 8, 7, 6, 5), SEPARATORS, 4, 12)
    parts = list(split(plan, 5))
    assert [p.num_sequences for p in parts] == [5, 5, 2]
    assert [s for part in parts for s in filled(part, tokens)[0]] == filled(plan, tokens)[0]


def test_reads_are_joined_and_a_short_shard_is_noticed(tokens: Location, tmp_path: Path) -> None:
    class Counting(TokenReader):
        reads = 0

        def ids(self, shard: str, first: int, count: int) -> np.ndarray:
            Counting.reads += 1
            return super().ids(shard, first, count)

    table = table_of([(f"d{i}", "x", LONGEST) for i in range(60)], [20, 20, 20], str(tokens))
    plan = plan_whole(copies_of(*[500] * 60), Separators(), 3000)
    fill(FilePlan.of(plan, Separators(), table), Counting(tokens), weights=False)
    assert Counting.reads == 3
    for name in ("s0", "s1", "s2"):
        (Location.of(tmp_path) / f"{name}.ids").write_bytes(b"1234")
    with pytest.raises(OSError, match=r"ends at byte"):
        fill(FilePlan.of(plan, Separators(), table), TokenReader(Location.of(tmp_path)), weights=False)


def test_short_samples_fill_what_long_ones_leave_where_these_come_first() -> None:
    copies = copies_of(2, 2, 2, 2, 5, 6, 4)

    def lengths_by_sequence(copies: Copies) -> list[list[int]]:
        plan = plan_whole(copies, Separators(), 8)
        tokens = plan.documents.end - plan.documents.start
        return [tokens[plan.documents.sequence == sequence].tolist() for sequence in range(plan.num_sequences)]

    assert lengths_by_sequence(copies) == [[2, 2, 2, 2], [5], [6], [4]]
    first = long_first(copies, 8)
    assert first.row.tolist() == [4, 5, 0, 1, 2, 3, 6], "half a sequence is not long; their order stays"
    assert lengths_by_sequence(first) == [[5, 2], [6, 2], [2, 2, 4]]


def test_shuffling_moves_whole_sequences(tokens: Location) -> None:
    none = Separators(pad=99)
    plan = plan_whole(copies_of(3, 20, 4, 2, 4), none, 4)
    before = filled(plan, tokens, none)[0]
    after = filled(shuffled(plan, 3), tokens, none)[0]
    assert after != before and sorted(after) == sorted(before)
