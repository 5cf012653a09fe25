"""What an attention kernel is to the rest of the code: two functions over whole tensors, layout of flash-attention.

Forward returns the log-sum-exp of every row, and backward takes it back together with the output. That is what lets an
output be kept instead of computed again, and partial results of a ring be merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch


class Forward(Protocol):
    def __call__(
        self,
        query: torch.Tensor,  # [batch, seq_query, heads, head_dim], any strides with a dense last dimension
        key: torch.Tensor,  # [batch, seq_key, kv_heads, head_dim]
        value: torch.Tensor,
        scale: float,
        causal: bool,  # causal asks for seq_query == seq_key
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [batch, seq_query, heads, head_dim], log-sum-exp [batch, heads, seq_query], see `lse_dtype`)."""
        ...


class Backward(Protocol):
    def __call__(
        self,
        grad_output: torch.Tensor,  # [batch, seq_query, heads, head_dim]
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,  # of each row over all keys it attends to, also those that are not in `key`
        scale: float,
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of query, key and value, shaped like them."""
        ...


@dataclass(frozen=True, slots=True)
class Kernel:
    """One attention implementation. `max_elements`: the largest query tensor that one call takes; None: any.

    `row_alignment`: the first n rows computed alone have the bits of a longer call where n is a multiple of it.
    """

    name: str
    forward: Forward
    backward: Backward
    max_elements: int | None = None
    row_alignment: int = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What decides whether a kernel can run. `capability` is that of the CUDA device, None elsewhere."""

    device_type: str  # "cuda" or "cpu"
    capability: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int

    @property
    def architecture(self) -> str:
        """The device as CUDA names it, "sm_90"."""
        return "no CUDA device" if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


HALF = (torch.bfloat16, torch.float16)


def half_on_cuda(setting: Setting, head_dim_multiple: int, head_dim_max: int) -> str | None:
    """Why a kernel of half-precision tensor cores cannot run here, None where it can."""
    if setting.device_type != "cuda":
        return "needs a CUDA device"
    if setting.dtype not in HALF:
        return f"takes bfloat16 and float16 only, this is {str(setting.dtype).removeprefix('torch.')}"
    if setting.head_dim % head_dim_multiple or setting.head_dim > head_dim_max:
        return (
            f"takes head_dim up to {head_dim_max} in multiples of {head_dim_multiple}, this model has "
            f"{setting.head_dim}"
        )
    return None


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where rows of its last dimension can be read 16 bytes at a time, else a contiguous copy.

    A slice of heads, of rows, or of a fused projection passes without a copy.
    """
    unit = 16 // tensor.element_size()
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    aligned = tensor.stride(-1) == 1 and not any(stride % unit for size, stride in outer if size > 1)
    if aligned and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps one that starts off a boundary


def lse_dtype(query: torch.Tensor) -> torch.dtype:
    """What the log-sum-exp of `query`'s rows is kept in: float32, for float64 inputs float64."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def within_limit(kernel: Kernel) -> Kernel:
    """The same kernel, called on some heads at a time where a query tensor is beyond `max_elements`.

    Inputs are cut as views. Pieces are whole groups of query heads with the key-value heads that serve them, or parts
    of one group, whose gradients of key and value are then added.
    """
    limit = kernel.max_elements
    if limit is None:
        return kernel

    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if query.numel() <= limit:
            return kernel.forward(query, key, value, scale, causal)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        batch, rows, heads_all, _ = query.shape
        lse = torch.empty(batch, heads_all, rows, dtype=lse_dtype(query), device=query.device)
        for heads, kv in head_pieces(query, key, limit):
            part, part_lse = kernel.forward(query[:, :, heads], key[:, :, kv], value[:, :, kv], scale, causal)
            output[:, :, heads], lse[:, heads] = part, part_lse
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
        if query.numel() <= limit:
            return kernel.backward(grad_output, query, key, value, output, lse, scale, causal)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
        done = 0  # key-value heads that hold a gradient already
        for heads, kv in head_pieces(query, key, limit):
            grad, q, out = (t[:, :, heads] for t in (grad_output, query, output))
            k, v = key[:, :, kv], value[:, :, kv]
            part_dq, part_dk, part_dv = kernel.backward(grad, q, k, v, out, lse[:, heads], scale, causal)
            dq[:, :, heads] = part_dq
            if kv.start < done:
                dk[:, :, kv] += part_dk
                dv[:, :, kv] += part_dv
            else:
                dk[:, :, kv], dv[:, :, kv] = part_dk, part_dv
            done = kv.stop
        return dq, dk, dv

    return replace(kernel, forward=forward, backward=backward, max_elements=None)


def head_pieces(query: torch.Tensor, key: torch.Tensor, max_elements: int) -> Iterator[tuple[slice, slice]]:
    """(query heads, key-value heads) of every call: as many as `max_elements` allows, one query head at least."""
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    fitting = max(1, max_elements // (query.numel() // heads))  # query heads of one call
    if fitting >= group:
        step = fitting // group
        for start in range(0, kv_heads, step):
            stop = min(kv_heads, start + step)
            yield slice(start * group, stop * group), slice(start, stop)
        return
    for kv in range(kv_heads):
        for start in range(0, group, fitting):
            yield slice(kv * group + start, kv * group + min(group, start + fitting)), slice(kv, kv + 1)
