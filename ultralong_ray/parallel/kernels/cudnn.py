"""The attention of NVIDIA's cuDNN, through torch. Hopper and Blackwell.

Called below autograd. Read against torch 2.11 and 2.13 (`aten/src/ATen/native/cudnn/MHA.cpp`): fewer key-value heads
than query heads are part of the graph; the log-sum-exp is [batch, heads, seq, 1]; graphs are cached by the strides of
query, key and value alone, so output and its gradient must always have the same strides for a shape.
"""

from __future__ import annotations

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, half_on_cuda


def refusal(setting: Setting) -> str | None:
    """Why it cannot run in `setting`, None where it can."""
    reason = half_on_cuda(setting, 8, 128)
    if reason is None and setting.capability is not None and setting.capability < (9, 0):
        return f"needs sm_90 or later, this is {setting.architecture}"
    return reason


def load() -> Kernel:
    """Raises ImportError where torch has no cuDNN."""
    if not torch.backends.cudnn.is_available():
        raise ImportError("torch was built without cuDNN, or cannot load it")
    # 2**30: one rank of degree 4 at 1M tokens, the largest call that was run
    return Kernel("cudnn", forward, backward, max_elements=2**30, row_alignment=512)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernel.Forward`."""
    heads = [dense(t).transpose(1, 2) for t in (query, key, value)]  # [batch, heads, seq, head_dim]
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return output.transpose(1, 2).contiguous(), lse.reshape(heads[0].shape[:3])


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
    heads = [dense(t).transpose(1, 2) for t in (query, key, value)]
    grad, attended = (t.contiguous().transpose(1, 2) for t in (grad_output, output))
    no_dropout = torch.zeros((), dtype=torch.int64, device=query.device)  # on sm_100 torch converts it, used or not
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad,
        *heads,
        attended,
        lse.unsqueeze(-1).contiguous(),
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        causal,
        scale=scale,
    )
    dq, dk, dv = (t.transpose(1, 2) for t in grads)
    return dq, dk, dv
