"""Core attention against an explicit mask, the separation of documents, and what a replay makes of kept rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from ultralong_ray.parallel import attention
from ultralong_ray.parallel.attention import aligned_rows, core_attention
from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.documents import document_layout
from ultralong_ray.parallel.kernels import math, sdpa_flash
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.types import UserError

CPU = torch.device("cpu")
KERNELS = [math.load(), sdpa_flash.load()]
SCALE = 0.3
# lengths 1, 2, 3, 4, 5 and 9 in one row and an undivided row: shared and lone buckets, with and without padding
DOCUMENT_IDS = np.stack([np.repeat(np.arange(6), [1, 5, 2, 9, 3, 4]), np.zeros(24, int)]).astype(np.int32)

every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


def context(kernel: Kernel, ids: np.ndarray | None = None, **changes: Any) -> AttentionContext:
    layout = None if ids is None else document_layout(ids, CPU)
    return AttentionContext(SequenceMesh(), kernel, layout, **changes)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: np.ndarray | None) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    length = q.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    allowed = torch.ones(length, length).tril().bool().expand(q.shape[0], 1, -1, -1)
    if ids is not None:
        allowed = allowed & torch.from_numpy(ids[:, None, :, None] == ids[:, None, None, :])
    return ((q @ k.mT * SCALE).masked_fill(~allowed, float("-inf")).softmax(-1) @ v).transpose(1, 2)


def tensors(batch: int = 2, rows: int = 24, heads: int = 4, kv_heads: int = 2, dtype: Any = None) -> list[torch.Tensor]:
    """Query, key and value, leaves of a graph."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, rows, n, 8) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@every_kernel
@pytest.mark.parametrize("ids", [None, DOCUMENT_IDS], ids=["causal", "documents"])
def test_output_and_gradients_equal_those_of_an_explicit_mask(kernel: Kernel, ids: np.ndarray | None) -> None:
    qkv, expected_qkv = tensors(), tensors()
    found = core_attention(qkv[0], qkv[1], qkv[2], SCALE, context(kernel, ids))
    expected = explicit(expected_qkv[0], expected_qkv[1], expected_qkv[2], ids)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(qkv, expected_qkv, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_gradients_in_float64_are_those_of_finite_differences() -> None:
    q, k, v = tensors(batch=1, rows=9, heads=2, kv_heads=1, dtype=torch.float64)
    ids = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 3]], np.int32)
    for documents in (None, ids):
        core = context(math.load(), documents)
        assert torch.autograd.gradcheck(
            lambda *t, core=core: core_attention(t[0], t[1], t[2], SCALE, core), (q, k, v), fast_mode=True
        )


@every_kernel
def test_padding_rows_leave_no_trace_however_large_their_scores_are(kernel: Kernel) -> None:
    """A padding row repeats a document's first token, whose log-sum-exp says nothing about later keys."""
    q, k, v = tensors(batch=1, rows=8, heads=2, kv_heads=1)
    with torch.no_grad():
        # the first token of the padded document likes the next key and not its own: its log-sum-exp is about -100, its
        # score with that key 100, and the exponential of their difference infinite in float32
        k[:, 5] = 6.5
        k[:, 4], q[:, 4] = -k[:, 5], 6.5
    ids = np.array([[0, 0, 0, 0, 1, 1, 1, 2]], np.int32)
    core_attention(q, k, v, SCALE, context(kernel, ids)).sum().backward()
    found = [t.grad for t in (q, k, v)]
    for t in (q, k, v):
        t.grad = None
    explicit(q, k, v, ids).sum().backward()
    for mine, leaf in zip(found, (q, k, v), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, leaf.grad, atol=2e-3, rtol=1e-3)  # saturated rows cancel


def test_other_documents_do_not_notice_a_changed_token() -> None:
    q, k, v = (t.detach() for t in tensors())
    masked, causal = context(KERNELS[1], DOCUMENT_IDS), context(KERNELS[1])
    before, causal_before = core_attention(q, k, v, SCALE, masked), core_attention(q, k, v, SCALE, causal)
    changed = 10  # in the document of 9 tokens at [8, 17)
    k[0, changed] += 1.0
    v[0, changed] += 1.0
    after, causal_after = core_attention(q, k, v, SCALE, masked), core_attention(q, k, v, SCALE, causal)
    same = (before == after).all(dim=-1).all(dim=-1)  # [batch, seq]
    assert same[1].all()
    assert same[0].nonzero().flatten().tolist() == [*range(0, 10), *range(17, 24)]
    assert not (causal_before == causal_after)[0, 17:].all()


@dataclass
class Kept:
    """Keeps the last `rows` rows of what it is given."""

    rows: int | None  # None: nothing
    replaying: bool = False
    held: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def save(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        if self.rows is not None:
            start = output.shape[1] - self.rows
            self.held.append((output[:, start:], lse[:, :, start:]))

    def load(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return self.held[0] if self.held else None


def counted(kernel: Kernel, rows: list[int]) -> Kernel:
    """The kernel, noting the query rows of every forward call."""

    def forward(q: torch.Tensor, *rest: Any) -> Any:
        rows.append(q.shape[1])
        return kernel.forward(q, *rest)

    return replace(kernel, forward=forward)


def replayed(
    kernel: Kernel, rows: int | None, ids: np.ndarray | None, dtype: Any
) -> tuple[list[torch.Tensor], list[int]]:
    """Output and gradients of a forward pass whose graph is dropped and of its replay, and the rows of its calls."""
    seq = 1100 if ids is None else ids.shape[1]
    q, k, v = tensors(batch=1, rows=seq, heads=2, kv_heads=1, dtype=dtype)
    calls: list[int] = []
    kept = Kept(rows)
    core = context(counted(kernel, calls), ids, kept=kept)
    with torch.no_grad():
        first = core_attention(q, k, v, SCALE, core)
    calls.clear()
    kept.replaying = True
    output = core_attention(q, k, v, SCALE, core)
    assert torch.equal(output, first)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (output * weights).sum().backward()
    grads = [t.grad for t in (q, k, v)]
    assert all(grad is not None for grad in grads)
    return [output.detach(), *[grad for grad in grads if grad is not None]], calls


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kept_partly_kept_and_computed_attention_have_the_same_bits(kernel: Kernel, dtype: torch.dtype) -> None:
    expected, calls = replayed(kernel, None, None, dtype)
    assert calls == [1100]
    # rows kept -> rows computed again: as few as the kernel's alignment allows
    computed = {1100: [], 550: [550], 76: [1024], 70: [1030]}
    if kernel.row_alignment == 512:
        computed = {1100: [], 550: [1024], 600: [512], 588: [512], 76: [1024], 70: [1100]}
    for rows, expected_calls in computed.items():
        found, calls = replayed(kernel, rows, None, dtype)
        assert calls == expected_calls
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True)), rows


@every_kernel
def test_with_documents_all_kept_is_used_and_partly_kept_is_computed_again(kernel: Kernel) -> None:
    ids = DOCUMENT_IDS[:1]
    expected, calls = replayed(kernel, None, ids, torch.float32)
    assert len(calls) == 5  # documents of 1, 2, 3-4, 5 and 9 tokens
    for rows, expected_calls in ((24, 0), (12, 5)):
        found, calls = replayed(kernel, rows, ids, torch.float32)
        assert len(calls) == expected_calls
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_what_is_kept_is_not_tied_to_the_graph_that_uses_it() -> None:
    q, k, v = tensors()
    kept = Kept(24)
    core = context(math.load(), kept=kept)
    core_attention(q, k, v, SCALE, core)
    kept.replaying = True
    output = core_attention(q, k, v, SCALE, core)
    assert output.requires_grad and not kept.held[0][0].requires_grad
    assert output.data_ptr() == kept.held[0][0].data_ptr()


def test_a_tensor_beyond_the_limit_of_one_call_gives_the_same() -> None:
    found, expected = tensors(), tensors()
    limited = replace(math.load(), max_elements=found[0].numel() // 4)
    for qkv, kernel in ((found, limited), (expected, math.load())):
        core_attention(qkv[0], qkv[1], qkv[2], SCALE, context(kernel)).square().sum().backward()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_a_ring_is_given_rows_aligned_in_both_of_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = SequenceMesh(ring_degree=2)
    core = AttentionContext(mesh, KERNELS[1])
    # two chunks of 1024 rows, then of 1100: the call that begins with the second chunk would end between two blocks
    assert [aligned_rows(rows, 2048, core) for rows in (1, 512, 1024, 1025, 2047)] == [512, 512, 1024, 1536, 2048]
    assert [aligned_rows(rows, 2200, core) for rows in (1, 1024, 1025, 1800)] == [512, 1024, 2200, 2200]
    alone = replace(core, mesh=SequenceMesh())
    assert [aligned_rows(rows, 2200, alone) for rows in (1, 1025, 1800, 2199)] == [512, 1536, 2048, 2200]
    asked: list[int | None] = []

    def ring(q: torch.Tensor, k: Any, v: Any, scale: float, kernel: Kernel, mesh: Any, rows: int | None = None) -> Any:
        asked.append(rows)
        output, lse = math.forward(q, k, v, scale, True)
        return output[:, :rows], lse[:, :, :rows]

    monkeypatch.setattr(attention, "ring_forward", ring)
    q, k, v = (t.detach() for t in tensors(batch=1, rows=40))
    kept = Kept(10)
    core = AttentionContext(mesh, replace(math.load(), row_alignment=4), kept=kept)
    first = core_attention(q, k, v, SCALE, core)
    kept.replaying = True
    assert torch.equal(core_attention(q, k, v, SCALE, core), first)
    assert asked == [None, 32]


def test_documents_masked_over_a_ring_are_refused() -> None:
    q, k, v = tensors()
    core = AttentionContext(SequenceMesh(ring_degree=2), math.load(), document_layout(DOCUMENT_IDS, CPU))
    with pytest.raises(UserError, match="mask_documents = true with ring_degree 2"):
        core_attention(q, k, v, SCALE, core)
