"""Which rank does what, as integers: no process group, no torch.

Ranks are numbered so that a sequence-parallel group is a run of neighbours (0..degree-1, degree..2*degree-1, ...):
neighbours share a host, and the all-to-all of every layer stays on its fast links.

    world 8, degree 4:   rank      0 1 2 3 | 4 5 6 7
                         sp_rank   0 1 2 3 | 0 1 2 3     which part of the sequence
                         dp_rank   0 0 0 0 | 1 1 1 1     which sequence
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of one rank. Raises ValueError when the degree does not divide the world or the rank is outside it."""

    world_size: int
    rank: int
    degree: int

    def __post_init__(self) -> None:
        if self.world_size % self.degree:
            raise ValueError(f"{self.world_size} ranks cannot form sequence-parallel groups of {self.degree}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def sp_rank(self) -> int:
        return self.rank % self.degree

    @property
    def dp_rank(self) -> int:
        return self.rank // self.degree

    @property
    def dp_size(self) -> int:
        return self.world_size // self.degree

    @property
    def sp_groups(self) -> list[list[int]]:
        """Ranks of every sequence-parallel group, in the order in which all ranks must create them."""
        return [list(range(first, first + self.degree)) for first in range(0, self.world_size, self.degree)]


def sequences_of_micro_batch(
    sequences: list[int], topology: Topology, micro_batch: int, micro_batch_sequences: int
) -> list[int]:
    """The sequences that this rank's group computes in pass `micro_batch` of a step over `sequences`.

    `sequences` is the whole global batch, its length a multiple of dp_size * micro_batch_sequences.
    """
    start = (micro_batch * topology.dp_size + topology.dp_rank) * micro_batch_sequences
    return sequences[start : start + micro_batch_sequences]
