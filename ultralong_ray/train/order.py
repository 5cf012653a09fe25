"""Which packed sequences a step reads: pure in (seed, step), so a resumed run needs no saved iterator.

Epoch 0 reads in storage order, which preparation has already drawn; every later epoch is a permutation of its own.
Steps follow each other without regard for epochs: a batch may hold the end of one and the start of the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far training has read: `sequence` sequences of `epoch` are consumed."""

    epoch: int
    sequence: int


@lru_cache(maxsize=2)
def epoch_order(num_sequences: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """Every sequence once. int64 [num_sequences]."""
    if epoch == 0:
        return np.arange(num_sequences)
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def sequences_of_step(step: int, global_batch: int, num_sequences: int, seed: int) -> list[int]:
    """The `global_batch` sequences that step `step` (1-based) computes."""
    positions = range((step - 1) * global_batch, step * global_batch)
    return [int(epoch_order(num_sequences, p // num_sequences, seed)[p % num_sequences]) for p in positions]


def cursor_after(step: int, global_batch: int, num_sequences: int) -> Cursor:
    """Where reading stands after `step` steps; the end of an epoch belongs to that epoch."""
    consumed = step * global_batch
    epoch = max(0, consumed - 1) // num_sequences
    return Cursor(epoch, consumed - epoch * num_sequences)
