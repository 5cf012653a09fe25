"""Packed sequences to the part that one sequence-parallel rank computes: the one place where labels are shifted.

A rank reads its segments, each with one token more, the target of its last position, so no rank ever holds a whole
sequence. With documents masked, the first token of a document is not a target (nothing before it belongs to it) and
positions start again at 0 in every document, so that a document in a pack is computed as it would be alone. RoPE is
relative: restarting changes no score inside a document, it only keeps the angles small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.topology import Topology, local_segments
from ultralong_ray.types import IntArray, SequenceSlice

IGNORED_LABEL = -100

Segments = tuple[tuple[int, int], ...]


def read_slice(
    reader: PackedReader, sequences: Sequence[int], topology: Topology, mask_documents: bool
) -> SequenceSlice:
    """The part of `sequences` that the rank of `topology` computes.

    Raises ValueError when the degrees cannot split the length, or documents are to be masked in a ring.
    """
    if mask_documents and topology.ring_degree > 1:
        raise ValueError(
            f"documents cannot be masked with ring_degree {topology.ring_degree}; use ulysses_degree: a mask by "
            f"documents needs whole sequences"
        )
    length = reader.manifest.sequence_length
    segments = local_segments(length, topology)
    parts = [[reader.read(sequence, start, end + 1) for start, end in segments] for sequence in sequences]
    starts = [reader.document_starts(sequence) if mask_documents else None for sequence in sequences]
    return shift(parts, starts, segments, length)


def shift(
    parts: Sequence[Sequence[tuple[IntArray, NDArray[np.generic] | None]]],
    document_starts: Sequence[IntArray | None],
    segments: Segments,
    seq_global: int,
) -> SequenceSlice:
    """Inputs, labels and weights of the positions in `segments` of each sequence, one after the other.

    `parts` holds, by sequence and segment, token ids and weights of those positions and the next one (absent at the
    end of a sequence). `document_starts` are positions at which documents begin, None where the pack is one causal
    sequence.
    """
    positions = np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in segments])  # [seq_local]
    batch, seq_local = len(parts), len(positions)
    input_ids = np.empty((batch, seq_local), np.int64)
    labels = np.full((batch, seq_local), IGNORED_LABEL, np.int64)
    loss_weight = np.zeros((batch, seq_local), np.float32)
    position_ids = np.tile(positions, (batch, 1))
    document_ids = np.zeros((batch, seq_global), np.int32) if any(s is not None for s in document_starts) else None
    for row, (row_parts, starts) in enumerate(zip(parts, document_starts, strict=True)):
        first = 0
        for (ids, weights), (start, end) in zip(row_parts, segments, strict=True):
            targets = slice(first, first + len(ids) - 1)  # one less where the sequence ends here
            input_ids[row, first : first + end - start] = ids[: end - start]
            labels[row, targets] = ids[1:]
            loss_weight[row, targets] = 1.0 if weights is None else weights[1:]
            first += end - start
        if starts is not None and document_ids is not None:
            document_ids[row] = np.searchsorted(starts, np.arange(seq_global), side="right") - 1
            position_ids[row] -= starts[document_ids[row, positions]]
            labels[row, np.isin(positions + 1, starts)] = IGNORED_LABEL
    loss_weight[labels == IGNORED_LABEL] = 0.0
    labels[loss_weight == 0.0] = IGNORED_LABEL
    return SequenceSlice(input_ids, labels, loss_weight, position_ids, document_ids)
