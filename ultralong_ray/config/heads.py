"""Which Ulysses degrees the attention heads of a model can take: arithmetic on three integers."""

from __future__ import annotations


def heads_can_split(query_heads: int, kv_heads: int, degree: int) -> bool:
    """Ulysses: every rank holds whole query heads, and KV heads split or repeat evenly."""
    return query_heads % degree == 0 and (kv_heads % degree == 0 or degree % kv_heads == 0)


def heads_message(name: str, query_heads: int, kv_heads: int, degree: int) -> str:
    """The refusal of a Ulysses degree that the heads cannot take, with the degrees that they can."""
    legal = [d for d in range(1, query_heads + 1) if heads_can_split(query_heads, kv_heads, d)]
    return (
        f"{name}.sequence_parallel_degree {degree} cannot split {query_heads} query heads and {kv_heads} key-value "
        f"heads; degrees that can: {', '.join(map(str, legal))}"
    )
