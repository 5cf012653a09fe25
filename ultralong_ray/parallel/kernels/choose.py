"""Which attention kernel a run uses."""

from __future__ import annotations

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.kernels.math import math_kernel


def choose_kernel(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The kernel for `requested`, of which "math" is the only one so far."""
    return math_kernel()
