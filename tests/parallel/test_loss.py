"""Tiled cross-entropy against torch's."""

from __future__ import annotations

import pytest
import torch

from ultralong_ray.parallel.loss import tiled_cross_entropy

ROWS, HIDDEN, VOCAB = 37, 16, 53


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    loss_weight = torch.randint(0, 4, (ROWS,), generator=generator).float()
    labels[loss_weight == 0] = -100
    assert 0 < int((labels == -100).sum()) < ROWS
    return hidden, weight, labels, loss_weight


@pytest.mark.parametrize("tile_tokens", [1, 5, 36, 37, 1000])
def test_loss_and_gradients_equal_torch_for_any_tile(tile_tokens: int) -> None:
    hidden, weight, labels, loss_weight = problem()
    loss = tiled_cross_entropy(hidden, weight, labels, loss_weight, tile_tokens)
    (loss * 0.25).backward()
    hidden_2, weight_2, *_ = problem()
    per_row = torch.nn.functional.cross_entropy(hidden_2 @ weight_2.T, labels, reduction="none", ignore_index=-100)
    expected = (per_row * loss_weight).sum()
    (expected * 0.25).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(hidden.grad, hidden_2.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad, weight_2.grad, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_head_still_sums_in_float32() -> None:
    hidden, weight, labels, loss_weight = problem(torch.bfloat16)
    loss = tiled_cross_entropy(hidden, weight, labels, loss_weight, 4)
    assert loss.dtype == torch.float32
    loss.backward()
    logits = (hidden @ weight.T).float()
    per_row = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(loss.detach(), (per_row * loss_weight).sum().detach(), rtol=1e-6, atol=1e-4)
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    hidden, weight, labels, loss_weight = problem()
    with torch.no_grad():
        loss = tiled_cross_entropy(hidden, weight, labels, loss_weight, 8)
    assert not loss.requires_grad
