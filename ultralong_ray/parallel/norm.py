"""RMSNorm as one kernel: torch.nn.functional.rms_norm in place of the six passes of a Hugging Face norm module.

Flows in: a model. Flows out: the same model, whose layer norms and final norm compute float32 sums and round once. In
float32 that is the original to the last bits; in bfloat16 the original rounds once more, before the weight. For its
backward pass the input is kept as it is, not in float32 copies. torch 2.11-2.13, transformers 5.17-5.23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm


def install_fused_norms(causal_lm: Any) -> None:
    """Give the norms of every layer and the last one a fused forward. Norms of queries and keys stay as they are."""
    for layer in causal_lm.model.layers:
        _fuse(layer.input_layernorm)
        _fuse(layer.post_attention_layernorm)
    _fuse(causal_lm.model.norm)


def _fuse(norm: nn.Module) -> None:
    if not type(norm).__name__.endswith("RMSNorm") or not hasattr(norm, "variance_epsilon"):
        return  # another kind of norm is right as it stands, only slower

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        weight: Any = norm.weight
        return rms_norm(hidden, weight.shape, weight, norm.variance_epsilon)  # type: ignore[arg-type]

    norm.forward = forward
