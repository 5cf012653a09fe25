"""The exchange around attention on two gloo ranks: which heads and rows arrive, how they lie, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.spawn import run_distributed
from ultralong_ray.parallel.mesh import SequenceMesh, create_mesh
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.parallel.ulysses import gather_sequence, scatter_sequence

DEGREE, LENGTH, HEADS, HEAD_DIM = 2, 6, 4, 3
CASES = [(batch, kv_heads) for batch in (1, 2) for kv_heads in (1, 2, 4)]


def numbered(batch: int, heads: int, first: int) -> torch.Tensor:
    """[batch, LENGTH, heads, HEAD_DIM], every element another number."""
    shape = (batch, LENGTH, heads, HEAD_DIM)
    return torch.arange(first, first + torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def solve(batch: int, kv_heads: int, mesh: SequenceMesh) -> dict[str, bool]:
    rank = dist.get_rank()
    rows = slice(rank * LENGTH // DEGREE, (rank + 1) * LENGTH // DEGREE)
    heads = slice(rank * HEADS // DEGREE, (rank + 1) * HEADS // DEGREE)
    # two query heads of a rank are served by two key-value heads of four, one of two, or the only one
    kv = {4: heads, 2: slice(rank, rank + 1), 1: slice(0, 1)}[kv_heads]
    whole = [numbered(batch, HEADS, 0), numbered(batch, kv_heads, 10_000), numbered(batch, kv_heads, 20_000)]
    local = [tensor[:, rows].clone().transpose(1, 2).requires_grad_() for tensor in whole]  # as transformers gives them
    gathered = gather_sequence(local[0], local[1], local[2], mesh)
    wanted = [whole[0][:, :, heads], whole[1][:, :, kv], whole[2][:, :, kv]]
    found = {"arrived": all(torch.equal(a, b) for a, b in zip(gathered, wanted, strict=True))}
    found["dense"] = all(tensor.stride(-1) == 1 for tensor in gathered)
    found["one buffer"] = len({tensor.untyped_storage().data_ptr() for tensor in gathered}) == 1
    # A loss whose gradient is the tensor itself, plus one for every rank that a head was sent to.
    sum(((tensor.detach() + 1) * tensor).sum() for tensor in gathered).backward()  # type: ignore[union-attr]
    receivers = [1, max(1, DEGREE // kv_heads), max(1, DEGREE // kv_heads)]
    gradients = [tensor.grad for tensor in local]
    found["gradients"] = all(
        grad is not None and torch.equal(grad.transpose(1, 2), (tensor[:, rows] + 1) * times)
        for grad, tensor, times in zip(gradients, whole, receivers, strict=True)
    )
    found["gradients lie like their tensors"] = all(
        grad is not None and grad.transpose(1, 2).is_contiguous() for grad in gradients
    )
    attended = (whole[0][:, :, heads] * 2).requires_grad_()
    scattered = scatter_sequence(attended, mesh)
    found["scattered"] = torch.equal(scattered, whole[0][:, rows] * 2) and scattered.is_contiguous()
    (scattered * whole[0][:, rows]).sum().backward()
    found["gradient scattered"] = attended.grad is not None and torch.equal(attended.grad, whole[0][:, :, heads])
    return found


def everything() -> list[dict[str, bool]]:
    mesh = create_mesh(Topology(DEGREE, dist.get_rank(), DEGREE))
    return [solve(batch, kv_heads, mesh) for batch, kv_heads in CASES]


@pytest.fixture(scope="module")
def by_rank() -> list[list[dict[str, bool]]]:
    return run_distributed(everything, DEGREE)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"batch {b}, {kv} kv heads" for b, kv in CASES])
def test_heads_rows_and_gradients_go_where_they_belong(by_rank: Any, index: int) -> None:
    for found in by_rank:
        assert [name for name, right in found[index].items() if not right] == []


def test_alone_nothing_is_copied() -> None:
    query, key = numbered(1, HEADS, 0).transpose(1, 2), numbered(1, 1, 0).transpose(1, 2)
    gathered = gather_sequence(query, key, key, SequenceMesh())
    assert [tensor.data_ptr() for tensor in gathered] == [query.data_ptr(), key.data_ptr(), key.data_ptr()]
    assert [tensor.shape[2] for tensor in gathered] == [HEADS, 1, 1]
    assert scatter_sequence(gathered[0], SequenceMesh()) is gathered[0]
