"""Synthetic tokens: the same sequence for every contestant, whatever part of it a rank holds. Numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.types import SequenceSlice

Segments = tuple[tuple[int, int], ...]
IGNORED_LABEL = -100


def sequence(length: int, vocab_size: int, seed: int, step: int, group: int = 0) -> NDArray[np.int64]:
    """Uniformly drawn ids [length] of one data-parallel group's sequence in a step."""
    return np.random.default_rng([seed, step, group]).integers(0, vocab_size, length, dtype=np.int64)


def slice_of(ids: NDArray[np.int64], segments: Segments, targets: NDArray[np.int64] | None = None) -> SequenceSlice:
    """The rows of `ids` [length] in `segments`, ascending positions [start, end), as a micro-batch of one sequence.

    Every token but the last has a target; with `targets`, only the rows at those positions (not the last) have one.
    """
    positions = np.concatenate([np.arange(start, end, dtype=np.int64) for start, end in segments])  # [seq_local]
    wanted = positions < len(ids) - 1 if targets is None else np.isin(positions, targets)
    labels = np.where(wanted, ids[(positions + 1) % len(ids)], IGNORED_LABEL)
    return SequenceSlice(
        input_ids=ids[positions][None],
        labels=labels[None],
        loss_weight=wanted.astype(np.float32)[None],
        position_ids=positions[None],
        document_ids=None,
    )
