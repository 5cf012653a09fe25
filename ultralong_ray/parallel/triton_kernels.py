"""Triton kernels behind `elementwise`: one read and one write per element, arithmetic in float32. CUDA only.

Written for the Triton that comes with torch 2.11-2.13 (3.6 and later); imported by `elementwise` alone, so that Triton
need not exist elsewhere.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
VOCAB_BLOCK = 8192


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    output = torch.empty_like(gate)
    _swiglu[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, output, gate.numel(), BLOCK=BLOCK)
    return output


def swiglu_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(gradient of gate, gradient of up, silu(gate) * up), written over gate, up and grad."""
    _swiglu_backward[(triton.cdiv(gate.numel(), BLOCK),)](grad, gate, up, gate.numel(), BLOCK=BLOCK)
    return gate, up, grad


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of every row, float32 [rows]; `logits` [rows, vocab] become its gradient."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, labels, loss_weight, losses, vocab, logits.stride(0), VOCAB_BLOCK=VOCAB_BLOCK, num_warps=16
    )
    return losses


@triton.jit
def _swiglu(gate_at, up_at, output_at, size, BLOCK: tl.constexpr):
    # 64-bit: a tile of 262,144 rows and 14,336 columns has more than 2^31 elements
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = index < size
    gate = tl.load(gate_at + index, mask=real).to(tl.float32)
    up = tl.load(up_at + index, mask=real).to(tl.float32)
    tl.store(output_at + index, gate * tl.sigmoid(gate) * up, mask=real)


@triton.jit
def _swiglu_backward(grad_at, gate_at, up_at, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = index < size
    grad = tl.load(grad_at + index, mask=real).to(tl.float32)
    gate = tl.load(gate_at + index, mask=real).to(tl.float32)
    up = tl.load(up_at + index, mask=real).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    tl.store(gate_at + index, grad * up * (sigmoid + silu * (1 - sigmoid)), mask=real)
    tl.store(up_at + index, grad * silu, mask=real)
    tl.store(grad_at + index, silu * up, mask=real)


@triton.jit
def _cross_entropy(logits_at, labels_at, weights_at, losses_at, vocab, row_stride, VOCAB_BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_at += row * row_stride
    weight = tl.load(weights_at + row)
    label = tl.maximum(tl.load(labels_at + row), 0)
    columns = tl.arange(0, VOCAB_BLOCK)
    highest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, VOCAB_BLOCK):
        block = tl.load(logits_at + start + columns, mask=start + columns < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(block, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(block - higher), 0)
        highest = higher
    normaliser = highest + tl.log(total)
    target = tl.load(logits_at + label).to(tl.float32)
    tl.store(losses_at + row, (normaliser - target) * weight)
    tl.debug_barrier()  # every warp has read its target before a warp writes there
    for start in range(0, vocab, VOCAB_BLOCK):
        real = start + columns < vocab
        block = tl.load(logits_at + start + columns, mask=real).to(tl.float32)
        gradient = tl.exp(block - normaliser) - tl.where(start + columns == label, 1.0, 0.0)
        tl.store(logits_at + start + columns, gradient * weight, mask=real)
