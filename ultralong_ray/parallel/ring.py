"""Ring attention over the zigzag layout: local query, key and value in, exact causal attention over all ranks out.

Ring rank r of R holds chunks r ("early") and 2R - 1 - r ("late") of 2R (see topology.py), one after the other. Keys and
values go around the ring, step by step, and every step costs the same on every rank:

    own block          early and late rows, one causal call: their positions ascend, so the causal mask is right
    block of j < r     all rows    x  early chunk of j, without a mask (the late chunk of j is after every row here)
    block of j > r     late rows   x  both chunks of j, without a mask (all of j is after the early rows here)

Partial results are merged in float32 by their log-sum-exp, which is exact: a softmax over a union of keys is the mean
of the softmaxes over its parts, weighted with exp(log-sum-exp) (Ring Attention, arXiv 2310.01889). The backward pass of
one block with the *final* output and log-sum-exp is that block's share of the gradient, so dq adds up at home while dk
and dv travel in float32 with their block, one step behind it, until they are home.

Pure functions without autograd. While a block is computed the next one is on its way: transfers are posted before the
kernel is launched and waited for just before their data is read. With NCCL, wait() holds up the stream and not the
host. Read against torch 2.11 and 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh

WHOLE = slice(None)


def ring_forward(
    query: torch.Tensor,  # [batch, 2 * chunk, heads_local, head_dim], early rows, then late rows
    key: torch.Tensor,  # [batch, 2 * chunk, kv_heads_local, head_dim]
    value: torch.Tensor,
    scale: float,
    kernel: Kernel,
    mesh: SequenceMesh,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [batch, rows, heads_local, head_dim], log-sum-exp float32 [batch, heads_local, rows]).

    With `rows` (any number, but the same on all ranks of the ring) only the first rows of the query are attended, and
    get the bits of the call over all of them. Float64 inputs are computed in float64. Collective over the ring.
    """
    chunk = key.shape[1] // 2
    rows = key.shape[1] if rows is None else rows
    # Early rows look at no late chunk, nor at a block from further on: then the ring is a chain of early chunks.
    chain = rows <= chunk
    block = torch.stack((key[:, :chunk], value[:, :chunk]) if chain else (key, value))
    passing = _post(block, mesh, 0, chain)
    partial, lse = _attend(kernel, query, slice(0, rows), key, value, scale, True)
    output, lse = partial.to(lse.dtype), lse.contiguous()
    for step in range(1, mesh.ring_rank + 1 if chain else mesh.ring_degree):
        block = passing.arrived()  # [2, batch, chunk or 2 * chunk, kv_heads_local, head_dim]
        passing = _post(block, mesh, step, chain)
        at, keys = _visible(mesh, step, rows, chunk)
        part = _attend(kernel, query, at, block[0][:, keys], block[1][:, keys], scale, False)
        _merge(output[:, at], lse[:, :, at], *part)
    passing.finish()
    return output.to(query.dtype), lse


def ring_backward(
    grad_output: torch.Tensor,  # [batch, 2 * chunk, heads_local, head_dim]
    query: torch.Tensor,
    key: torch.Tensor,  # [batch, 2 * chunk, kv_heads_local, head_dim]
    value: torch.Tensor,
    output: torch.Tensor,  # as ring_forward returned it, all rows
    lse: torch.Tensor,  # float32 [batch, heads_local, 2 * chunk]
    scale: float,
    kernel: Kernel,
    mesh: SequenceMesh,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the local query, key and value, shaped and typed like them. Collective over the ring."""
    rows = query.shape[1]
    chunk = rows // 2
    block = torch.stack((key, value))
    passing = _post(block, mesh, 0)
    dq, dk, dv = kernel.backward(grad_output, query, key, value, output, lse, scale, True)
    grad_query = dq.to(lse.dtype)
    grad_block = torch.stack((dk.to(lse.dtype), dv.to(lse.dtype)))  # [2, batch, 2 * chunk, kv_heads_local, head_dim]
    for step in range(1, mesh.ring_degree):
        block = passing.arrived()
        passing = _post(block, mesh, step)
        returning = _post(grad_block, mesh)  # what is known so far of the block at hand, computed one rank back
        at, keys = _visible(mesh, step, rows, chunk)
        part = (query[:, at], block[0][:, keys], block[1][:, keys], output[:, at], lse[:, :, at].contiguous())
        dq, dk, dv = kernel.backward(grad_output[:, at], *part, scale, False)
        grad_query[:, at].add_(dq)
        grad_block = returning.arrived()
        grad_block[0][:, keys].add_(dk)
        grad_block[1][:, keys].add_(dv)
    passing.finish()
    grad_key, grad_value = _post(grad_block, mesh).arrived()  # the last step of the circle brings it home
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _visible(mesh: SequenceMesh, step: int, rows: int, chunk: int) -> tuple[slice, slice]:
    """(rows of the query, positions of the block) that meet at `step`: the block has come `step` ranks forward."""
    if step <= mesh.ring_rank:
        return slice(0, rows), slice(0, chunk)
    return slice(chunk, rows), WHOLE


def _attend(
    kernel: Kernel, query: torch.Tensor, at: slice, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the rows `at`, computed with as many more as their bits ask for."""
    asked = at.stop - at.start
    end = min(query.shape[1], at.start + -(-asked // kernel.row_alignment) * kernel.row_alignment)
    if causal:
        key, value = key[:, at.start : end], value[:, at.start : end]
    output, lse = kernel.forward(query[:, at.start : end], key, value, scale, causal)
    return output[:, :asked], lse[:, :, :asked]


def _merge(output: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor) -> None:
    """Take a partial result into the float32 `output` [batch, rows, heads, head_dim] and `lse` [batch, heads, rows].

    Only differences of log-sum-exps are exponentiated, so nothing overflows. In float64, which is cheap at one number
    per row and head, and rounds alike in vector and scalar code: the bits do not depend on how many rows there are.
    """
    known, new = lse.double(), partial_lse.double()
    share = torch.sigmoid(new - known).to(output.dtype)  # [batch, heads, rows], of the partial result in the merged one
    output.lerp_(partial.to(output.dtype), share.transpose(1, 2).unsqueeze(-1))
    lse.copy_(torch.logaddexp(known, new))


@dataclass(frozen=True, slots=True)
class _Passing:
    """A block on its way to the next rank while another arrives. Holds both, so that neither is freed in flight."""

    works: list[dist.Work]
    sent: torch.Tensor
    received: torch.Tensor | None

    def finish(self) -> None:
        for work in self.works:
            work.wait()

    def arrived(self) -> torch.Tensor:
        self.finish()
        assert self.received is not None
        return self.received


def _post(block: torch.Tensor, mesh: SequenceMesh, step: int | None = None, chain: bool = False) -> _Passing:
    """Start to send `block` to the next rank and to receive one like it from the rank before.

    With `step` it is a block of keys and values that has come `step` ranks forward, and stops where nobody needs it.
    """
    rank, degree = mesh.ring_rank, mesh.ring_degree
    sends = receives = step is None or step < degree - 1
    if chain and step is not None:  # block rank - step of a chain ends at the last rank
        sends, receives = rank < degree - 1, step < rank
    operations = []
    received = torch.empty_like(block) if receives else None
    if sends:
        operations.append(dist.P2POp(dist.isend, block, group=mesh.ring, group_peer=(rank + 1) % degree))
    if received is not None:
        operations.append(dist.P2POp(dist.irecv, received, group=mesh.ring, group_peer=(rank - 1) % degree))
    return _Passing(dist.batch_isend_irecv(operations) if operations else [], block, received)
