"""The flash attention that comes with torch: FlashAttention-2 on CUDA, a kernel of its own on CPU.

Called below autograd, so that the log-sum-exp comes out and one of more keys can go back in. Read against torch 2.11
and 2.13 (`aten/src/ATen/native/native_functions.yaml`). Both take fewer key-value heads than query heads.
"""

from __future__ import annotations

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, half_on_cuda

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def refusal(setting: Setting) -> str | None:
    """Why it cannot run in `setting`, None where it can."""
    if setting.device_type == "cpu":
        return None if setting.dtype in CPU_DTYPES else f"takes no {str(setting.dtype).removeprefix('torch.')} on CPU"
    reason = half_on_cuda(setting, 8, 256)
    if reason is None and setting.capability is not None and setting.capability < (8, 0):
        return f"needs sm_80 or later, this is {setting.architecture}"
    return reason


def load() -> Kernel:
    # 2**30: one rank of degree 4 at 1M tokens, the largest call that was run. 512 rows: on CPU its blocks of 32, 64 or
    # 256 rows depend on the length, and other lengths than multiples of 512 gave other last bits (torch 2.13).
    return Kernel("sdpa_flash", forward, backward, max_elements=2**30, row_alignment=512)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernel.Forward`; the log-sum-exp of float64 inputs is float64."""
    heads = [dense(t).transpose(1, 2) for t in (query, key, value)]  # [batch, heads, seq, head_dim]
    if query.is_cuda:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention(*heads, 0.0, causal, False, scale=scale)[:2]
    else:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, causal, scale=scale)
    return output.transpose(1, 2), lse.contiguous()


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
    tensors = [dense(t).transpose(1, 2) for t in (grad_output, query, key, value, output)]
    if query.is_cuda:
        state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of the dropout that there is not
        lengths = (None, None, query.shape[1], key.shape[1])
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *tensors, lse.contiguous(), *lengths, 0.0, causal, state, state, scale=scale
        )
    else:
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, lse.contiguous(), 0.0, causal, scale=scale
        )
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    return dq, dk, dv
