"""FlashAttention-4 of the `flash-attn-4` package: kernels in CuTe DSL for Hopper and Blackwell, compiled on first use.

Read against 4.0.0b5, b18, b28 and b36. What differs between them: forward returns 2, 4 or 5 tensors (output and
log-sum-exp come first in all), and before b28 strides and pointers are taken to be 16-byte aligned unchecked. Backward
holds float32 sums of the query gradient beside its result.
"""

from __future__ import annotations

import importlib
import warnings
from importlib import metadata
from typing import Any

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, half_on_cuda

MODULE = "flash_attn.cute.interface"
PACKAGE = "flash-attn-4"
INTERFACE_FILE = "flash_attn/cute/interface.py"


def refusal(setting: Setting) -> str | None:
    """Why it cannot run in `setting`, None where it can."""
    major = setting.capability[0] if setting.capability is not None else None
    reason = half_on_cuda(setting, 8, 256 if major == 9 else 128)
    if reason is None and major not in (9, 10):
        return f"needs sm_90 or sm_100, this is {setting.architecture}"
    return reason


def load() -> Kernel:
    """Raises ImportError where the package is absent or another package has written over its files."""
    try:
        installed = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ImportError(f"not installed (pip install {PACKAGE})") from None
    if (reason := overwritten(installed)) is not None:
        raise ImportError(reason)
    module: Any = importlib.import_module(MODULE)
    absent = [name for name in ("_flash_attn_fwd", "_flash_attn_bwd") if not hasattr(module, name)]
    if absent:
        raise ImportError(f"{PACKAGE} {installed.version} has no {' and no '.join(absent)} in {MODULE}")
    return bind(module)


def overwritten(installed: metadata.Distribution) -> str | None:
    """Why the files of `installed` are not its own, None where they are.

    Wheels of flash-attn 2 carry an old copy of flash_attn/cute; the package installed last wins.
    """
    for file in installed.files or []:
        if file.as_posix() == INTERFACE_FILE and file.size is not None:
            path = installed.locate_file(file)
            size = path.stat().st_size if hasattr(path, "stat") else file.size  # type: ignore[attr-defined]
            if size != file.size:
                return (
                    f"flash_attn/cute is not that of {PACKAGE} {installed.version} but the old copy inside flash-attn; "
                    f"pip install --force-reinstall --no-deps {PACKAGE}=={installed.version}"
                )
    return None


def bind(module: Any) -> Kernel:
    """The kernel over `module`, which has the functions of flash_attn.cute.interface."""
    # The compiler's own note on an argument that it handles, at every compilation with 4.0.0b36.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (dense(t) for t in (query, key, value))
        output, lse, *_ = module._flash_attn_fwd(*inputs, softmax_scale=scale, causal=causal, return_lse=True)
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
        tensors = [dense(t) for t in (query, key, value, output, grad_output)]
        dq, dk, dv, *_ = module._flash_attn_bwd(*tensors, lse.contiguous(), softmax_scale=scale, causal=causal)
        return dq, dk, dv

    # 2**31: one rank of degree 8 at 4M tokens ran right; a larger call was never tried
    return Kernel("flash_attn_4", forward, backward, max_elements=2**31, row_alignment=512)
