"""The process groups of sequence parallelism: Ulysses ranks split the heads, ring ranks pass keys and values around.

Flows in: a Topology. Flows out: this rank's groups, which reach attention inside an AttentionContext.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ultralong_ray.parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class SequenceMesh:
    """This rank's two groups, None where the degree is 1. All ranks of a ring group hold the same heads."""

    ulysses: dist.ProcessGroup | None = None
    ring: dist.ProcessGroup | None = None
    ulysses_degree: int = 1
    ring_degree: int = 1
    ring_rank: int = 0


def create_mesh(topology: Topology, timeout: timedelta | None = None) -> SequenceMesh:
    """The mesh of this rank. Collective over all ranks of the world, which make all groups in the same order.

    The ring has groups of its own, so that its sends never queue behind another collective. `timeout` of a collective;
    None: torch's own, since a group does not inherit that of the world.
    """
    return SequenceMesh(
        ulysses=_group_of(topology.rank, topology.ulysses_groups, timeout),
        ring=_group_of(topology.rank, topology.ring_groups, timeout),
        ulysses_degree=topology.ulysses_degree,
        ring_degree=topology.ring_degree,
        ring_rank=topology.ring_rank,
    )


def _group_of(rank: int, groups: list[list[int]], timeout: timedelta | None) -> dist.ProcessGroup | None:
    """Makes every group and returns the one of `rank`; makes none where groups have one rank."""
    mine = None
    for ranks in groups if len(groups[0]) > 1 else []:
        group = dist.new_group(ranks, timeout=timeout)
        mine = group if rank in ranks else mine
    assert mine is None or isinstance(mine, dist.ProcessGroup)
    return mine
