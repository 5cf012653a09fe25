"""How a micro-batch falls into documents: document ids in, batches of documents of similar length out.

Attention inside documents needs no mask when documents are cut out and put together in batches, so memory stays linear
in tokens, the same fast kernels serve it, and no arithmetic ever joins two documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DocumentBucket:
    """Documents of similar length, padded at their end to a common one."""

    tokens: torch.Tensor  # [documents, length], positions in the flattened [batch * seq_global]; padding repeats one
    kept: torch.Tensor  # [real tokens], which of the flattened [documents * length] are no padding


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """The buckets of a micro-batch; every token stands in one of them. Built once, used by every layer."""

    buckets: tuple[DocumentBucket, ...]


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
    for exponent in np.unique(exponents):
        chosen = exponents == exponent
        offsets = np.arange(lengths[chosen].max())
        real = offsets < lengths[chosen][:, None]  # [documents, length]
        tokens = starts[chosen][:, None] + np.where(real, offsets, 0)
        buckets.append(DocumentBucket(_to(tokens, device), _to(np.flatnonzero(real), device)))
    return DocumentLayout(tuple(buckets))


def _to(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.int64)).to(device, non_blocking=True)
