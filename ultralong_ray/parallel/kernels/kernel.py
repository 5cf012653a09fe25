"""What an attention kernel is to the rest of the code: two functions over whole tensors, layout of flash-attention.

Forward returns the log-sum-exp of every row, and backward takes it back together with the output. That is what lets an
output be kept instead of computed again, and partial results of a ring be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Forward(Protocol):
    def __call__(
        self,
        query: torch.Tensor,  # [batch, seq_query, heads, head_dim], any strides with a dense last dimension
        key: torch.Tensor,  # [batch, seq_key, kv_heads, head_dim]
        value: torch.Tensor,
        scale: float,
        causal: bool,  # causal asks for seq_query == seq_key
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [batch, seq_query, heads, head_dim], log-sum-exp float32 [batch, heads, seq_query])."""
        ...


class Backward(Protocol):
    def __call__(
        self,
        grad_output: torch.Tensor,  # [batch, seq_query, heads, head_dim]
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,  # of each row over all keys it attends to, also those that are not in `key`
        scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, shaped like them."""
        ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """One attention implementation. `max_elements`: the largest query tensor that one call takes; None: any."""

    name: str
    forward: Forward
    backward: Backward
    max_elements: int | None = None
