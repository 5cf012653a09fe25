"""Core attention over a whole sequence for the heads of one rank: gathered q, k, v in, attended values out.

Two masks exist: causal over the pack, and causal inside each document. The second is computed without a mask:
documents are cut out, put together in batches of similar length and attended causally, so memory stays linear in
tokens, the same fast kernels serve both, and no arithmetic ever joins two documents.

torch 2.11-2.13. On CUDA the memory-efficient SDPA backend is never allowed: it is silently wrong beyond 65,536 tokens
(pytorch#162588, #187227).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

CUDA_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


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
    query: torch.Tensor,  # [batch, heads_local, seq_global, head_dim]
    key: torch.Tensor,  # [batch, kv_heads_local, seq_global, head_dim]
    value: torch.Tensor,
    scale: float,
    documents: DocumentLayout | None,
) -> torch.Tensor:
    """Causal attention, inside each document where a layout is given. [batch, heads_local, seq_global, head_dim]."""
    if documents is None:
        return _causal(query, key, value, scale)
    batch, _, seq_global, _ = query.shape
    outputs = []
    for bucket in documents.buckets:
        attended = _causal(_cut(query, bucket), _cut(key, bucket), _cut(value, bucket), scale)
        flat = attended.transpose(1, 2).flatten(0, 1)  # [documents * length, heads, head_dim]
        outputs.append(flat.index_select(0, bucket.kept))
    joined = torch.cat(outputs).index_select(0, documents.order)  # [batch * seq_global, heads, head_dim]
    return joined.unflatten(0, (batch, seq_global)).transpose(1, 2)


def _cut(heads: torch.Tensor, bucket: DocumentBucket) -> torch.Tensor:
    """[batch, heads, seq_global, head_dim] to the documents of a bucket, [documents, heads, length, head_dim]."""
    tokens = heads.transpose(1, 2).flatten(0, 1)  # [batch * seq_global, heads, head_dim]
    chosen = tokens.index_select(0, bucket.tokens.flatten())
    return chosen.unflatten(0, tuple(bucket.tokens.shape)).transpose(1, 2)


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    backends = sdpa_kernel(CUDA_BACKENDS, set_priority=True) if query.is_cuda else contextlib.nullcontext()
    grouped = query.shape[1] != key.shape[1]
    with backends:
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
