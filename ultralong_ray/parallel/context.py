"""What attention must know beyond its tensors; travels through a model's forward as keyword `attention_context`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ultralong_ray.parallel.documents import DocumentLayout
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh


class KeptAttention(Protocol):
    """What one layer's attention hands from the forward pass to the replay in the backward pass."""

    replaying: bool

    def save(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Forward pass: output [batch, rows, heads_local, head_dim], lse [batch, heads_local, rows], all rows."""
        ...

    def load(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Replay: the last rows that were kept, shaped like in `save`; None where all must be computed again."""
        ...


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """`mesh`: who shares the sequence; `documents`: where they stand if masked; `kept`: set by a layer's replay."""

    mesh: SequenceMesh
    kernel: Kernel
    documents: DocumentLayout | None = None
    kept: KeptAttention | None = None
