"""The element by element parts of a layer and of the loss, in one pass over memory each where there is a GPU.

Flows in: whole tensors. Flows out: the same arithmetic in float32, rounded once, on either path: Triton kernels on
CUDA, torch elsewhere. A missing Triton is said once in the log: it costs time, not correctness.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, contiguous tensors of one shape (arXiv 2002.05202)."""
    kernels = gpu_kernels(gate.device.type)
    if kernels is not None:
        return kernels.swiglu(gate, up)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up). The first may overwrite gate, the second up, the third grad.

    With s the sigmoid: silu' = s + gate * s * (1 - s).
    """
    kernels = gpu_kernels(gate.device.type)
    if kernels is not None:
        return kernels.swiglu_backward(grad, gate, up)
    wide_grad, wide_gate, wide_up = grad.float(), gate.float(), up.float()
    sigmoid = wide_gate.sigmoid()
    silu = wide_gate * sigmoid
    grad_gate = wide_grad * wide_up * (sigmoid + silu * (1 - sigmoid))
    return grad_gate.to(gate.dtype), (wide_grad * silu).to(gate.dtype), (silu * wide_up).to(gate.dtype)


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of every row, float32 [rows]; `logits` [rows, vocab] become its gradient, in place.

    labels int64 [rows] (any where the weight is 0), loss_weight float32 [rows].
    """
    kernels = gpu_kernels(logits.device.type)
    if kernels is not None:
        return kernels.cross_entropy_(logits, labels, loss_weight)
    target, scale = labels.clamp_min(0).unsqueeze(1), loss_weight.unsqueeze(1)  # [rows, 1]
    wide = logits.float()
    normaliser = wide.logsumexp(-1, keepdim=True)
    losses = (normaliser - wide.gather(1, target)) * scale
    gradient = wide.sub_(normaliser).exp_()
    gradient.scatter_add_(1, target, torch.full_like(scale, -1.0))
    logits.copy_(gradient.mul_(scale))
    return losses.squeeze(1)


@functools.cache
def gpu_kernels(device_type: str) -> Any:
    """The module of Triton kernels on CUDA where Triton is installed, else None."""
    if device_type != "cuda":
        return None
    try:
        from ultralong_ray.parallel import triton_kernels
    except ImportError as error:
        logger.warning("elementwise kernels are not fused: %s (pip install triton)", error)
        return None
    return triton_kernels
