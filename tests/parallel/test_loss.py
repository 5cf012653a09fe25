"""Tiled cross-entropy against torch's."""

from __future__ import annotations

import pytest
import torch

from ultralong_ray.parallel import loss as loss_module
from ultralong_ray.parallel.loss import tiled_cross_entropy

ROWS, HIDDEN, VOCAB = 37, 16, 53


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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


def test_the_scale_of_a_loss_is_not_rounded_to_bfloat16() -> None:
    """1 + 2^-9 would become 1: every gradient of a step would be off by as much."""
    hidden, weight, labels, loss_weight = problem(torch.bfloat16)
    scale = 1 + 2**-9
    (tiled_cross_entropy(hidden, weight, labels, loss_weight, 8) * (1000 * scale)).backward()
    found = hidden.grad, weight.grad
    hidden, weight, *_ = problem(torch.bfloat16)
    (tiled_cross_entropy(hidden, weight, labels, loss_weight, 8) * 1000).backward()
    for one, other in zip(found, (hidden.grad, weight.grad), strict=True):
        assert one is not None and other is not None
        assert float(one.double().abs().sum() / other.double().abs().sum()) == pytest.approx(scale, abs=2**-11)


def test_one_loss_serves_one_backward_pass() -> None:
    loss = tiled_cross_entropy(*problem(), 8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_logits_exist_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compute = loss_module.cross_entropy_
    monkeypatch.setattr(loss_module, "cross_entropy_", lambda *args: seen.append(len(args[0])) or compute(*args))
    tiled_cross_entropy(*problem(), 10)
    assert sum(seen) == ROWS and max(seen) <= 10
