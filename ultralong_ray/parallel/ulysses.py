"""Ulysses sequence parallelism (arXiv 2309.14509) under Hugging Face attention modules, read against transformers 5.23.

Outside attention a rank holds all heads of its rows of the sequence; inside, some heads of all rows of its Ulysses
group (the whole sequence, or with a ring the chunks of its ring rank). One all-to-all carries query, key and value in,
another carries the result out:

    [batch, heads, seq_local, head_dim]  --gather-->   [batch, seq_ring, heads / ulysses, head_dim]
    [batch, seq_local, heads, head_dim]  <--scatter--  [batch, seq_ring, heads / ulysses, head_dim]

transformers' tensors are transposed views of [batch, seq_local, heads, head_dim] in memory, and kernels of the
flash-attention family want that order: nothing is ever transposed. At batch 1 what arrives is used where it lies.
Where there are fewer key-value heads than ranks they are repeated on the way; their gradients are summed.

Nothing is global but the registered names: groups, kernel and document layout reach the attention function as keyword
argument `attention_context` of the model's forward, which transformers hands through to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from ultralong_ray.parallel.attention import core_attention
from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.types import UserError

ATTENTION_NAME = "ultralong"

ThreeTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    gathered = gather_sequence(query, key, value, attention_context.mesh)
    attended = core_attention(*gathered, scale, attention_context)
    return scatter_sequence(attended, attention_context.mesh), None


def gather_sequence(
    query: torch.Tensor,  # [batch, heads, seq_local, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, seq_local, head_dim]
    value: torch.Tensor,
    mesh: SequenceMesh,
) -> ThreeTensors:
    """Query, key and value [batch, seq_ring, heads_local, head_dim]: all rows of the Ulysses group, some heads.

    Ulysses rank u gets query heads [u * heads / ulysses, (u + 1) * heads / ulysses) and the key-value heads that serve
    them. The three may be views of one tensor, and dense in their last dimension only.
    """
    if mesh.ulysses is None:
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _Gather.apply(query, key, value, mesh.ulysses, mesh.ulysses_degree)


def scatter_sequence(attended: torch.Tensor, mesh: SequenceMesh) -> torch.Tensor:
    """[batch, seq_ring, heads_local, head_dim] back to [batch, seq_local, heads, head_dim]: own rows, all heads."""
    if mesh.ulysses is None:
        return attended
    return _Scatter.apply(attended, mesh.ulysses, mesh.ulysses_degree)


class _Gather(torch.autograd.Function):
    """By hand, so that one copy puts q, k and v in order to be sent, and another their gradients on the way back."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup, degree: int
    ) -> ThreeTensors:
        ctx.group, ctx.degree, ctx.kv_heads = group, degree, key.shape[1]
        by_rank = [_heads_by_rank(tensor, degree) for tensor in (query, key, value)]
        received = _exchange(torch.cat(by_rank, dim=3), group)  # dim 0 is now the part of the sequence
        whole = _join_rows(received)  # [batch, seq_ring, heads_local of q, k and v, head_dim]
        query, key, value = whole.split([tensor.shape[3] for tensor in by_rank], dim=2)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        by_rank = [_rows_by_rank(grad, ctx.degree) for grad in grads]
        received = _exchange(torch.cat(by_rank, dim=3), ctx.group)  # dim 0 is now the part of the heads
        query, key, value = received.split([tensor.shape[3] for tensor in by_rank], dim=3)
        copies = max(1, ctx.degree // ctx.kv_heads)
        if copies > 1:  # torch sums bfloat16 in float32
            key, value = (grad.unflatten(0, (ctx.kv_heads, copies)).sum(1) for grad in (key, value))
        query, key, value = (_join_heads(grad).transpose(1, 2) for grad in (query, key, value))
        return query, key, value, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: torch.Tensor, group: dist.ProcessGroup, degree: int) -> torch.Tensor:
        ctx.group, ctx.degree = group, degree
        return _join_heads(_exchange(_rows_by_rank(attended, degree), group))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        by_rank = _heads_by_rank(grads[0].transpose(1, 2), ctx.degree)
        return _join_rows(_exchange(by_rank, ctx.group)), None, None


# "By rank" tensors are [degree, batch, seq_local, heads_local, head_dim]: block i of dim 0 belongs to Ulysses rank i.


def _heads_by_rank(tensor: torch.Tensor, degree: int) -> torch.Tensor:
    """[batch, heads, seq_local, head_dim] cut by heads. Fewer heads than ranks are repeated."""
    heads = tensor.shape[1]
    if heads < degree:
        tensor = tensor.unsqueeze(2).expand(-1, -1, degree // heads, -1, -1).flatten(1, 2)
    return tensor.unflatten(1, (degree, -1)).permute(1, 0, 3, 2, 4)


def _rows_by_rank(tensor: torch.Tensor, degree: int) -> torch.Tensor:
    """[batch, seq_ring, heads_local, head_dim] cut by rows."""
    return tensor.unflatten(1, (degree, -1)).transpose(0, 1)


def _join_rows(by_rank: torch.Tensor) -> torch.Tensor:
    """[batch, seq_ring, heads_local, head_dim]; a view at batch 1."""
    return by_rank.transpose(0, 1).flatten(1, 2)


def _join_heads(by_rank: torch.Tensor) -> torch.Tensor:
    """[batch, seq_local, heads, head_dim]."""
    return by_rank.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(by_rank: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Block i of dim 0 goes to rank i, and rank j's block arrives as block j."""
    # empty_like of a permuted view would keep its strides, and the collective would scramble the blocks.
    sent = by_rank.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
