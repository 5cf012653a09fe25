"""Degrees that fit, degrees that are chosen, and refusals in words."""

from __future__ import annotations

from typing import Any

import pytest

from ultralong_ray.config.degrees import DegreeRequest, heads_can_split, legal_degrees, resolve_degrees

LLAMA_8B = (32, 8)


def resolve(workers: int, length: int = 2**22, heads: tuple[int, int] | None = LLAMA_8B, **fields: Any):
    return resolve_degrees(DegreeRequest("pretrain", **{"total": "auto", **fields}), workers, length, heads)


def test_legal_degrees_are_exactly_those_that_pass_every_rule() -> None:
    assert legal_degrees(4, 48, 4, 2) == [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)]
    assert legal_degrees(4, 4, 4, 2) == [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)]  # a ring of 4 needs 8 chunks
    assert legal_degrees(6, 48, 6, 4) == [(1, 1), (1, 2), (2, 1), (1, 3), (1, 6), (2, 3)]  # 3 ranks, 4 KV heads: no
    assert not heads_can_split(6, 4, 3)


@pytest.mark.parametrize("workers", [1, 2, 6, 8, 64, 96])
@pytest.mark.parametrize("length", [48, 1024, 1056])
def test_auto_is_the_largest_legal_product_and_then_ulysses_degree(workers: int, length: int) -> None:
    legal = legal_degrees(workers, length, *LLAMA_8B)
    assert resolve(workers, length) == max(legal, key=lambda pair: (pair[0] * pair[1], pair[0]))


def test_a_ring_begins_where_the_heads_end() -> None:
    assert [resolve(workers) for workers in (1, 8, 32, 128, 256)] == [(1, 1), (8, 1), (32, 1), (32, 4), (32, 8)]
    assert resolve(64, total=16) == (16, 1)
    assert resolve(64, total=16, ring=4) == (4, 4)
    assert resolve(64, ulysses=8) == (8, 8)
    assert resolve(64, ring=2) == (32, 2)
    assert resolve(64, ulysses=4, ring=2) == (4, 2)
    assert resolve(4, heads=(1, 1)) == (1, 4)


def test_a_ring_is_no_way_out_where_documents_are_masked() -> None:
    assert resolve(64, mask_documents=True) == (32, 1)
    with pytest.raises(ValueError, match=r"documents cannot be masked with ring_degree 2.*1, 2, 4, 8, 16, 32"):
        resolve(64, total=64, mask_documents=True)


def test_unknown_heads_pass_until_they_are_known() -> None:
    assert resolve(64, heads=None) == (64, 1)


@pytest.mark.parametrize(
    ("workers", "length", "fields", "words"),
    [
        (6, 48, {"total": 4}, "cluster.num_workers 6 is not a multiple of pretrain.sequence_parallel_degree 4"),
        (6, 48, {"ulysses": 4}, "cluster.num_workers 6 is not a multiple of pretrain.ulysses_degree 4"),
        (
            8,
            48,
            {"total": 8, "ulysses": 2, "ring": 2},
            "pretrain.ulysses_degree 2 x pretrain.ring_degree 2 does not multiply to "
            "pretrain.sequence_parallel_degree 8",
        ),
        (64, 2**22, {"ulysses": 64}, "pretrain.ulysses_degree 64 cannot split 32 query heads and 8 key-value heads"),
        (2, 4095, {"total": 2}, "4095 is not divisible by pretrain.sequence_parallel_degree 2; .* 4094 and 4096"),
        (2, 4094, {"total": 2, "ring": 2}, "4094 is divisible by .* no multiple of 4; .*: 4092 and 4096"),
    ],
)
def test_refusals_name_fields_values_and_remedies(workers: int, length: int, fields: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        resolve(workers, length, **fields)
