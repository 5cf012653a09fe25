"""The process groups of sequence parallelism: Ulysses ranks split the heads, ring ranks pass keys and values around."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class SequenceMesh:
    """This rank's two groups, None where the degree is 1. All ranks of a ring group hold the same heads."""

    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    ulysses_degree: int = 1
    ring_degree: int = 1
    ring_rank: int = 0
