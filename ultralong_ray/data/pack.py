"""Document copies in, places in sequences of exactly `sequence_length` tokens out; then the tokens put there. Pure.

concatenate   one stream  [before] doc [after] [before] doc [after] ...  cut every sequence_length tokens: documents
              and even separators continue in the next sequence, nothing is padded (Fu et al., arXiv 2402.10171)
whole         each [before] doc [after] goes to the fullest sequence that still has room (best fit); only an item
              longer than a sequence is cut; the rest of a sequence is padding with loss weight 0
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from ultralong_ray.types import ByteArray, IntArray, PackedSequence, Placement, SampledDocument

TokenSource = Callable[[Placement], tuple[IntArray, ByteArray | None]]


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
class SeparatorPlace:
    """Ids [offset, offset + end - start) of the `before` or `after` separator stand at [start, end) of a sequence."""

    sequence: int
    start: int
    end: int
    before: bool
    offset: int


Placed = TypeVar("Placed", Placement, SeparatorPlace)


@dataclass(slots=True)
class PackPlan:
    """Where everything stands. Positions that neither list names are padding."""

    sequence_length: int
    num_sequences: int = 0
    placements: list[Placement] = field(default_factory=list)
    separators: list[SeparatorPlace] = field(default_factory=list)

    def add_item(
        self, copy: SampledDocument, separators: Separators, item: tuple[int, int], sequence: int, start: int
    ) -> None:
        """Place tokens [item[0], item[1]) of `before + document + after` from position `start` of a sequence on."""
        shift = start - item[0]
        document_start = len(separators.before)
        document_end = document_start + copy.num_tokens
        spans = ((0, document_start, True), (document_end, document_end + len(separators.after), False))
        for first, last, before in spans:
            low, high = max(first, item[0]), min(last, item[1])
            if low < high:
                self.separators.append(SeparatorPlace(sequence, low + shift, high + shift, before, low - first))
        low, high = max(document_start, item[0]), min(document_end, item[1])
        if low < high:
            place = (sequence, low + shift, high + shift)
            cut = (low - document_start, high - document_start)
            self.placements.append(Placement(*place, copy.id, copy.domain, copy.copy, *cut))

    def split(self, sequences: int) -> Iterator[PackPlan]:
        """Plans of `sequences` sequences each (the last may have fewer), each counting its own from 0."""
        placements, separators = _by_sequence(self.placements), _by_sequence(self.separators)
        for first in range(0, self.num_sequences, sequences):
            part = PackPlan(self.sequence_length, min(sequences, self.num_sequences - first))
            for i in range(part.num_sequences):
                part.placements += [replace(p, sequence=i) for p in placements.get(first + i, [])]
                part.separators += [replace(p, sequence=i) for p in separators.get(first + i, [])]
            yield part


def plan_concatenated(
    copies: Iterable[SampledDocument], separators: Separators, sequence_length: int, num_sequences: int
) -> PackPlan:
    """One stream of the copies in their order, cut every `sequence_length` tokens.

    A copy that would share a sequence with the end of an earlier copy of its document waits for a later sequence; it
    is placed last when no later sequence comes. The stream may end with the start of a `before` separator whose
    document is cut off whole. Raises ValueError when it is shorter than the sequences by more than that.
    """
    plan = PackPlan(sequence_length, num_sequences)
    total, position = sequence_length * num_sequences, 0
    for copy in _copies_apart(copies, separators.tokens, sequence_length):
        length = min(copy.num_tokens + separators.tokens, total - position)
        taken = 0
        while taken < length:
            sequence, start = divmod(position, sequence_length)
            step = min(length - taken, sequence_length - start)
            plan.add_item(copy, separators, (taken, taken + step), sequence, start)
            taken += step
            position += step
    if 0 < total - position <= len(separators.before):
        start = sequence_length - (total - position)
        plan.separators.append(SeparatorPlace(num_sequences - 1, start, sequence_length, before=True, offset=0))
    elif position < total:
        raise ValueError(f"the stream has {position} tokens, {num_sequences} x {sequence_length} are to be filled")
    return plan


def _copies_apart(
    copies: Iterable[SampledDocument], separator_tokens: int, sequence_length: int
) -> Iterator[SampledDocument]:
    """The copies in order, each held back until its document's earlier copy lies in an earlier sequence."""
    position = 0
    last_sequence: dict[str, int] = {}  # where the last copy of a document ends
    waiting: list[SampledDocument] = []

    def free(copy: SampledDocument) -> bool:
        return last_sequence.get(copy.id, -1) < position // sequence_length

    def place(copy: SampledDocument) -> SampledDocument:
        nonlocal position
        last_sequence[copy.id] = (position + copy.num_tokens + separator_tokens - 1) // sequence_length
        position += copy.num_tokens + separator_tokens
        return copy

    for copy in copies:
        while released := next((w for w in waiting if free(w)), None):
            waiting.remove(released)
            yield place(released)
        if free(copy):
            yield place(copy)
        else:
            waiting.append(copy)
    while waiting:
        released = next((w for w in waiting if free(w)), waiting[0])
        waiting.remove(released)
        yield place(released)


def plan_whole(
    copies: Sequence[SampledDocument],
    separators: Separators,
    sequence_length: int,
    max_sequences: int | None = None,
) -> PackPlan:
    """Best fit in the order given. With `max_sequences`, it ends at the first copy that does not fit any more."""
    plan = PackPlan(sequence_length)
    rooms: list[tuple[int, int]] = []  # (free tokens, -sequence) ascending: the tightest room, then the latest sequence
    for copy in copies:
        length = copy.num_tokens + separators.tokens
        pieces, rest = divmod(length, sequence_length)
        fit = bisect_left(rooms, (rest, -plan.num_sequences)) if rest else len(rooms)
        opened = pieces + (1 if rest and fit == len(rooms) else 0)
        if max_sequences is not None and plan.num_sequences + opened > max_sequences:
            break
        for piece in range(pieces):
            item = (piece * sequence_length, (piece + 1) * sequence_length)
            plan.add_item(copy, separators, item, plan.num_sequences, 0)
            plan.num_sequences += 1
        if rest:
            if fit < len(rooms):
                room, negative = rooms.pop(fit)
                sequence = -negative
            else:
                room, sequence = sequence_length, plan.num_sequences
                plan.num_sequences += 1
            plan.add_item(copy, separators, (length - rest, length), sequence, sequence_length - room)
            if room > rest:
                insort(rooms, (room - rest, -sequence))
    return plan


def fill(
    plan: PackPlan, tokens: TokenSource, separators: Separators, *, weights: bool, separator_weight: int = 1
) -> Iterator[PackedSequence]:
    """The sequences of a plan in order, as ids and, with `weights`, the weight of every token as a target.

    `tokens` gives the ids [n] and weights [n] (None: 1 everywhere) that stand at a placement.
    """
    placements = _by_sequence(plan.placements)
    separator_places = _by_sequence(plan.separators)
    for sequence in range(plan.num_sequences):
        ids = np.full(plan.sequence_length, separators.pad, np.int32)
        weight = np.zeros(plan.sequence_length, np.uint8) if weights else None
        for place in separator_places.get(sequence, []):
            source = separators.before if place.before else separators.after
            ids[place.start : place.end] = source[place.offset : place.offset + place.end - place.start]
            if weight is not None:
                weight[place.start : place.end] = separator_weight
        for placement in placements.get(sequence, []):
            document_ids, document_weight = tokens(placement)
            ids[placement.start : placement.end] = document_ids
            if weight is not None:
                weight[placement.start : placement.end] = 1 if document_weight is None else document_weight
        yield PackedSequence(sequence, ids, weight)


def _by_sequence(places: Iterable[Placed]) -> dict[int, list[Placed]]:
    grouped: dict[int, list[Placed]] = {}
    for place in places:
        grouped.setdefault(place.sequence, []).append(place)
    return grouped
