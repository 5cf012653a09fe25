"""Ulysses sequence parallelism (arXiv 2309.14509) under Hugging Face attention modules, read against transformers 5.23.

Outside attention a rank holds all heads of its part of the sequence; inside, the whole sequence for its part of the
heads. One all-to-all carries query, key and value in, another carries the result out:

    [batch, heads, seq_local, head_dim]  --in-->  [batch, heads / degree, seq_global, head_dim]  --out-->  back

Where there are fewer key-value heads than ranks they are repeated before the exchange; autograd sums their gradients.

Nothing is global but the registered names: the group and the document layout reach the attention function as keyword
argument `attention_context` of the model's forward, which transformers hands through to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from ultralong_ray.parallel.attention import DocumentLayout, core_attention
from ultralong_ray.parallel.context import KeptAttention
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.types import UserError

ATTENTION_NAME = "ultralong"


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What attention must know beyond its tensors: who shares the sequence, and where documents stand."""

    group: dist.ProcessGroup | None  # None: this rank holds whole sequences
    degree: int = 1
    documents: DocumentLayout | None = None
    kept: KeptAttention | None = None


def create_group(topology: Topology) -> dist.ProcessGroup | None:
    """This rank's sequence-parallel group; collective over all ranks. None at degree 1."""
    if topology.degree == 1:
        return None
    groups = [dist.new_group(ranks) for ranks in topology.sp_groups]
    mine = groups[topology.dp_rank]
    assert isinstance(mine, dist.ProcessGroup)
    return mine


def register_attention() -> None:
    """Make `attn_implementation="ultralong"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, _attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers knows only this rank's positions: a mask it would build is wrong, so it builds none."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, heads, seq_local, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, seq_local, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_context: AttentionContext,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls. Returns ([batch, seq_local, heads, head_dim], no attention weights)."""
    if dropout or sliding_window:
        raise UserError(
            f"the model's config asks for attention_dropout {dropout} and sliding_window {sliding_window}; training "
            f"here is full causal attention without dropout: set attention_dropout to 0 and use_sliding_window to false"
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    context = attention_context
    if context.group is None:
        return core_attention(query, key, value, scale, context.documents).transpose(1, 2), None
    whole = gather_sequence(query, key, value, context.group, context.degree)
    return scatter_sequence(core_attention(*whole, scale, context.documents), context.group, context.degree), None


def gather_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, degree: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All heads of a slice to some heads of the sequence: q, k, v [batch, heads(_kv) / degree, seq_global, head_dim].

    Rank r gets query heads [r * heads / degree, (r + 1) * heads / degree) and the key-value heads that serve them.
    """
    copies = max(1, degree // key.shape[1])
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    by_rank = [t.unflatten(1, (degree, -1)) for t in (query, key, value)]  # [batch, degree, heads_local, seq_local, hd]
    packed = torch.cat(by_rank, dim=2).transpose(0, 1)  # [degree, batch, heads of q, k and v, seq_local, head_dim]
    received = _AllToAll.apply(packed, group)  # dim 0 is now the part of the sequence
    whole = received.permute(1, 2, 0, 3, 4).flatten(2, 3)  # [batch, heads of q, k and v, seq_global, head_dim]
    query_local, key_local, value_local = whole.split([t.shape[2] for t in by_rank], dim=1)
    return query_local, key_local, value_local


def scatter_sequence(attended: torch.Tensor, group: dist.ProcessGroup, degree: int) -> torch.Tensor:
    """[batch, heads_local, seq_global, head_dim] back to [batch, seq_local, heads, head_dim]."""
    by_rank = attended.unflatten(2, (degree, -1)).permute(2, 0, 3, 1, 4)  # [degree, batch, seq_local, heads_local, hd]
    received = _AllToAll.apply(by_rank, group)  # dim 0 is now the part of the heads
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _AllToAll(torch.autograd.Function):
    """Block i of dim 0 goes to rank i, and rank j's block arrives as block j. Its own inverse, so its own gradient."""

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _exchange(blocks, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _exchange(grads[0], ctx.group), None


def _exchange(blocks: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    # empty_like of a permuted view would keep its strides, and the collective would scramble the blocks.
    sent = blocks.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
