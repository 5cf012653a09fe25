"""Document copies in, places in sequences of exactly `sequence_length` tokens out. Pure, on columns.

concatenate   one stream  [before] doc [after] [before] doc [after] ...  cut every sequence_length tokens: documents
              and even separators continue in the next sequence, nothing is padded (Fu et al., arXiv 2402.10171)
whole         each [before] doc [after] goes to the fullest sequence that still has room (best fit); only an item
              longer than a sequence is cut; the rest of a sequence is padding with loss weight 0. For training, the
              sequences are then shuffled: a book would otherwise fill many steps in a row

An *item* is a copy with its separators. Items are cut into *pieces*, tokens [low, high) of an item from position
`start` of a sequence on, and pieces fall apart into the places of documents and of separators.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.data.sample import Copies

IntColumn = NDArray[np.int64]
BEGINNINGS = 16


@dataclass(frozen=True, slots=True)
class Separators:
    """Ids before and after every document, and the id of padding."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    pad: int = 0

    @property
    def tokens(self) -> int:
        return len(self.before) + len(self.after)


@dataclass(frozen=True, slots=True)
class _Places:
    """Columns of equal length, ordered by (sequence, start)."""

    sequence: IntColumn
    start: IntColumn
    end: IntColumn

    def __len__(self) -> int:
        return len(self.sequence)

    def take(self, which: IntColumn | slice | NDArray[np.bool_]):
        return type(self)(*(getattr(self, f.name)[which] for f in fields(self)))

    def between(self, first: int, end: int):
        """The places in sequences [first, end)."""
        low, high = np.searchsorted(self.sequence, [first, end])
        return self.take(slice(int(low), int(high)))


@dataclass(frozen=True, slots=True)
class DocumentPlaces(_Places):
    """Tokens [document_start, document_end) of a copy of document `row` stand at [start, end) of a sequence."""

    row: IntColumn
    copy: NDArray[np.int32]
    document_start: IntColumn
    document_end: IntColumn


@dataclass(frozen=True, slots=True)
class SeparatorPlaces(_Places):
    """Ids [offset, offset + end - start) of the `before` or `after` separator stand at [start, end) of a sequence."""

    before: NDArray[np.bool_]
    offset: IntColumn


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Where everything stands. Positions that neither names are padding."""

    sequence_length: int
    num_sequences: int
    documents: DocumentPlaces
    separators: SeparatorPlaces


@dataclass(frozen=True, slots=True)
class _Pieces:
    item: IntColumn  # index into the copies; one beyond them is a `before` separator without a document
    low: IntColumn
    high: IntColumn
    sequence: IntColumn
    start: IntColumn


def plan_concatenated(copies: Copies, separators: Separators, sequence_length: int, num_sequences: int) -> PackPlan:
    """One stream of the copies in their order, cut every `sequence_length` tokens.

    A copy that would share a sequence with the end of an earlier copy of its document waits for a later sequence
    (`copies_apart`). The stream may end with the start of a `before` separator whose
    document is cut off whole. Raises ValueError when it is shorter than the sequences by more than that.
    """
    copies = copies.take(copies_apart(copies, separators.tokens, sequence_length))
    total = sequence_length * num_sequences
    ends = np.cumsum(copies.num_tokens + separators.tokens)
    position = int(ends[-1]) if len(ends) else 0
    if position + len(separators.before) < total:
        raise ValueError(f"the stream has {position} tokens, {num_sequences} x {sequence_length} are to be filled")
    if position < total:
        ends = np.append(ends, position + len(separators.before))
    starts = np.concatenate([[0], ends[:-1]])
    ends = np.minimum(ends, total)
    item = np.flatnonzero(starts < ends)
    first, last = starts[item] // sequence_length, (ends[item] - 1) // sequence_length
    count = last - first + 1
    item = np.repeat(item, count)
    sequence = np.repeat(first, count) + np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
    low = np.maximum(starts[item], sequence * sequence_length)
    high = np.minimum(ends[item], (sequence + 1) * sequence_length)
    pieces = _Pieces(item, low - starts[item], high - starts[item], sequence, low - sequence * sequence_length)
    return _plan(pieces, copies, separators, sequence_length, num_sequences)


def copies_apart(copies: Copies, separator_tokens: int, sequence_length: int) -> IntColumn:
    """The order of the copies in the stream: each held back until its document's earlier copy lies in an earlier
    sequence. int64 [copies].

    Copies that still wait when the stream ends would share its last sequence. Then the stream is tried with other
    beginnings, and the first order that keeps all apart is taken, else that of the first try.
    """
    found = np.arange(len(copies))
    lengths = copies.num_tokens + separator_tokens
    if _are_apart(copies.row, lengths, sequence_length):
        return found
    for begin in range(BEGINNINGS):
        turned = np.roll(np.arange(len(copies)), -(begin * len(copies) // BEGINNINGS))
        order = turned[_held_back(copies.row[turned], lengths[turned], sequence_length)]
        if _are_apart(copies.row[order], lengths[order], sequence_length):
            return order
        found = order if begin == 0 else found
    return found


def _held_back(rows: IntColumn, lengths: IntColumn, sequence_length: int) -> IntColumn:
    several, counts = np.unique(rows, return_counts=True)
    repeated = np.isin(rows, several[counts > 1])
    waiting = _Waiting(rows.tolist(), lengths.tolist(), sequence_length)
    for index, matters in enumerate(repeated.tolist()):
        waiting.add(index, matters)
    return np.array(waiting.finish(), np.int64)


def _are_apart(rows: IntColumn, lengths: IntColumn, sequence_length: int) -> bool:
    """Whether in the order given no two copies of a document share a sequence."""
    ends = np.cumsum(lengths)
    first, last = (ends - lengths) // sequence_length, (ends - 1) // sequence_length
    order = np.argsort(rows, kind="stable")
    same = rows[order][1:] == rows[order][:-1]
    return not bool((same & (first[order][1:] <= last[order][:-1])).any())


class _Waiting:
    """The stream as it grows, and the copies that wait: asleep until a sequence begins, then ready in their order."""

    def __init__(self, rows: list[int], lengths: list[int], sequence_length: int) -> None:
        self.rows, self.lengths, self.sequence_length = rows, lengths, sequence_length
        self.order: list[int] = []
        self.position = 0
        self.last_sequence: dict[int, int] = {}  # where the last copy of a document ends
        self.asleep: list[tuple[int, int]] = []  # heap of (sequence at which it may be placed, index)
        self.ready: list[int] = []  # heap of indices
        self.all_waiting: list[int] = []  # heap of indices, placed ones among them
        self.placed: set[int] = set()  # of those that have waited

    def add(self, index: int, matters: bool) -> None:
        """Place what may be placed now, then this copy or have it wait. `matters`: its document has other copies."""
        while (released := self._next_ready()) is not None:
            self._place(released, matters=True)
        if matters and not self._is_free(index):
            self._sleep(index)
        else:
            self._place(index, matters)

    def finish(self) -> list[int]:
        """The order of all copies; those that no later sequence comes for stand last, as they came."""
        while True:
            released = self._next_ready()
            while released is None and self.all_waiting:
                index = heapq.heappop(self.all_waiting)
                released = None if index in self.placed else index
            if released is None:
                return self.order
            self._place(released, matters=True)

    def _is_free(self, index: int) -> bool:
        return self.last_sequence.get(self.rows[index], -1) < self.position // self.sequence_length

    def _sleep(self, index: int) -> None:
        heapq.heappush(self.asleep, (self.last_sequence[self.rows[index]] + 1, index))
        heapq.heappush(self.all_waiting, index)

    def _next_ready(self) -> int | None:
        sequence = self.position // self.sequence_length
        while self.asleep and self.asleep[0][0] <= sequence:
            heapq.heappush(self.ready, heapq.heappop(self.asleep)[1])
        while self.ready:
            index = heapq.heappop(self.ready)
            if index in self.placed:
                continue
            if self._is_free(index):
                return index
            self._sleep(index)  # another copy of its document was released before it
        return None

    def _place(self, index: int, matters: bool) -> None:
        self.order.append(index)
        if matters:
            self.placed.add(index)
            self.last_sequence[self.rows[index]] = (self.position + self.lengths[index] - 1) // self.sequence_length
        self.position += self.lengths[index]


def long_first(copies: Copies, sequence_length: int) -> Copies:
    """Copies of more than half a sequence, of which no two share one, before the others; otherwise in their order."""
    return copies.take(np.argsort(2 * copies.num_tokens <= sequence_length, kind="stable"))


def plan_whole(
    copies: Copies, separators: Separators, sequence_length: int, max_sequences: int | None = None
) -> PackPlan:
    """Best fit in the order given, not beside another copy of the same document where there is other room.

    With `max_sequences`, it ends at the first copy that does not fit any more.
    """
    pieces: list[tuple[int, int, int, int, int]] = []  # as in _Pieces
    num_sequences, limit = 0, math.inf if max_sequences is None else max_sequences
    holding: dict[int, set[int]] = {}  # document -> sequences with the rest of one of its copies
    rooms: list[tuple[int, int]] = []  # (free tokens, -sequence) ascending: the tightest room, then the latest sequence
    for item, length in enumerate((copies.num_tokens + separators.tokens).tolist()):
        whole, rest = divmod(length, sequence_length)
        tightest = bisect_left(rooms, (rest, -num_sequences)) if rest else len(rooms)
        beside = holding.setdefault(int(copies.row[item]), set())
        apart = next((n for n in range(tightest, len(rooms)) if -rooms[n][1] not in beside), len(rooms))
        allowed = (n for n in (apart, tightest) if num_sequences + whole + bool(rest and n == len(rooms)) <= limit)
        fit = next(allowed, None)
        if fit is None:
            break
        for piece in range(whole):
            pieces.append((item, piece * sequence_length, (piece + 1) * sequence_length, num_sequences, 0))
            num_sequences += 1
        if rest:
            if fit < len(rooms):
                room, negative = rooms.pop(fit)
                sequence = -negative
            else:
                room, sequence = sequence_length, num_sequences
                num_sequences += 1
            pieces.append((item, length - rest, length, sequence, sequence_length - room))
            beside.add(sequence)
            if room > rest:
                insort(rooms, (room - rest, -sequence))
    columns = np.array(pieces, np.int64).reshape(-1, 5)
    return _plan(_Pieces(*columns.T), copies, separators, sequence_length, num_sequences)


def _plan(
    pieces: _Pieces, copies: Copies, separators: Separators, sequence_length: int, num_sequences: int
) -> PackPlan:
    """Pieces of items as places of documents and of separators."""
    order = np.lexsort((pieces.start, pieces.sequence))
    pieces = _Pieces(*(getattr(pieces, f.name)[order] for f in fields(_Pieces)))
    num_before, num_after = len(separators.before), len(separators.after)
    tokens = np.append(copies.num_tokens, 0)[pieces.item]

    def part(first: IntColumn, last: IntColumn) -> tuple[IntColumn, IntColumn, IntColumn, IntColumn]:
        """Which pieces hold some of tokens [first, last) of their item, and (start, end, offset from first) of it."""
        low, high = np.maximum(first, pieces.low), np.minimum(last, pieces.high)
        which = np.flatnonzero(low < high)
        start = (low - pieces.low + pieces.start)[which]
        return which, start, start + (high - low)[which], (low - first)[which]

    zero = np.zeros(len(tokens), np.int64)
    which, start, end, offset = part(zero + num_before, num_before + tokens)
    item = pieces.item[which]
    documents = DocumentPlaces(
        pieces.sequence[which], start, end, copies.row[item], copies.copy[item], offset, offset + end - start
    )
    before = part(zero, zero + num_before)
    after = part(num_before + tokens, num_before + tokens + num_after)
    which, start, end, offset = (np.concatenate(columns) for columns in zip(before, after, strict=True))
    is_before = np.arange(len(which)) < len(before[0])
    places = SeparatorPlaces(pieces.sequence[which], start, end, is_before, offset)
    return PackPlan(sequence_length, num_sequences, documents, places.take(np.lexsort((places.start, places.sequence))))


def shuffled(plan: PackPlan, seed: int) -> PackPlan:
    """The same sequences in an order drawn from `seed`: one document's many sequences no longer follow each other."""
    place = np.random.default_rng([seed, plan.num_sequences]).permutation(plan.num_sequences)
    documents, separators = _moved(plan.documents, place), _moved(plan.separators, place)
    return PackPlan(plan.sequence_length, plan.num_sequences, documents, separators)


def _moved(places, place: IntColumn):
    values = {f.name: getattr(places, f.name) for f in fields(places)}
    moved = type(places)(**{**values, "sequence": place[values["sequence"]]})
    return moved.take(np.lexsort((moved.start, moved.sequence)))


def split(plan: PackPlan, sequences: int) -> Iterator[PackPlan]:
    """Plans of `sequences` sequences each (the last may have fewer), each counting its own from 0."""
    for first in range(0, plan.num_sequences, sequences):
        count = min(sequences, plan.num_sequences - first)
        documents = plan.documents.between(first, first + count)
        separators = plan.separators.between(first, first + count)
        yield PackPlan(plan.sequence_length, count, _counted_from(documents, first), _counted_from(separators, first))


def _counted_from(places, first: int):
    values = {f.name: getattr(places, f.name) for f in fields(places)}
    return type(places)(**{**values, "sequence": values["sequence"] - first})
