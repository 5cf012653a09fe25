"""Which sequence-parallel degrees fit workers, a sequence length and a model's heads: arithmetic on integers.

Degrees come as the pair (ulysses, ring). The ranks of a Ulysses group split the attention heads, so the heads bound
them (arXiv 2309.14509). The ranks of a ring pass keys and values around and take any number, but causal balance cuts
the sequence into two chunks for each of them (the zigzag of ring-flash-attention).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

Degrees = tuple[int, int]
Heads = tuple[int, int]


@dataclass(frozen=True, slots=True)
class DegreeRequest:
    """What a training section asks for. `name` is the section, for messages; `total` is ulysses x ring."""

    name: str
    total: int | Literal["auto"]
    ulysses: int | Literal["auto"] = "auto"
    ring: int | Literal["auto"] = "auto"
    mask_documents: bool = False


def model_heads(shape: dict[str, Any]) -> Heads:
    """(query, key-value) heads that a Hugging Face config.json states."""
    heads = shape["num_attention_heads"]
    return heads, shape.get("num_key_value_heads") or heads


def heads_can_split(query_heads: int, kv_heads: int, ulysses: int) -> bool:
    """Every Ulysses rank holds whole query heads, and key-value heads split or repeat evenly."""
    return query_heads % ulysses == 0 and (kv_heads % ulysses == 0 or ulysses % kv_heads == 0)


def length_unit(ulysses: int, ring: int) -> int:
    """Sequence lengths must be multiples of this: ring ranks take two chunks each, Ulysses ranks share them evenly."""
    return ulysses if ring == 1 else ring * math.lcm(2, ulysses)


def length_objection(sequence_length: int, ulysses: int, ring: int, degree_words: str | None = None) -> str | None:
    """Why these degrees cannot split `sequence_length` tokens, with the nearest lengths they can; None: they can.

    `degree_words` says how the user named the degrees.
    """
    unit = length_unit(ulysses, ring)
    if sequence_length % unit == 0:
        return None
    words = degree_words or f"ulysses_degree {ulysses} x ring_degree {ring}"
    below = sequence_length // unit * unit
    nearest = f"{below} and {below + unit}" if below else f"{unit}"
    if sequence_length % (ulysses * ring):
        return f"sequence length {sequence_length} is not divisible by {words}; the nearest lengths that are: {nearest}"
    return (
        f"sequence length {sequence_length} is divisible by {words}, but causal balance gives each rank of "
        f"ring_degree {ring} two equal chunks and {sequence_length} is no multiple of {unit}; the nearest lengths "
        f"that are: {nearest}"
    )


def legal_degrees(num_workers: int, sequence_length: int, query_heads: int, kv_heads: int) -> list[Degrees]:
    """All (ulysses, ring) whose product divides the workers, by product, then by Ulysses degree."""
    pairs = [(ulysses, total // ulysses) for total in _divisors(num_workers) for ulysses in _divisors(total)]
    return [
        (ulysses, ring)
        for ulysses, ring in pairs
        if heads_can_split(query_heads, kv_heads, ulysses) and sequence_length % length_unit(ulysses, ring) == 0
    ]


def resolve_degrees(
    request: DegreeRequest, num_workers: int, sequence_length: int, heads: Heads | None = None
) -> Degrees:
    """(ulysses, ring) for a request: the largest product that is legal, and the largest Ulysses degree within it.

    Ulysses first, since one all-to-all moves less than a ring does. `heads` are (query, key-value); None: not known
    yet, any Ulysses degree passes. Raises ValueError that names the fields, what they do not fit, and what would fit.
    """
    pairs = _asked_for(request, num_workers)
    objections: list[tuple[int, str]] = []
    for pair in pairs:
        objection = _objection(request, pair, sequence_length, heads)
        if objection is None:
            return pair
        objections.append(objection)
    furthest = max(stage for stage, _ in objections)
    raise ValueError(next(words for stage, words in objections if stage == furthest))


def refuse_batch(name: str, global_batch_sequences: int, micro_batch_sequences: int, groups: int) -> None:
    """Raise ValueError unless the sequence-parallel groups can share a step's sequences evenly."""
    per_pass = groups * micro_batch_sequences
    if global_batch_sequences % per_pass:
        raise ValueError(
            f"{name}.global_batch_sequences {global_batch_sequences} is not a multiple of {per_pass} "
            f"({groups} sequence-parallel groups x {name}.micro_batch_sequences {micro_batch_sequences})"
        )


def _asked_for(request: DegreeRequest, num_workers: int) -> list[Degrees]:
    """Pairs that say what the request says and form whole groups, best first. Raises ValueError when none does."""
    name, total = request.name, request.total
    if total != "auto" and num_workers % total:
        raise ValueError(
            f"cluster.num_workers {num_workers} is not a multiple of {name}.sequence_parallel_degree {total}"
        )
    pairs = [
        (ulysses, group // ulysses)
        for group in ([total] if total != "auto" else reversed(_divisors(num_workers)))
        for ulysses in reversed(_divisors(group))
        if request.ulysses in ("auto", ulysses) and request.ring in ("auto", group // ulysses)
    ]
    if pairs:
        return pairs
    fields = (("ulysses_degree", request.ulysses), ("ring_degree", request.ring))
    given = " x ".join(f"{name}.{field} {value}" for field, value in fields if value != "auto")
    if total == "auto":
        raise ValueError(f"cluster.num_workers {num_workers} is not a multiple of {given}")
    raise ValueError(
        f'{given} does not multiply to {name}.sequence_parallel_degree {total}; leave one of them out or at "auto"'
    )


def _objection(
    request: DegreeRequest, pair: Degrees, sequence_length: int, heads: Heads | None
) -> tuple[int, str] | None:
    """(how far the pair came, what stopped it); None where it is legal."""
    name, (ulysses, ring) = request.name, pair
    if heads is not None and not heads_can_split(*heads, ulysses):
        return 0, f"{name}.ulysses_degree {ulysses} cannot split {_heads_words(heads)}; ring_degree takes any number"
    if request.mask_documents and ring > 1:
        bound = "" if heads is None else f", which splits {_heads_words(heads)}"
        return 1, (
            f"{name}: documents cannot be masked with ring_degree {ring}; use ulysses_degree{bound} "
            f"(or set {name}.mask_documents to false)"
        )
    plain = request.total != "auto" and request.ulysses == request.ring == "auto" and ring == 1
    objection = length_objection(
        sequence_length, ulysses, ring, f"{name}.sequence_parallel_degree {ulysses}" if plain else None
    )
    return None if objection is None else (2, f"{name}: {objection}")


def _heads_words(heads: Heads) -> str:
    query_heads, kv_heads = heads
    legal = [d for d in range(1, query_heads + 1) if heads_can_split(query_heads, kv_heads, d)]
    return f"{query_heads} query heads and {kv_heads} key-value heads; degrees that can: {', '.join(map(str, legal))}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
