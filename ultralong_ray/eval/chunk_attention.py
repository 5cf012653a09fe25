"""Attention of a prompt's chunk over itself and all that is cached before it, for transformers' models in one process.

transformers (read: 5.17 and 5.23) gives a chunk behind cached tokens a mask of [chunk, all keys], with which torch
falls back to its memory-efficient backend: slow, and silently wrong beyond 65,536 tokens (pytorch#162588, #187227).
Here the chunk is causal over its own keys, sees all earlier ones without a mask, and the two results are merged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ultralong_ray.eval.partial_attention import merge
from ultralong_ray.parallel.kernels.kernel import Kernel, within_limit

Attention = Literal["sdpa", "ultralong_chunk"]
CHUNK_ATTENTION: Attention = "ultralong_chunk"
# Flash splits the keys over the GPU. On Hopper torch 2.11 and 2.13 would take cuDNN, for one query row too, and cuDNN
# builds and keeps a graph for every number of keys, so for every token (aten/src/ATen/native/cudnn/MHA.cpp).
DECODE_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def sees_all_tokens(config: Any) -> bool:
    """Whether every layer attends to all tokens before, and so keeps the keys and values of all of them. Layers that
    slide, go by chunks or carry a state do not, and cannot be taken back to an earlier token either."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) is DynamicLayer for layer in layers)  # those that slide are a subclass


def usual_attention(config: Any, device_type: str) -> Attention:
    """Ours on GPUs. Models whose attention slides keep transformers' own, and so does the CPU, whose SDPA is right."""
    return CHUNK_ATTENTION if device_type == "cuda" and sees_all_tokens(config) else "sdpa"


def register_chunk_attention() -> None:
    """Make `attn_implementation="ultralong_chunk"` known to transformers; calling it again changes nothing.

    The model then needs the keyword `kernel` in every call, and whole prompts: no padding, no sliding window.
    """
    AttentionInterface.register(CHUNK_ATTENTION, _attention)
    AttentionMaskInterface.register(CHUNK_ATTENTION, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """None is built: which keys a row sees follows from its place."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, rows, head_dim]
    key: torch.Tensor,  # [1, kv_heads, cached + rows, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls. Returns ([1, rows, heads, head_dim], no attention weights)."""
    if query.shape[2] == 1:  # decoding sees all keys
        with sdpa_kernel(DECODE_BACKENDS):
            output, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=False)
        return output, None
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    forward = within_limit(kernel).forward
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [1, seq, heads, head_dim]
    cached = k.shape[1] - q.shape[1]
    output, lse = forward(q, k[:, cached:], v[:, cached:], scale, True)
    if cached == 0:
        return output, None
    earlier, earlier_lse = forward(q, k[:, :cached], v[:, :cached], scale, False)
    merged, _ = merge([output, earlier], torch.stack([lse.mT, earlier_lse.mT]).float())
    return merged.to(query.dtype), None
