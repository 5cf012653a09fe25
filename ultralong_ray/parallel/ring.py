"""Attention over a ring of ranks: this rank's rows in, their output over all keys of the sequence out."""

from __future__ import annotations

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh


def ring_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    kernel: Kernel,
    mesh: SequenceMesh,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def ring_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    kernel: Kernel,
    mesh: SequenceMesh,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    raise NotImplementedError
