"""Core attention against an explicit mask, and the separation of documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ultralong_ray.parallel.attention import core_attention, document_layout

CPU = torch.device("cpu")
# lengths 1, 2, 3, 4, 5 and 9 in one row and an undivided row: shared and lone buckets, with and without padding
DOCUMENT_IDS = np.stack([np.repeat(np.arange(6), [1, 5, 2, 9, 3, 4]), np.zeros(24, int)]).astype(np.int32)


def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, ids: np.ndarray | None) -> torch.Tensor:
    length = q.shape[2]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    allowed = torch.ones(length, length).tril().bool().expand(q.shape[0], 1, -1, -1)
    if ids is not None:
        allowed = allowed & torch.from_numpy(ids[:, None, :, None] == ids[:, None, None, :])
    return (q @ k.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1) @ v


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 24, 8, generator=generator, requires_grad=True)
    key = torch.randn(2, 2, 24, 8, generator=generator, requires_grad=True)
    value = torch.randn(2, 2, 24, 8, generator=generator, requires_grad=True)
    return query, key, value


@pytest.mark.parametrize("ids", [None, DOCUMENT_IDS], ids=["causal", "documents"])
def test_output_and_gradients_equal_those_of_an_explicit_mask(ids: np.ndarray | None) -> None:
    qkv, expected_qkv = tensors(), tensors()
    layout = None if ids is None else document_layout(ids, CPU)
    found, expected = core_attention(*qkv, 0.3, layout), explicit(*expected_qkv, 0.3, ids)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(qkv, expected_qkv, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)


def test_other_documents_do_not_notice_a_changed_token() -> None:
    q, k, v = (t.detach() for t in tensors())
    layout = document_layout(DOCUMENT_IDS, CPU)
    before, causal_before = core_attention(q, k, v, 0.3, layout), core_attention(q, k, v, 0.3, None)
    changed = 10  # in the document of 9 tokens at [8, 17)
    k[0, :, changed] += 1.0
    v[0, :, changed] += 1.0
    after, causal_after = core_attention(q, k, v, 0.3, layout), core_attention(q, k, v, 0.3, None)
    same = (before == after).all(dim=-1).all(dim=1)  # [batch, seq]
    assert same[1].all()
    assert same[0].nonzero().flatten().tolist() == [*range(0, 10), *range(17, 24)]
    assert not (causal_before == causal_after)[0, :, 17:].all()
