"""Core attention over a whole sequence for the heads of one rank: gathered q, k, v in, attended values out.

Two masks exist: causal over the pack, and causal inside each document. The second is computed without a mask:
documents are cut out, put together in batches of similar length and attended causally, so memory stays linear in
tokens, the same fast kernels serve both, and no arithmetic ever joins two documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ultralong_ray.parallel.ring import ring_backward, ring_forward

if TYPE_CHECKING:
    from ultralong_ray.parallel.context import AttentionContext


@dataclass(frozen=True, slots=True)
class DocumentBucket:
    """Documents of similar length, padded at their end to a common one."""

    tokens: torch.Tensor  # [documents, length], positions in the flattened [batch * seq_global]; padding repeats one
    kept: torch.Tensor  # [real tokens], which of the flattened [documents * length] are no padding


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """How a micro-batch falls into documents. Built once per micro-batch, used by every layer."""

    buckets: tuple[DocumentBucket, ...]
    order: torch.Tensor  # [batch * seq_global], where each token stands once the buckets are joined


def document_layout(document_ids: NDArray[np.int32], device: torch.device) -> DocumentLayout:
    """Layout of `document_ids` [batch, seq_global], in which the tokens of a document are neighbours.

    Documents share a bucket when their lengths round up to the same power of two: at most twice the tokens are
    computed, and the number of kernel calls grows with the logarithm of the longest document.
    """
    batch, seq_global = document_ids.shape
    new = np.ones((batch, seq_global), bool)
    new[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=batch * seq_global)
    exponents = np.ceil(np.log2(lengths)).astype(int)
    buckets: list[DocumentBucket] = []
    joined: list[np.ndarray] = []
    for exponent in np.unique(exponents):
        chosen = exponents == exponent
        offsets = np.arange(lengths[chosen].max())
        real = offsets < lengths[chosen][:, None]  # [documents, length]
        tokens = starts[chosen][:, None] + np.where(real, offsets, 0)
        buckets.append(DocumentBucket(_to(tokens, device), _to(np.flatnonzero(real), device)))
        joined.append(tokens[real])
    return DocumentLayout(tuple(buckets), _to(np.argsort(np.concatenate(joined)), device))


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device, non_blocking=True)


def core_attention(
    query: torch.Tensor,  # [batch, seq_ring, heads_local, head_dim]
    key: torch.Tensor,  # [batch, seq_ring, kv_heads_local, head_dim]
    value: torch.Tensor,
    scale: float,
    context: AttentionContext,
) -> torch.Tensor:
    """Causal attention, inside each document where a layout is given. [batch, seq_ring, heads_local, head_dim]."""
    if context.documents is None:
        return _Causal.apply(query, key, value, scale, context)  # pyright: ignore[reportReturnType]
    batch, seq_ring = query.shape[:2]
    outputs = []
    for bucket in context.documents.buckets:
        cut = [_cut(tensor, bucket) for tensor in (query, key, value)]
        attended = _Causal.apply(*cut, scale, context)
        outputs.append(attended.flatten(0, 1).index_select(0, bucket.kept))
    joined = torch.cat(outputs).index_select(0, context.documents.order)  # [batch * seq_ring, heads, head_dim]
    return joined.unflatten(0, (batch, seq_ring))


def _cut(heads: torch.Tensor, bucket: DocumentBucket) -> torch.Tensor:
    """[batch, seq_ring, heads, head_dim] to the documents of a bucket, [documents, length, heads, head_dim]."""
    chosen = heads.flatten(0, 1).index_select(0, bucket.tokens.flatten())
    return chosen.unflatten(0, tuple(bucket.tokens.shape))


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: AttentionContext
    ) -> torch.Tensor:
        if context.mesh.ring is None:
            output, lse = context.kernel.forward(query, key, value, scale, True)
        else:
            output, lse = ring_forward(query, key, value, scale, context.kernel, context.mesh)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale, ctx.context = scale, context
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kernel, mesh = ctx.context.kernel, ctx.context.mesh
        if mesh.ring is None:
            return *kernel.backward(grads[0], *ctx.saved_tensors, ctx.scale, True), None, None
        return *ring_backward(grads[0], *ctx.saved_tensors, ctx.scale, kernel, mesh), None, None
