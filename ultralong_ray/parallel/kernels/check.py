"""A kernel against float32 arithmetic on sampled rows: inputs of any length in, the largest errors out.

A whole reference at a million tokens would take minutes. A row of the output or of the query gradient needs one pass
over the keys, and a row of the key and value gradients one pass over the queries, so 64 of them cost seconds. The
reference takes the kernel's own log-sum-exp and output only where every row of them enters (key and value gradients).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ultralong_ray.parallel.kernels.kernel import Kernel

CHUNK_TOKENS = 32768  # keys or queries that are float32 at a time
NUM_SAMPLES = 64
# A row whose reference is shorter than this share of the longest is all cancellation; its error is set against that.
SMALLEST_NORM = 1e-3
# Query gradients of earlier rows are differences of almost equal numbers (of row 0: zero), so their error says nothing.
FIRST_DQ_ROW = 127


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest error of a sampled row: relative to the row's norm, absolute for the log-sum-exp. NaN is infinite."""

    output: float
    lse: float
    dq: float
    dk: float
    dv: float


def sampled_rows(seq: int, row_elements: int) -> list[int]:
    """Sorted positions in [0, seq): both ends, about 65,536, about the 2^31st element of rows `row_elements` apart,
    and others evenly between."""
    special = [0, 1, 127, 128, 65535, 65536, 65537, seq - 129, seq - 2, seq - 1]
    for boundary in (2**30, 2**31, 2**32):
        special += [boundary // row_elements + offset for offset in (-1, 0, 1)]
    chosen = {row for row in special if 0 <= row < seq}
    even = max(2, NUM_SAMPLES - len(chosen))
    chosen |= {row * (seq - 1) // (even - 1) for row in range(even)}
    return sorted(chosen)


def check_kernel(
    kernel: Kernel,
    query: torch.Tensor,  # [1, seq, group, head_dim]: query heads of one key-value head
    key: torch.Tensor,  # [1, seq, 1, head_dim]
    value: torch.Tensor,
    grad_output: torch.Tensor,  # [1, gradient_rows, group, head_dim]
    scale: float,
    rows: list[int],
) -> Errors:
    """Errors of the kernel's causal forward over all rows, and of its backward over the first `gradient_rows`."""
    output, lse = kernel.forward(query, key, value, scale, True)
    sampled = torch.tensor(rows, device=query.device)
    expected, expected_lse = reference_forward(query[0], key[0, :, 0], value[0, :, 0], scale, sampled)
    output_error = relative_error(output[0, sampled], expected)
    lse_error = _largest((lse[0][:, sampled].float() - expected_lse).abs())
    end = grad_output.shape[1]
    q, k, v, out = (t[:, :end] for t in (query, key, value, output))
    dq, dk, dv = kernel.backward(grad_output, q, k, v, out, lse[:, :, :end], scale, True)
    inside = sampled[sampled < end]
    settled = inside[inside >= min(FIRST_DQ_ROW, end - 1)]
    expected_dq = reference_dq(q[0], k[0, :, 0], v[0, :, 0], grad_output[0], scale, settled)
    expected_dk, expected_dv = reference_dkv(
        q[0], k[0, :, 0], v[0, :, 0], grad_output[0], out[0], lse[0, :, :end], scale, inside
    )
    return Errors(
        output=output_error,
        lse=lse_error,
        dq=relative_error(dq[0, settled], expected_dq),
        dk=relative_error(dk[0, inside, 0], expected_dk),
        dv=relative_error(dv[0, inside, 0], expected_dv),
    )


def reference_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of `rows` [samples] in float32: (output [samples, group, head_dim], lse [group, samples]).

    `query` [seq, group, head_dim], `key` and `value` [seq, head_dim].
    """
    q = query[rows].float()
    lse = torch.full((query.shape[1], len(rows)), float("-inf"), device=query.device)
    for _, scores in _row_scores(q, key, scale, rows):
        lse = torch.logaddexp(lse, scores.logsumexp(-1))
    output = torch.zeros_like(q)
    for chunk, scores in _row_scores(q, key, scale, rows):
        output += torch.einsum("gsk,kd->sgd", (scores - lse.unsqueeze(-1)).exp(), value[chunk].float())
    return output, lse


def reference_dq(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the query of `rows` in float32, [samples, group, head_dim]."""
    output, lse = reference_forward(query, key, value, scale, rows)
    q, grad = query[rows].float(), grad_output[rows].float()
    delta = (grad * output).sum(-1).T.unsqueeze(-1)  # [group, samples, 1]
    dq = torch.zeros_like(q)
    for chunk, scores in _row_scores(q, key, scale, rows):
        probabilities = (scores - lse.unsqueeze(-1)).exp()  # [group, samples, chunk]
        grad_scores = probabilities * (torch.einsum("sgd,kd->gsk", grad, value[chunk].float()) - delta)
        dq += torch.einsum("gsk,kd->sgd", grad_scores, key[chunk].float()) * scale
    return dq


def reference_dkv(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    output: torch.Tensor,  # [seq, group, head_dim], of the kernel
    lse: torch.Tensor,  # [group, seq], of the kernel
    scale: float,
    columns: torch.Tensor,  # [samples], the keys
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of key and value of `columns` in float32, [samples, head_dim] each."""
    k, v = key[columns].float(), value[columns].float()
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for chunk in _chunks(query.shape[0]):
        q, grad = query[chunk].float(), grad_output[chunk].float()  # [chunk, group, head_dim]
        delta = (grad * output[chunk].float()).sum(-1).T.unsqueeze(-1)  # [group, chunk, 1]
        scores = torch.einsum("qgd,sd->gqs", q, k) * scale - lse[:, chunk].float().unsqueeze(-1)
        positions = torch.arange(chunk.start, chunk.stop, device=query.device)
        probabilities = scores.exp().masked_fill_(positions[:, None] < columns, 0.0)  # [group, chunk, samples]
        dv += torch.einsum("gqs,qgd->sd", probabilities, grad)
        grad_scores = probabilities * (torch.einsum("qgd,sd->gqs", grad, v) - delta)
        dk += torch.einsum("gqs,qgd->sd", grad_scores, q) * scale
    return dk, dv


def _row_scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, rows: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(keys, scores [group, samples, keys]) for one stretch of keys after another, -inf where a key comes later."""
    for chunk in _chunks(key.shape[0]):
        scores = torch.einsum("sgd,kd->gsk", query, key[chunk].float()) * scale
        positions = torch.arange(chunk.start, chunk.stop, device=key.device)
        yield chunk, scores.masked_fill_(positions > rows[:, None], float("-inf"))


def _chunks(seq: int) -> Iterator[slice]:
    for start in range(0, seq, CHUNK_TOKENS):
        yield slice(start, min(seq, start + CHUNK_TOKENS))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |found - expected| / |expected| of a row of the last dimension, in Euclidean norm."""
    norm = expected.norm(dim=-1)
    return _largest((found.float() - expected).norm(dim=-1) / norm.clamp_min(norm.max() * SMALLEST_NORM))


def _largest(errors: torch.Tensor) -> float:
    return float(errors.nan_to_num(nan=float("inf")).max())
