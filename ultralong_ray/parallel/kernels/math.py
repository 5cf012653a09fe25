"""Attention as plain matrix products in float32, with the whole score matrix: for the CPU and for references."""

from __future__ import annotations

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel


def math_kernel() -> Kernel:
    """Works on any device and type; memory grows with seq_query * seq_key."""
    return Kernel("math", _forward, _backward)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """float32 [batch, kv_heads, heads / kv_heads, seq_query, seq_key], -inf where a causal mask hides the key."""
    scores = torch.einsum("bqhgd,bkhd->bhgqk", _grouped(query, key), key.float()) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores


def _grouped(tensor: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """[batch, seq, heads, head_dim] to float32 [batch, seq, kv_heads, heads / kv_heads, head_dim]."""
    return tensor.float().unflatten(2, (key.shape[2], -1))


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _scores(query, key, scale, causal)
    lse = scores.logsumexp(-1)  # [batch, kv_heads, heads / kv_heads, seq_query]
    output = torch.einsum("bhgqk,bkhd->bqhgd", (scores - lse.unsqueeze(-1)).exp(), value.float())
    return output.flatten(2, 3).to(query.dtype), lse.flatten(1, 2)


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashAttention-2 (arXiv 2307.08691), algorithm 2, without tiles."""
    grouped, grad = _grouped(query, key), _grouped(grad_output, key)
    probability = (_scores(query, key, scale, causal) - lse.unflatten(1, (key.shape[2], -1)).unsqueeze(-1)).exp()
    grad_value = torch.einsum("bhgqk,bqhgd->bkhd", probability, grad)
    delta = (grad * _grouped(output, key)).sum(-1).permute(0, 2, 3, 1)  # [batch, kv_heads, heads / kv_heads, seq]
    grad_scores = torch.einsum("bqhgd,bkhd->bhgqk", grad, value.float()).sub_(delta.unsqueeze(-1))
    grad_scores.mul_(probability).mul_(scale)
    grad_query = torch.einsum("bhgqk,bkhd->bqhgd", grad_scores, key.float()).flatten(2, 3)
    grad_key = torch.einsum("bhgqk,bqhgd->bkhd", grad_scores, grouped)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
