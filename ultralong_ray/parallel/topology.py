"""Which rank does what, and which positions of a sequence it holds, as integers: no process group, no torch.

Ranks are numbered so that a sequence-parallel group is a run of neighbours (0..degree-1, degree..2*degree-1, ...), and
a Ulysses group a run within it: neighbours share a host, and the all-to-all of every layer stays on its fast links.
A ring takes one rank of each Ulysses group; all its ranks compute the same heads.

    world 8, Ulysses 2, ring 2:  rank           0 1 2 3 | 4 5 6 7
                                 dp_rank        0 0 0 0 | 1 1 1 1     which sequence
                                 sp_rank        0 1 2 3 | 0 1 2 3     which part of the sequence
                                 ring_rank      0 0 1 1 | 0 0 1 1     which chunks of it
                                 ulysses_rank   0 1 0 1 | 0 1 0 1     which rows of them, and which heads

Zigzag. Causal attention makes late positions dear. A ring of R therefore cuts the sequence into 2R chunks and gives
rank r the chunks r and 2R - 1 - r: one early and one late, the same work for every rank (the zigzag layout of
zhuzilin/ring-flash-attention). The Ulysses ranks of a ring rank share its rows, early ones first, evenly.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong_ray.config.degrees import length_objection


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of one rank. Raises ValueError when the degrees do not divide the world or the rank is outside it."""

    world_size: int
    rank: int
    ulysses_degree: int
    ring_degree: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.degree:
            raise ValueError(
                f"{self.world_size} ranks cannot form sequence-parallel groups of {self.degree} "
                f"(ulysses_degree {self.ulysses_degree} x ring_degree {self.ring_degree})"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def degree(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree

    @property
    def sp_rank(self) -> int:
        return self.rank % self.degree

    @property
    def ulysses_rank(self) -> int:
        return self.rank % self.ulysses_degree

    @property
    def ring_rank(self) -> int:
        return self.sp_rank // self.ulysses_degree

    @property
    def dp_rank(self) -> int:
        return self.rank // self.degree

    @property
    def dp_size(self) -> int:
        return self.world_size // self.degree

    @property
    def sp_groups(self) -> list[list[int]]:
        """Ranks of every sequence-parallel group."""
        return [list(range(first, first + self.degree)) for first in range(0, self.world_size, self.degree)]

    @property
    def ulysses_groups(self) -> list[list[int]]:
        """Ranks of every Ulysses group, in the order in which all ranks must create them."""
        return [
            list(range(first, first + self.ulysses_degree)) for first in range(0, self.world_size, self.ulysses_degree)
        ]

    @property
    def ring_groups(self) -> list[list[int]]:
        """Ranks of every ring by ring_rank, in the order in which all ranks must create them."""
        return [group[first :: self.ulysses_degree] for group in self.sp_groups for first in range(self.ulysses_degree)]


def local_segments(sequence_length: int, topology: Topology) -> tuple[tuple[int, int], ...]:
    """Positions [start, end) of a sequence that a rank holds: one or two runs, ascending, neighbours merged.

    Raises ValueError, with the nearest lengths that fit, when the degrees cannot split the length.
    """
    ulysses, ring, ring_rank = topology.ulysses_degree, topology.ring_degree, topology.ring_rank
    objection = length_objection(sequence_length, ulysses, ring)
    if objection is not None:
        raise ValueError(objection)
    rows = sequence_length // topology.degree
    first, last = topology.ulysses_rank * rows, (topology.ulysses_rank + 1) * rows  # of the ring rank's rows
    if ring == 1:
        return ((first, last),)
    chunk = sequence_length // (2 * ring)
    early, late = ring_rank * chunk, (2 * ring - 1 - ring_rank) * chunk
    segments = [
        (early + first, early + min(last, chunk)),
        (late + max(first, chunk) - chunk, late + last - chunk),
    ]
    (start, middle), (resumed, end) = segments
    if middle == resumed and start < middle and resumed < end:
        return ((start, end),)
    return tuple(segment for segment in segments if segment[0] < segment[1])


def sequences_of_micro_batch(
    sequences: list[int], topology: Topology, micro_batch: int, micro_batch_sequences: int
) -> list[int]:
    """The sequences that this rank's group computes in pass `micro_batch` of a step over `sequences`.

    `sequences` is the whole global batch, its length a multiple of dp_size * micro_batch_sequences.
    """
    start = (micro_batch * topology.dp_size + topology.dp_rank) * micro_batch_sequences
    return sequences[start : start + micro_batch_sequences]
