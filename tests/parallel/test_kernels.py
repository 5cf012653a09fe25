"""Kernels against an explicit mask, the split over heads, and the choice with its reasons."""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from ultralong_ray.parallel.kernels import choose, cudnn, flash_attn_2, flash_attn_3, flash_attn_4, math, sdpa_flash
from ultralong_ray.parallel.kernels.choose import CANDIDATES, Candidate, choose_kernel, explain, select
from ultralong_ray.parallel.kernels.kernel import Kernel, Setting, dense, head_pieces, within_limit
from ultralong_ray.types import UserError

CPU_KERNELS = [math.load(), sdpa_flash.load()]
HOPPER = Setting("cuda", (9, 0), torch.bfloat16, 128)
SCALE = 0.3


def tensors(rows: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Query, key, value and a gradient of the output, [2, rows, heads, 8]."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(2, rows, n, 8, generator=generator).to(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, rows, heads, head_dim] and log-sum-exp [batch, heads, rows], from whole scores."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * SCALE
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [1, 24, 300])
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_output_sums_and_gradients_equal_those_of_an_explicit_mask(kernel: Kernel, rows: int, causal: bool) -> None:
    q, k, v, grad = tensors(rows)
    if not causal:
        k, v = tensors(170)[1:3]  # another number of keys
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = explicit(whole[0], whole[1], whole[2], causal)
    expected.backward(grad)
    output, lse = kernel.forward(q, k, v, SCALE, causal)
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-6, rtol=1e-5)
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    for mine, theirs in zip(kernel.backward(grad, q, k, v, output, lse, SCALE, causal), whole, strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=5e-6, rtol=1e-5)


def test_math_is_exact_to_float64_for_float64() -> None:
    q, k, v, grad = tensors(140, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    expected, _ = explicit(whole[0], whole[1], whole[2], True)
    expected.backward(grad)
    output, lse = math.forward(q, k, v, SCALE, True)
    torch.testing.assert_close(output, expected, atol=1e-14, rtol=1e-13)
    assert lse.dtype == torch.float64
    for mine, theirs in zip(math.backward(grad, q, k, v, output, lse, SCALE, True), whole, strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_backward_takes_the_sums_over_keys_that_it_does_not_see(kernel: Kernel) -> None:
    q, k, v, grad = tensors(96)
    output, lse = kernel.forward(q, k, v, SCALE, False)
    whole = kernel.backward(grad, q, k, v, output, lse, SCALE, False)
    halves = [kernel.backward(grad, q, k[:, h], v[:, h], output, lse, SCALE, False) for h in (slice(40), slice(40, 96))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0], atol=2e-6, rtol=1e-5)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([halves[0][i], halves[1][i]], 1), whole[i], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_the_first_rows_alone_have_the_same_bits(kernel: Kernel, dtype: torch.dtype) -> None:
    q, k, v, _ = tensors(1300, heads=2, kv_heads=1, dtype=dtype)
    output, lse = kernel.forward(q, k, v, SCALE, True)
    across, across_lse = kernel.forward(q, k, v, SCALE, False)
    chosen = (1, 77, 128, 700, 1299) if kernel.row_alignment == 1 else (512, 1024)
    for rows in chosen:
        assert rows % kernel.row_alignment == 0
        first, first_lse = kernel.forward(q[:, :rows], k[:, :rows], v[:, :rows], SCALE, True)
        assert torch.equal(first, output[:, :rows]) and torch.equal(first_lse, lse[:, :, :rows])
        first, first_lse = kernel.forward(q[:, :rows], k, v, SCALE, False)
        assert torch.equal(first, across[:, :rows]) and torch.equal(first_lse, across_lse[:, :, :rows])


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda kernel: kernel.name)
def test_views_of_a_fused_projection_are_read_as_they_are(kernel: Kernel) -> None:
    q, k, v, grad = tensors(40)
    fused = torch.cat([q, k, v], 2)
    a, b, c = fused.split([4, 2, 2], 2)
    output, lse = kernel.forward(q, k, v, SCALE, True)
    assert torch.equal(kernel.forward(a, b, c, SCALE, True)[0], output)
    spread = grad.sum().expand_as(grad)  # what a sum hands back: no stride at all
    for mine, theirs in zip(
        kernel.backward(spread, a, b, c, output, lse, SCALE, True),
        kernel.backward(spread.clone(), q, k, v, output, lse, SCALE, True),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_dense_copies_only_what_cannot_be_read_16_bytes_at_a_time() -> None:
    heads = torch.zeros(2, 6, 5, 8, dtype=torch.bfloat16)
    assert dense(heads[:, 1:, 2:4]).data_ptr() == heads[:, 1:, 2:4].data_ptr()
    for strange in (heads.transpose(2, 3), heads[..., 1:], torch.zeros(2, 6, 5, 12, dtype=torch.bfloat16)[..., :8]):
        assert not strange.is_contiguous() and dense(strange).is_contiguous()
    unaligned = torch.zeros(2 * 6 * 8 + 1, dtype=torch.bfloat16)[1:].view(2, 6, 1, 8)
    assert dense(unaligned).data_ptr() != unaligned.data_ptr()


def recorded(kernel: Kernel, calls: list[tuple[int, int]], limit: int) -> Kernel:
    """The kernel with a limit, which notes the heads of every call."""

    def forward(q: Any, k: Any, *rest: Any) -> Any:
        calls.append((q.shape[2], k.shape[2]))
        assert q.numel() <= limit
        return kernel.forward(q, k, *rest)

    def backward(grad: Any, q: Any, k: Any, *rest: Any) -> Any:
        calls.append((q.shape[2], k.shape[2]))
        return kernel.backward(grad, q, k, *rest)

    return replace(kernel, forward=forward, backward=backward, max_elements=limit)


@pytest.mark.parametrize(
    ("limit_heads", "calls"),
    [(12, [(12, 3)]), (8, [(8, 2), (4, 1)]), (5, [(4, 1)] * 3), (3, [(3, 1), (1, 1)] * 3), (1, [(1, 1)] * 12)],
)
def test_a_tensor_beyond_the_limit_is_computed_some_heads_at_a_time(
    limit_heads: int, calls: list[tuple[int, int]]
) -> None:
    q, k, v, grad = tensors(20, heads=12, kv_heads=3)
    seen: list[tuple[int, int]] = []
    split = within_limit(recorded(math.load(), seen, limit_heads * 2 * 20 * 8))
    output, lse = split.forward(q, k, v, SCALE, True)
    assert seen == calls
    expected, expected_lse = math.forward(q, k, v, SCALE, True)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)
    found = split.backward(grad, q, k, v, output, lse, SCALE, True)
    assert seen == calls * 2
    for mine, theirs in zip(found, math.backward(grad, q, k, v, output, lse, SCALE, True), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def test_four_million_tokens_on_eight_ranks_are_one_call_and_on_four_are_two() -> None:
    for degree, pieces in ((8, 1), (4, 2)):
        query = torch.empty(1, 2**22, 32 // degree, 128, device="meta")
        key = torch.empty(1, 2**22, 8 // degree, 128, device="meta")
        assert len(list(head_pieces(query, key, 2**31))) == pieces


def test_reasons_name_what_the_device_lacks() -> None:
    def said(**changes: Any) -> dict[str, str | None]:
        return {candidate.name: candidate.refusal(replace(HOPPER, **changes)) for candidate in CANDIDATES}

    assert list(said()) == ["flash_attn_4", "flash_attn_3", "cudnn", "flash_attn_2", "sdpa_flash", "math"]
    assert set(said().values()) == {None}
    ampere = said(capability=(8, 0))
    assert ampere["flash_attn_4"] == "needs sm_90 or sm_100, this is sm_80"
    assert ampere["flash_attn_3"] == "needs sm_90, this is sm_80" and ampere["cudnn"] is not None
    assert ampere["flash_attn_2"] is ampere["sdpa_flash"] is None
    assert said(capability=(10, 0))["flash_attn_3"] == "needs sm_90, this is sm_100"
    assert said(capability=(12, 0))["flash_attn_4"] == "needs sm_90 or sm_100, this is sm_120"
    assert said(capability=(7, 5))["sdpa_flash"] == "needs sm_80 or later, this is sm_75"
    single = said(dtype=torch.float32)
    assert {name for name, reason in single.items() if reason is None} == {"math"}
    assert single["sdpa_flash"] == "takes bfloat16 and float16 only, this is float32"
    assert {name for name, reason in said(head_dim=60).items() if reason is None} == {"math"}
    assert "head_dim up to 128" in str(said(head_dim=192)["cudnn"]) and said(head_dim=192)["flash_attn_4"] is None
    assert said(head_dim=192, capability=(10, 0))["flash_attn_4"] is not None
    on_cpu = said(device_type="cpu", capability=None, dtype=torch.float32, head_dim=60)
    assert {name for name, reason in on_cpu.items() if reason is None} == {"sdpa_flash", "math"}


def absent() -> Kernel:
    raise ImportError("not installed (pip install a)")


GOOD = math.load()
TABLE = (
    Candidate("a", lambda _: None, absent),
    Candidate("b", lambda _: "needs sm_90, this is sm_80", lambda: GOOD),
    Candidate("c", lambda _: None, lambda: replace(GOOD, name="c")),
    Candidate("d", lambda _: None, lambda: GOOD),
)


def test_the_first_that_runs_is_chosen_and_every_better_one_named() -> None:
    def attempt(kernel: Kernel) -> str | None:
        return "fails on a small problem" if kernel.name == "c" else None

    kernel, refused = select("auto", HOPPER, TABLE, attempt)
    assert kernel is GOOD
    assert refused == {
        "a": "not installed (pip install a)",
        "b": "needs sm_90, this is sm_80",
        "c": "fails on a small problem",
    }
    assert select("c", HOPPER, TABLE, lambda _: None)[0].name == "c"


def test_a_forced_kernel_that_cannot_run_is_refused_with_the_ones_that_can() -> None:
    with pytest.raises(UserError) as refusal:
        select("a", HOPPER, TABLE, lambda _: None)
    assert 'attention = "a" cannot run: not installed (pip install a). "c" can' in str(refusal.value)
    assert "passed over: b: needs sm_90" in str(refusal.value)
    with pytest.raises(UserError, match="no attention kernel can run here; passed over: a: not"):
        select("auto", HOPPER, TABLE[:2], lambda _: None)


def test_on_cpu_the_choice_is_logged_with_one_reason_for_all_gpu_kernels(caplog: pytest.LogCaptureFixture) -> None:
    choose_kernel.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        kernel = choose_kernel("auto", torch.device("cpu"), torch.float32, 16)
        choose_kernel("auto", torch.device("cpu"), torch.float32, 16)
    assert kernel.name == "sdpa_flash"
    expected = "passed over: flash_attn_4, flash_attn_3, cudnn, flash_attn_2: needs a CUDA device"
    assert [record.getMessage() for record in caplog.records] == [f"attention kernel: sdpa_flash; {expected}"]
    assert choose_kernel("math", torch.device("cpu"), torch.float32, 16).name == "math"
    with pytest.raises(UserError, match=r'attention = "cudnn" cannot run: needs a CUDA device\. "sdpa_flash" can'):
        choose_kernel("cudnn", torch.device("cpu"), torch.float32, 16)
    choose_kernel.cache_clear()
    assert explain({}) == ""


class Library:
    """The functions of every flash-attention package, computed by the reference; `extra` more results of forward."""

    def __init__(self, extra: int) -> None:
        self.extra = extra

    def _flash_attn_fwd(self, q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, return_lse: bool) -> Any:
        assert return_lse
        return *math.forward(q, k, v, softmax_scale, causal), *[None] * self.extra

    def _flash_attn_bwd(
        self, q: Any, k: Any, v: Any, out: Any, dout: Any, lse: Any, *, softmax_scale: float, causal: bool
    ) -> Any:
        return *math.backward(dout, q, k, v, out, lse, softmax_scale, causal), *[None] * self.extra

    def _flash_attn_forward(self, q: Any, k: Any, v: Any, *, softmax_scale: float, causal: bool, **rest: Any) -> Any:
        assert rest.get("dropout_p", 0.0) == 0.0
        return *math.forward(q, k, v, softmax_scale, causal), *[None] * self.extra

    def _flash_attn_backward(
        self,
        dout: Any,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        dq: Any,
        dk: Any,
        dv: Any,
        *,
        softmax_scale: float,
        causal: bool,
        **rest: Any,
    ) -> None:
        for into, found in zip(
            (dq, dk, dv), math.backward(dout, q, k, v, out, lse, softmax_scale, causal), strict=True
        ):
            into.copy_(found)


class Hopper(Library):
    """The spelling of FlashAttention-3's backward."""

    def _flash_attn_backward(self, *tensors: Any, is_causal: bool = False, **rest: Any) -> None:  # type: ignore[override]
        Library._flash_attn_backward(self, *tensors, causal=is_causal, **rest)


@pytest.mark.parametrize("extra", [0, 2, 3])
@pytest.mark.parametrize(
    "bound",
    [
        lambda n: flash_attn_4.bind(Library(n)),
        lambda n: flash_attn_3.bind(Hopper(n)),
        lambda n: flash_attn_3.bind(Library(n)),
        lambda n: flash_attn_2.bind(Library(n)),
    ],
    ids=["4", "3", "3 older", "2"],
)
def test_packages_are_called_by_the_names_they_have_whatever_else_they_return(bound: Any, extra: int) -> None:
    kernel = bound(extra)
    q, k, v, grad = tensors(30)
    output, lse = kernel.forward(q, k, v, SCALE, True)
    expected = math.backward(grad, q, k, v, output, lse, SCALE, True)
    assert torch.equal(lse, explicit(q, k, v, True)[1]) or torch.allclose(lse, explicit(q, k, v, True)[1], atol=1e-5)
    for mine, theirs in zip(kernel.backward(grad, q, k, v, output, lse, SCALE, True), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_absent_packages_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(ImportError, match=r"not installed \(pip install flash-attn-4\)"):
        flash_attn_4.load()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    with pytest.raises(ImportError, match="without cuDNN"):
        cudnn.load()


def test_the_old_copy_of_cute_inside_flash_attn_2_is_noticed(tmp_path: Path) -> None:
    info = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n")
    (info / "RECORD").write_text("flash_attn/cute/interface.py,sha256=x,5\n")
    interface = tmp_path / "flash_attn" / "cute" / "interface.py"
    interface.parent.mkdir(parents=True)
    installed = metadata.Distribution.at(info)
    interface.write_text("12345")
    assert flash_attn_4.overwritten(installed) is None
    interface.write_text("another file")
    assert "old copy inside flash-attn; pip install --force-reinstall" in str(flash_attn_4.overwritten(installed))
