"""Core attention of one rank, below autograd: the rows of a ring's part for some heads in, attended values out.

Three ways lead to a result: causal inside each document (`documents`), over a ring of ranks (`ring`), and plain causal.
Each gives an output with its log-sum-exp, so that a layer's replay can take both as they were kept, or the last rows of
them, and compute only what is missing.
"""

from __future__ import annotations

from typing import Any

import torch

from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.documents import DocumentBucket, DocumentLayout
from ultralong_ray.parallel.kernels.kernel import Kernel, lse_dtype, within_limit
from ultralong_ray.parallel.ring import ring_backward, ring_forward
from ultralong_ray.types import UserError

# The log-sum-exp of a padding row: exp(score - 1e30) is 0, so it has no probabilities, whatever its scores are.
PADDING_LSE = 1e30

Result = tuple[torch.Tensor, torch.Tensor]  # output [batch, rows, heads, head_dim], lse [batch, heads, rows]


def core_attention(
    query: torch.Tensor,  # [batch, seq_ring, heads_local, head_dim]
    key: torch.Tensor,  # [batch, seq_ring, kv_heads_local, head_dim]
    value: torch.Tensor,
    scale: float,
    context: AttentionContext,
) -> torch.Tensor:
    """Causal attention, inside each document where a layout is given. [batch, seq_ring, heads_local, head_dim].

    `context.kept` is given the result in the forward pass. In a replay its rows are taken as they are and only those
    before them are computed; gradients are the same bits either way where the kernel's backward is deterministic. With
    documents masked, a part of the rows is treated as nothing: they lie in many buckets, and a bucket is computed as a
    whole. Raises UserError for documents masked over a ring.
    """
    if context.documents is not None and context.mesh.ring_degree > 1:
        raise UserError(
            f"mask_documents = true with ring_degree {context.mesh.ring_degree}: documents are masked only where a "
            f"rank holds whole sequences of its heads; set ring_degree to 1, or mask_documents to false"
        )
    return _CoreAttention.apply(query, key, value, scale, context)


class _CoreAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        context: AttentionContext,
    ) -> torch.Tensor:
        output, lse = _replayed(query, key, value, scale, context)
        if context.kept is not None and not context.kept.replaying:
            context.kept.save(output, lse)
        ctx.save_for_backward(query, key, value, output, lse)
        # what `kept` holds belongs to the layer, and must not live as long as this graph
        ctx.scale, ctx.mesh, ctx.kernel, ctx.documents = scale, context.mesh, context.kernel, context.documents
        return output.detach()  # another object than the kept one, or that would be tied to this graph

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        grad, scale, kernel = grads[0], ctx.scale, within_limit(ctx.kernel)
        if ctx.documents is not None:
            found = _documents_backward(grad, query, key, value, output, lse, scale, kernel, ctx.documents)
        elif ctx.mesh.ring_degree > 1:
            found = ring_backward(grad, query, key, value, output, lse, scale, kernel, ctx.mesh)
        else:
            found = kernel.backward(grad, query, key, value, output, lse, scale, True)
        return *found, None, None


def _replayed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: AttentionContext
) -> Result:
    """The whole result: as kept, computed, or computed up to where the kept rows begin."""
    seq = query.shape[1]
    kept = context.kept.load() if context.kept is not None and context.kept.replaying else None
    if kept is None:
        return _computed(query, key, value, scale, context, seq)
    output, lse = kept
    missing = seq - output.shape[1]
    if missing == 0:
        return output, lse
    rows = aligned_rows(missing, seq, context)
    if rows == seq or context.documents is not None:
        return _computed(query, key, value, scale, context, seq)
    head, head_lse = _computed(query, key, value, scale, context, rows)
    known = rows - missing  # rows that were computed again though they are kept
    return torch.cat([head, output[:, known:]], 1), torch.cat([head_lse, lse[:, :, known:]], 2)


def aligned_rows(missing: int, seq: int, context: AttentionContext) -> int:
    """The first rows to compute so that `missing` of them have the bits that a call over all `seq` rows gives them.

    On a ring, kernel calls begin at a rank's first row and at its second chunk, so both must be aligned.
    """
    alignment = context.kernel.row_alignment
    rows = -(-missing // alignment) * alignment
    chunk = seq // 2
    if context.mesh.ring_degree > 1 and rows > chunk and chunk % alignment:
        return seq
    return min(seq, rows)


def _computed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: AttentionContext, rows: int
) -> Result:
    """The first `rows` rows of the result. With documents, all of them."""
    kernel = within_limit(context.kernel)
    if context.documents is not None:
        return _documents_forward(query, key, value, scale, kernel, context.documents)
    if context.mesh.ring_degree > 1:
        return ring_forward(query, key, value, scale, kernel, context.mesh, None if rows == query.shape[1] else rows)
    return kernel.forward(query[:, :rows], key[:, :rows], value[:, :rows], scale, True)


def _documents_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    kernel: Kernel,
    documents: DocumentLayout,
) -> Result:
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)  # [batch, seq, heads]
    for bucket in documents.buckets:
        part, part_lse = kernel.forward(_cut(query, bucket), _cut(key, bucket), _cut(value, bucket), scale, True)
        _paste(part, bucket, output)
        _paste(part_lse.mT, bucket, lse)
    return output, lse.mT.contiguous()


def _documents_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    kernel: Kernel,
    documents: DocumentLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each bucket's gradients, at its tokens. Padding rows have no gradient and no probabilities, so they add none."""
    gradients = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    for bucket in documents.buckets:
        padding = torch.ones(bucket.tokens.numel(), dtype=torch.bool, device=query.device)
        padding[bucket.kept] = False
        padding = padding.view_as(bucket.tokens)  # [documents, length]
        grad = _cut(grad_output, bucket).masked_fill_(padding[:, :, None, None], 0.0)
        bucket_lse = _cut(lse.mT, bucket).masked_fill_(padding[:, :, None], PADDING_LSE).mT.contiguous()
        q, k, v, out = (_cut(t, bucket) for t in (query, key, value, output))
        for part, whole in zip(kernel.backward(grad, q, k, v, out, bucket_lse, scale, True), gradients, strict=True):
            _paste(part, bucket, whole)
    return gradients[0], gradients[1], gradients[2]


def _cut(rows: torch.Tensor, bucket: DocumentBucket) -> torch.Tensor:
    """[batch, seq, ...] to the documents of a bucket, [documents, length, ...]."""
    return rows.flatten(0, 1).index_select(0, bucket.tokens.flatten()).unflatten(0, tuple(bucket.tokens.shape))


def _paste(part: torch.Tensor, bucket: DocumentBucket, whole: torch.Tensor) -> None:
    """Write [documents, length, ...] without its padding to where the tokens stand in contiguous [batch, seq, ...]."""
    real = bucket.tokens.flatten().index_select(0, bucket.kept)
    whole.flatten(0, 1).index_copy_(0, real, part.flatten(0, 1).index_select(0, bucket.kept))
