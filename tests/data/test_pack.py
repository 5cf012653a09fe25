"""Packing: literal small cases, then every token exactly once in random ones."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from ultralong_ray.data.pack import PackPlan, Separators, fill, plan_concatenated, plan_whole
from ultralong_ray.types import ByteArray, IntArray, Placement, SampledDocument

SEPARATORS = Separators(before=(7,), after=(8, 9), pad=99)


def copies_of(*lengths: int) -> list[SampledDocument]:
    return [SampledDocument(f"d{i}", "x", 0, n) for i, n in enumerate(lengths)]


def tokens(placement: Placement) -> tuple[IntArray, ByteArray | None]:
    """Document i holds 1000 * i, 1000 * i + 1, ...; its even tokens have weight 5, the others 0."""
    ids = 1000 * int(placement.id[1:]) + np.arange(placement.document_start, placement.document_end, dtype=np.int32)
    return ids, np.where(ids % 2 == 0, 5, 0).astype(np.uint8)


def packed(plan: PackPlan, separators: Separators = SEPARATORS) -> list[list[int]]:
    return [s.input_ids.tolist() for s in fill(plan, tokens, separators, weights=False)]


def test_concatenated_literal() -> None:
    plan = plan_concatenated(copies_of(3, 4), SEPARATORS, 6, 2)
    assert packed(plan) == [[7, 0, 1, 2, 8, 9], [7, 1000, 1001, 1002, 1003, 8]]


def test_documents_and_separators_continue_in_the_next_sequence() -> None:
    plan = plan_concatenated(copies_of(2, 7), SEPARATORS, 4, 3)
    assert packed(plan) == [[7, 0, 1, 8], [9, 7, 1000, 1001], [1002, 1003, 1004, 1005]]
    assert plan.placements == [
        Placement(0, 1, 3, "d0", "x", 0, 0, 2),
        Placement(1, 2, 4, "d1", "x", 0, 0, 2),
        Placement(2, 0, 4, "d1", "x", 0, 2, 6),
    ]


def test_weights_of_documents_separators_and_padding() -> None:
    plan = plan_whole(copies_of(3), SEPARATORS, 8)
    (sequence,) = fill(plan, tokens, SEPARATORS, weights=True)
    assert sequence.loss_weight is not None
    assert sequence.loss_weight.tolist() == [1, 5, 0, 5, 1, 1, 0, 0]
    (sequence,) = fill(plan, lambda p: (tokens(p)[0], None), SEPARATORS, weights=True, separator_weight=0)
    assert sequence.loss_weight is not None
    assert sequence.loss_weight.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]


def test_stream_may_end_in_the_start_of_a_separator_and_no_earlier() -> None:
    assert packed(plan_concatenated(copies_of(2), SEPARATORS, 6, 1)) == [[7, 0, 1, 8, 9, 7]]
    with pytest.raises(ValueError, match="the stream has 5 tokens"):
        plan_concatenated(copies_of(2), SEPARATORS, 7, 1)


def test_whole_takes_the_tightest_room() -> None:
    none = Separators(pad=99)
    plan = plan_whole(copies_of(6, 5, 3, 4), none, 8)
    # 3 fits both rooms (2 is too small, 3 is exact): it goes behind the 5
    assert packed(plan, none)[1] == [1000, 1001, 1002, 1003, 1004, 2000, 2001, 2002]
    assert packed(plan, none)[2] == [3000, 3001, 3002, 3003, 99, 99, 99, 99]


def test_whole_cuts_only_what_is_longer_than_a_sequence() -> None:
    none = Separators(pad=99)
    plan = plan_whole(copies_of(3, 10), none, 4)
    assert packed(plan, none) == [
        [0, 1, 2, 99],
        [1000, 1001, 1002, 1003],
        [1004, 1005, 1006, 1007],
        [1008, 1009, 99, 99],
    ]


def test_copies_of_a_document_do_not_meet_in_a_sequence() -> None:
    long = [SampledDocument("d0", "x", 0, 5), SampledDocument("d0", "x", 1, 5)]
    copies = [long[0], long[1], *(SampledDocument(f"d{i}", "x", 0, 5) for i in range(1, 5))]
    plan = plan_concatenated(copies, Separators(), 10, 3)
    assert [(p.sequence, p.id, p.copy) for p in plan.placements if p.id == "d0"] == [(0, "d0", 0), (1, "d0", 1)]
    assert sum(p.end - p.start for p in plan.placements) == 30


@pytest.mark.parametrize("seed", range(20))
def test_every_token_once_where_the_placements_say(seed: int) -> None:
    rng = random.Random(seed)
    separators = Separators(tuple(range(-rng.randrange(3), 0)), tuple(range(-9, -9 + rng.randrange(4))), -100)
    copies = copies_of(*(rng.randrange(1, 60) for _ in range(50)))
    length = rng.randrange(5, 40)
    total = sum(c.num_tokens + separators.tokens for c in copies)
    concatenated = plan_concatenated(copies, separators, length, total // length)
    whole = plan_whole(copies, separators, length)
    expected = Counter(t for c in copies for t in range(1000 * int(c.id[1:]), 1000 * int(c.id[1:]) + c.num_tokens))
    for plan in (concatenated, whole):
        sequences = packed(plan, separators)
        assert {len(s) for s in sequences} == {length}
        found = Counter(t for s in sequences for t in s if t >= 0)
        covered: Counter[int] = Counter()
        for place in plan.placements:
            covered.update(tokens(place)[0].tolist())
            assert sequences[place.sequence][place.start : place.end] == tokens(place)[0].tolist()
        assert found == covered
    assert found == expected  # packing whole leaves nothing out
    stream = [t for c in copies for t in (*separators.before, *tokens_of(c), *separators.after)]
    assert [t for s in packed(concatenated, separators) for t in s] == stream[: total // length * length]


def tokens_of(copy: SampledDocument) -> list[int]:
    return tokens(Placement(0, 0, 0, copy.id, "x", 0, 0, copy.num_tokens))[0].tolist()


def test_split_keeps_every_place() -> None:
    plan = plan_concatenated(copies_of(9, 8, 7, 6, 5), SEPARATORS, 4, 12)
    parts = list(plan.split(5))
    assert [p.num_sequences for p in parts] == [5, 5, 2]
    assert [s for part in parts for s in packed(part)] == packed(plan)
