"""Attention over a part of the keys, and the exact union of such parts. No communication.

A partial result is an output with the log-sum-exp of its rows; results over separate keys merge in float32, which is
exact (Ring Attention, arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ultralong_ray.parallel.kernels import sdpa_flash
from ultralong_ray.parallel.kernels.kernel import Kernel

# Keys of one program of a decode step: kernels without a split of the keys would leave most of a GPU idle.
SPLIT_ROWS = 4096

Partial = tuple[torch.Tensor, torch.Tensor]  # output [..., heads, head_dim], log-sum-exp [..., heads]


def attend_slice(
    query: torch.Tensor,  # [heads, head_dim], of one token
    keys: torch.Tensor,  # [1, rows, kv_heads, head_dim], all of them before it
    values: torch.Tensor,
    scale: float,
    kernel: Kernel,
) -> Partial:
    """One token over a slice: float32 output [heads, head_dim] and log-sum-exp [heads]; 0 and -inf over no rows.

    The query heads of a key-value head become rows, so keys are read once, and stretches of the slice become a batch.
    """
    rows, kv_heads = keys.shape[1:3]
    if rows == 0:
        return no_keys(query.float())
    grouped = query.unflatten(0, (kv_heads, -1)).transpose(0, 1).contiguous()  # [group, kv_heads, head_dim]
    whole = rows // SPLIT_ROWS * SPLIT_ROWS
    outputs, sums = [], []
    for part, length in ((slice(0, whole), SPLIT_ROWS), (slice(whole, rows), rows - whole)):
        if part.start == part.stop:
            continue
        k, v = (tensor[0, part].unflatten(0, (-1, length)) for tensor in (keys, values))
        output, lse = kernel.forward(grouped.expand(len(k), -1, -1, -1).contiguous(), k, v, scale, False)
        outputs.append(output)  # [splits, group, kv_heads, head_dim]
        sums.append(lse.mT.float())  # [splits, group, kv_heads]
    output, lse = merge(torch.cat(outputs), torch.cat(sums))
    return output.transpose(0, 1).flatten(0, 1), lse.T.flatten()


def decode_kernel(kernel: Kernel) -> Kernel:
    """The kernel for `attend_slice` where `kernel` serves prompts. cuDNN would build a graph for every number of keys,
    so for every token; torch's flash attention runs wherever it does."""
    return sdpa_flash.load() if kernel.name == "cudnn" else kernel


def merge(outputs: torch.Tensor | Sequence[torch.Tensor], sums: torch.Tensor) -> Partial:
    """Attention over the union of keys, in float32, from partial outputs [..., heads, head_dim] over its parts.

    `sums` [parts, ..., heads] are their log-sum-exps; -inf marks a part without keys. One part at least has keys.
    Outputs in one tensor [parts, ...] are merged at once, with a float32 copy of all: the many parts of one token. A
    prompt's are given one by one, and copied one by one.
    """
    total = sums.logsumexp(0)
    shares = (sums - total).exp()  # [parts, ..., heads]
    if isinstance(outputs, torch.Tensor):
        return (outputs.float() * shares.unsqueeze(-1)).sum(0), total
    merged = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output, share in zip(outputs, shares, strict=True):
        merged.addcmul_(output.float(), share.unsqueeze(-1))
    return merged, total


def no_keys(rows: torch.Tensor) -> Partial:
    """The partial result of rows [..., heads, head_dim] over no keys."""
    return torch.zeros_like(rows), rows.new_full(rows.shape[:-1], float("-inf"), dtype=torch.float32)
