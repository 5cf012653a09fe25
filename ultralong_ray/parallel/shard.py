"""Packed sequences to the part that one sequence-parallel rank computes: the one place where labels are shifted.

A rank reads its slice and one token more, the target of its last position, so no rank ever holds a whole sequence.
With documents masked, the first token of a document is not a target (nothing before it belongs to it) and positions
start again at 0 in every document, so that a document in a pack is computed as it would be alone. RoPE is relative:
restarting changes no score inside a document, it only keeps the angles small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ultralong_ray.packed import PackedReader
from ultralong_ray.types import IntArray, SequenceSlice

IGNORED_LABEL = -100


def slice_bounds(sequence_length: int, sp_rank: int, degree: int) -> tuple[int, int]:
    """Positions [start, end) of a sequence that rank `sp_rank` of `degree` holds. ValueError unless it divides."""
    if sequence_length % degree:
        raise ValueError(f"{sequence_length} tokens cannot be split evenly over {degree} ranks")
    seq_local = sequence_length // degree
    return sp_rank * seq_local, (sp_rank + 1) * seq_local


def read_slice(
    reader: PackedReader, sequences: Sequence[int], sp_rank: int, degree: int, mask_documents: bool
) -> SequenceSlice:
    """The part of `sequences` that sequence-parallel rank `sp_rank` of `degree` computes."""
    length = reader.manifest.sequence_length
    start, end = slice_bounds(length, sp_rank, degree)
    parts = [reader.read(sequence, start, end + 1) for sequence in sequences]
    starts = [reader.document_starts(sequence) if mask_documents else None for sequence in sequences]
    return shift(parts, starts, start, length // degree, length)


def shift(
    parts: Sequence[tuple[IntArray, np.ndarray | None]],
    document_starts: Sequence[IntArray | None],
    start: int,
    seq_local: int,
    seq_global: int,
) -> SequenceSlice:
    """Inputs, labels and weights of positions [start, start + seq_local) of each sequence.

    `parts` holds token ids and weights of those positions and the next one (absent at the end of a sequence).
    `document_starts` are positions at which documents begin, None where the pack is one causal sequence.
    """
    batch = len(parts)
    input_ids = np.empty((batch, seq_local), np.int64)
    labels = np.full((batch, seq_local), IGNORED_LABEL, np.int64)
    loss_weight = np.zeros((batch, seq_local), np.float32)
    position_ids = np.tile(np.arange(start, start + seq_local, dtype=np.int64), (batch, 1))
    document_ids = np.zeros((batch, seq_global), np.int32) if any(s is not None for s in document_starts) else None
    for row, ((ids, weights), starts) in enumerate(zip(parts, document_starts, strict=True)):
        targets = len(ids) - 1 if len(ids) > seq_local else seq_local - 1  # the sequence ends here: one target less
        input_ids[row] = ids[:seq_local]
        labels[row, :targets] = ids[1 : targets + 1]
        loss_weight[row, :targets] = 1.0 if weights is None else weights[1 : targets + 1]
        if starts is not None and document_ids is not None:
            document_ids[row] = np.searchsorted(starts, np.arange(seq_global), side="right") - 1
            position_ids[row] -= starts[document_ids[row, start : start + seq_local]]
            before_start = starts[(starts > start) & (starts <= start + seq_local)] - start - 1
            labels[row, before_start] = IGNORED_LABEL
    loss_weight[labels == IGNORED_LABEL] = 0.0
    labels[loss_weight == 0.0] = IGNORED_LABEL
    return SequenceSlice(input_ids, labels, loss_weight, position_ids, document_ids)
