"""FlashAttention-2 of the `flash-attn` package (arXiv 2307.08691): Ampere and later. Read against flash-attn 2.8.3."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, half_on_cuda

MODULE = "flash_attn.flash_attn_interface"
NO_WINDOW = -1


def refusal(setting: Setting) -> str | None:
    """Why it cannot run in `setting`, None where it can."""
    reason = half_on_cuda(setting, 8, 256)
    if reason is None and setting.capability is not None and setting.capability < (8, 0):
        return f"needs sm_80 or later, this is {setting.architecture}"
    return reason


def load() -> Kernel:
    """Raises ImportError where the package is absent or another release than 2.7 and 2.8."""
    try:
        module: Any = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("flash_attn"):
            raise ImportError("not installed (pip install flash-attn --no-build-isolation)") from None
        raise
    if not hasattr(module, "_flash_attn_backward"):
        raise ImportError(f"{MODULE} has no _flash_attn_backward; 2.7 and 2.8 have it")
    return bind(module)


def bind(module: Any) -> Kernel:
    """The kernel over `module`, which has the functions of flash_attn.flash_attn_interface."""

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse, *_ = module._flash_attn_forward(
            *(dense(t) for t in (query, key, value)),
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=NO_WINDOW,
            window_size_right=NO_WINDOW,
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        return output, lse

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
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
        module._flash_attn_backward(
            *(dense(t) for t in (grad_output, query, key, value, output)),
            lse.contiguous(),
            dq,
            dk,
            dv,
            dropout_p=0.0,
            softmax_scale=scale,
            causal=causal,
            window_size_left=NO_WINDOW,
            window_size_right=NO_WINDOW,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
        )
        return dq, dk, dv

    # 2**30: the largest call of this algorithm that was run (torch's copy of it, one rank of degree 4 at 1M tokens)
    return Kernel("flash_attn_2", forward, backward, max_elements=2**30, row_alignment=512)
