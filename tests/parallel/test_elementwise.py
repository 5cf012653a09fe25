"""Element by element arithmetic against torch's own, on the plain path and, where Triton can run, on the fused one."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ultralong_ray.parallel import elementwise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["plain", "triton"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """`elementwise` itself for CPU tensors, or the Triton module; on a CPU that runs under TRITON_INTERPRET=1."""
    if request.param == "plain":
        return elementwise
    pytest.importorskip("triton", reason="Triton is not installed")
    if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU")
    from ultralong_ray.parallel import triton_kernels

    return triton_kernels


def drawn(kernels: Any, *shape: int, dtype: torch.dtype = torch.float32, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    device = torch.device("cpu") if kernels is elementwise else DEVICE
    return [torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradients(kernels: Any, dtype: torch.dtype) -> None:
    gate, up, grad = drawn(kernels, 37, 129, dtype=dtype)
    wide_gate, wide_up = (tensor.float().requires_grad_() for tensor in (gate, up))
    product = torch.nn.functional.silu(wide_gate) * wide_up
    expected = torch.autograd.grad(product, [wide_gate, wide_up], grad.float())
    # one rounding to bfloat16, which Triton's interpreter does by cutting
    exact: dict[str, Any] = {"rtol": 1e-5 if dtype == torch.float32 else 2**-7, "atol": 1e-6}
    torch.testing.assert_close(kernels.swiglu(gate, up).float(), product.detach(), **exact)
    found = kernels.swiglu_backward(grad.clone(), gate.clone(), up.clone())
    for one, other in zip(found, (*expected, product.detach()), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.float(), other, **exact)


@pytest.mark.parametrize("vocab", [50, 20000])  # less and more than the kernel's block of columns
def test_cross_entropy_turns_logits_into_their_gradient(kernels: Any, vocab: int) -> None:
    logits = drawn(kernels, 11, vocab, count=1)[0] * 5
    logits[1] += 300  # exp would overflow unless the largest is taken out
    labels = torch.arange(11, device=logits.device) * (vocab // 11)
    labels[-1] = vocab - 1
    weight = torch.tensor([0.0, 1.0, 3.0, *[1.0] * 8], device=logits.device)
    labels[0] = -100
    wide = logits.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(wide, labels, reduction="none", ignore_index=-100) * weight
    expected = torch.autograd.grad(losses.sum(), wide)[0]
    found = kernels.cross_entropy_(logits, labels, weight)
    torch.testing.assert_close(found, losses.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)
    assert bool((logits[0] == 0).all())


def test_a_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ultralong_ray.parallel.triton_kernels", None)
    monkeypatch.delattr("ultralong_ray.parallel.triton_kernels", raising=False)
    elementwise.gpu_kernels.cache_clear()
    assert elementwise.gpu_kernels("cuda") is None
    assert "not fused" in caplog.text
    elementwise.gpu_kernels.cache_clear()
