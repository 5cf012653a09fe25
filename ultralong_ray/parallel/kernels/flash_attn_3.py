"""FlashAttention-3 (arXiv 2407.08608): Hopper only. Not on PyPI: `hopper/` of the flash-attention repository, built.

Read against that folder at 3.0.0: the module is `flash_attn_interface` when built there, and `flash_attn_3` holds it
in some packages. Backward says `is_causal`, in older builds `causal`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, half_on_cuda

MODULES = ("flash_attn_interface", "flash_attn_3.flash_attn_interface", "flash_attn_3")


def refusal(setting: Setting) -> str | None:
    """Why it cannot run in `setting`, None where it can."""
    reason = half_on_cuda(setting, 8, 256)
    if reason is None and setting.capability != (9, 0):
        return f"needs sm_90, this is {setting.architecture}"
    return reason


def load() -> Kernel:
    """Raises ImportError where the package is absent."""
    for name in MODULES:
        try:
            module: Any = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        if hasattr(module, "_flash_attn_forward") and hasattr(module, "_flash_attn_backward"):
            return bind(module)
    raise ImportError("not installed (build hopper/ of github.com/Dao-AILab/flash-attention)")


def bind(module: Any) -> Kernel:
    """The kernel over `module`, which has the functions of flash_attn_interface."""
    causal_name = "is_causal" if "is_causal" in _parameters(module._flash_attn_backward) else "causal"

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (dense(t) for t in (query, key, value))
        output, lse, *_ = module._flash_attn_forward(*inputs, softmax_scale=scale, causal=causal)
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
            dq=dq,
            dk=dk,
            dv=dv,
            softmax_scale=scale,
            **{causal_name: causal},
        )
        return dq, dk, dv

    # 2**30: half of what 32-bit offsets reach; nobody has run a larger call here
    return Kernel("flash_attn_3", forward, backward, max_elements=2**30, row_alignment=512)


def _parameters(function: Any) -> set[str]:
    """Parameter names of a function, or of the function inside a torch custom op."""
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)
