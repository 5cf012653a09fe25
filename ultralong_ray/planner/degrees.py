"""Which ways a group of ranks can share one sequence: pairs of integers, and the words when a given one cannot be."""

from __future__ import annotations

from ultralong_ray.config.heads import heads_can_split


def legal_degrees(
    num_workers: int, sequence_length: int, query_heads: int, kv_heads: int, mask_documents: bool
) -> list[tuple[int, int]]:
    """(Ulysses degree, ring degree), larger groups first, in a group the larger Ulysses degree first.

    A group divides the workers. Ulysses splits the heads; a ring cuts a sequence into two chunks per rank, and its
    ranks' rows evenly over their Ulysses group. Documents are masked only without a ring.
    """
    pairs = []
    for degree in (d for d in range(num_workers, 0, -1) if num_workers % d == 0 and sequence_length % d == 0):
        for ulysses in (u for u in range(min(degree, query_heads), 0, -1) if degree % u == 0):
            ring = degree // ulysses
            if ring > 1 and (mask_documents or sequence_length % (2 * ring)):
                continue
            if heads_can_split(query_heads, kv_heads, ulysses):
                pairs.append((ulysses, ring))
    return pairs
