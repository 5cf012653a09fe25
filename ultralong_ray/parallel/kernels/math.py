"""Attention in plain matrix products: q, k, v in, output and log-sum-exp out. The reference of all other kernels.

Runs on any device and in any floating dtype, computes in float32 (float64 for float64 inputs), and holds the scores of
one block of query rows at a time, never [seq, seq]. Rows and keys are padded to whole blocks, so every product has the
shape it would have in a longer call, and a row comes out bit-equal however many rows follow it. Backward after
FlashAttention-2 (arXiv 2307.08691, section 2.3.2): probabilities come back from the log-sum-exp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting

BLOCK_ROWS = 128


def refusal(setting: Setting) -> str | None:
    """None: it always runs."""
    return None


def load() -> Kernel:
    return Kernel("math", forward, backward)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernel.Forward`; the log-sum-exp of float64 inputs is float64."""
    rows, kv_heads = query.shape[1], key.shape[2]
    padding = -rows % BLOCK_ROWS
    queries = _by_kv_head(F.pad(query, (0, 0, 0, 0, 0, padding)), kv_heads)  # [batch, kv_heads, group, rows, head_dim]
    keys, values = (_whole(F.pad(t, (0, 0, 0, 0, 0, padding if causal else 0))) for t in (key, value))
    outputs, sums = [], []
    for start in range(0, rows, BLOCK_ROWS):
        stop = start + BLOCK_ROWS
        seen = stop if causal else keys.shape[2]
        scores = _scores(queries[:, :, :, start:stop], keys[:, :, :seen], scale, start if causal else None)
        lse = scores.logsumexp(-1, keepdim=True)  # [batch, kv_heads, group, BLOCK_ROWS, 1]
        probabilities = scores.sub_(lse).exp_()
        attended = probabilities.flatten(2, 3) @ values[:, :, :seen]
        outputs.append(attended.view_as(queries[:, :, :, start:stop]).to(query.dtype))
        sums.append(lse.squeeze(-1))
    output = torch.cat(outputs, 3).flatten(1, 2)[:, :, :rows]  # [batch, heads, rows, head_dim]
    return output.transpose(1, 2).contiguous(), torch.cat(sums, 3).flatten(1, 2)[:, :, :rows].contiguous()


def backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernel.Backward`."""
    rows, kv_heads = query.shape[1], key.shape[2]
    queries, grads, outputs = (_by_kv_head(t, kv_heads) for t in (query, grad_output, output))
    keys, values = _whole(key), _whole(value)  # [batch, kv_heads, seq_key, head_dim]
    delta = (grads * outputs).sum(-1, keepdim=True)  # [batch, kv_heads, group, rows, 1]
    sums = lse.unflatten(1, (kv_heads, -1)).unsqueeze(-1).to(queries.dtype)  # [batch, kv_heads, group, rows, 1]
    dq, dk, dv = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, rows, BLOCK_ROWS):
        block = slice(start, min(rows, start + BLOCK_ROWS))
        seen = slice(0, block.stop if causal else keys.shape[2])
        scores = _scores(queries[:, :, :, block], keys[:, :, seen], scale, start if causal else None)
        probabilities = scores.sub_(sums[:, :, :, block]).exp_()  # [batch, kv_heads, group, block, seen]
        grad = grads[:, :, :, block].flatten(2, 3)  # [batch, kv_heads, group * block, head_dim]
        dv[:, :, seen] += probabilities.flatten(2, 3).mT @ grad
        grad_scores = (grad @ values[:, :, seen].mT).view_as(probabilities)
        grad_scores = grad_scores.sub_(delta[:, :, :, block]).mul_(probabilities).mul_(scale).flatten(2, 3)
        dq[:, :, :, block] = (grad_scores @ keys[:, :, seen]).view_as(dq[:, :, :, block])
        dk[:, :, seen] += grad_scores.mT @ queries[:, :, :, block].flatten(2, 3)
    by_row = dq.flatten(1, 2).transpose(1, 2)
    return tuple(t.to(query.dtype).contiguous() for t in (by_row, dk.transpose(1, 2), dv.transpose(1, 2)))  # type: ignore[return-value]


def _scores(queries: torch.Tensor, keys: torch.Tensor, scale: float, first_row: int | None) -> torch.Tensor:
    """Scaled scores of a block of rows [batch, kv_heads, group, block, seq_key], -inf where a key comes after its row.

    `first_row` is the position of the block's first row, None where every key is seen.
    """
    products = (queries.flatten(2, 3) @ keys.mT).mul_(scale).unflatten(2, queries.shape[2:4])
    if first_row is None:
        return products
    rows = torch.arange(first_row, first_row + queries.shape[3], device=keys.device)
    later = (
        torch.arange(first_row, keys.shape[2], device=keys.device) > rows[:, None]
    )  # [block, keys from first_row on]
    products[..., first_row:].masked_fill_(later, float("-inf"))
    return products


def _by_kv_head(rows: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[batch, seq, heads, head_dim] to [batch, kv_heads, group, seq, head_dim], in the precision of computing."""
    return _whole(rows).unflatten(1, (kv_heads, -1))


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """[batch, seq, heads, head_dim] to contiguous [batch, heads, seq, head_dim], in the precision of computing."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return rows.transpose(1, 2).to(dtype).contiguous()
