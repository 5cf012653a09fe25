"""The plan of one packed file in, its token ids and loss weights out.

Documents stand in the order of a hash, so their tokens lie all over the token shards. The reads of a file are sorted by
shard and offset, near ones are joined, and several are under way at a time: an object store answers one request in
tens of milliseconds, however small it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.data.pack import PackPlan, Separators
from ultralong_ray.data.token_shards import DocumentTable, TokenReader
from ultralong_ray.types import ByteArray, IntArray

READ_THREADS = 8
JOIN_GAP_TOKENS = 2**14  # 64 KiB are fetched sooner than a second request is answered
JOIN_MOST_TOKENS = 2**22


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A part of the plan, and where the tokens of its documents lie: tokens from `first[i]` on of `shard[i]`."""

    plan: PackPlan
    separators: Separators
    shards: tuple[str, ...]
    weighted: tuple[bool, ...]  # [shards]
    shard: NDArray[np.int32]  # [places]
    first: NDArray[np.int64]  # [places]

    @staticmethod
    def of(plan: PackPlan, separators: Separators, table: DocumentTable) -> FilePlan:
        rows = plan.documents.row
        used, shard = np.unique(table.shard_of(rows), return_inverse=True)
        return FilePlan(
            plan,
            separators,
            tuple(table.shards[s] for s in used.tolist()),
            tuple(table.weighted[s] for s in used.tolist()),
            shard.astype(np.int32),
            table.offset[rows] + plan.documents.document_start,
        )


def fill(
    item: FilePlan, reader: TokenReader, *, weights: bool, separator_weight: int = 1
) -> tuple[IntArray, ByteArray | None]:
    """Token ids and, with `weights`, the weight of every token as a target: int32 and uint8 [sequences, length]."""
    plan = item.plan
    shape = (plan.num_sequences, plan.sequence_length)
    ids = np.full(shape, item.separators.pad, np.int32)
    weight = np.zeros(shape, np.uint8) if weights else None
    _fill_separators(item, ids.reshape(-1), None if weight is None else weight.reshape(-1), separator_weight)
    start = (plan.documents.sequence * plan.sequence_length + plan.documents.start).tolist()
    count = (plan.documents.end - plan.documents.start).tolist()
    first, shard = item.first.tolist(), item.shard.tolist()
    flat = ids.reshape(-1)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        reads = list(_reads(item))

        def read(group: list[int]) -> tuple[int, IntArray, ByteArray | None]:
            name, low = item.shards[shard[group[0]]], first[group[0]]
            tokens = max(first[i] + count[i] for i in group) - low
            weighted = weights and item.weighted[shard[group[0]]]
            return low, reader.ids(name, low, tokens), reader.weights(name, low, tokens) if weighted else None

        for group, (low, found, found_weight) in zip(reads, pool.map(read, reads), strict=True):
            for i in group:
                at = first[i] - low
                flat[start[i] : start[i] + count[i]] = found[at : at + count[i]]
                if weight is not None:
                    part = 1 if found_weight is None else found_weight[at : at + count[i]]
                    weight.reshape(-1)[start[i] : start[i] + count[i]] = part
    return ids, weight


def _reads(item: FilePlan) -> Iterator[list[int]]:
    """Places grouped so that one read of one shard serves each group."""
    documents = item.plan.documents
    end = item.first + documents.end - documents.start
    group: list[int] = []
    low = reach = shard = -1
    order = np.lexsort((item.first, item.shard)).tolist()
    firsts, ends, shards = item.first.tolist(), end.tolist(), item.shard.tolist()
    for i in order:
        apart = shards[i] != shard or firsts[i] > reach + JOIN_GAP_TOKENS or ends[i] - low > JOIN_MOST_TOKENS
        if group and apart:
            yield group
            group = []
        if not group:
            low, reach, shard = firsts[i], ends[i], shards[i]
        group.append(i)
        reach = max(reach, ends[i])
    if group:
        yield group


def _fill_separators(item: FilePlan, ids: IntArray, weight: ByteArray | None, separator_weight: int) -> None:
    places = item.plan.separators
    start = places.sequence * item.plan.sequence_length + places.start
    for is_before, values in ((True, item.separators.before), (False, item.separators.after)):
        for offset, value in enumerate(values):
            holds = (places.before == is_before) & (places.offset <= offset)
            holds &= offset < places.offset + places.end - places.start
            at = start[holds] + offset - places.offset[holds]
            ids[at] = value
            if weight is not None:
                weight[at] = separator_weight
