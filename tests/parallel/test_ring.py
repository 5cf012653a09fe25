"""Ring attention on four gloo ranks against one kernel over the whole sequence, and breakages that must show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.parallel.spawn import run_distributed
from ultralong_ray.parallel import ring
from ultralong_ray.parallel.kernels import math as math_kernel
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh, create_mesh
from ultralong_ray.parallel.topology import Topology, local_segments

RANKS = 4
LENGTH = 48
HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
RELATIVE = 1e-5
BFLOAT16 = 2**-7  # two roundings to 8 bits: of a partial result and of the merged one


@dataclass(frozen=True)
class Case:
    """Scores are multiplied by `sharpness` and, in the first half of the keys, shifted by `shift`."""

    ring: int
    heads: int = 4
    kv_heads: int = 2
    batch: int = 1
    length: int = LENGTH
    dtype: torch.dtype = torch.float32
    sharpness: float = 1.0
    shift: float = 0.0

    @property
    def largest_score(self) -> float:
        """About."""
        return max(abs(self.shift), 5 * self.sharpness)


CASES = [
    Case(2),
    Case(4),
    Case(4, batch=2),
    Case(2, batch=2, kv_heads=4),
    Case(4, heads=1, kv_heads=1),
    Case(4, heads=2, kv_heads=1, length=56),  # chunks of 7
    Case(4, dtype=torch.bfloat16),
    Case(4, dtype=torch.float64),
    Case(4, sharpness=1e3),
    Case(4, shift=100.0),  # exp(100) is beyond float32
    Case(4, shift=-100.0),
    Case(4, shift=3e4),
    Case(4, shift=-3e4),
]


def whole(case: Case) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the output's gradient of the whole sequence, [batch, length, heads, head_dim]."""
    generator = torch.Generator().manual_seed(case.length + case.heads)

    def draw(heads: int) -> torch.Tensor:
        drawn = torch.randn(case.batch, case.length, heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        return drawn

    query, key, value, grad = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    query[..., :-1] *= case.sharpness
    query[..., -1], key[..., -1] = 1.0, 0.0
    key[:, : case.length // 2, :, -1] = case.shift / SCALE
    return tuple(tensor.to(case.dtype) for tensor in (query, key, value, grad))


def float64_kernel(row_alignment: int = 1) -> Kernel:
    """The math kernel in float64, rounded to the inputs' type: it adds nothing to what the ring itself gets wrong.

    Rows beyond a multiple of `row_alignment` come out a little different, as kernels with large tiles may do.
    """

    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool) -> Any:
        output, lse = math_kernel.forward(query.double(), key.double(), value.double(), scale, causal)
        output[:, query.shape[1] // row_alignment * row_alignment :] *= 1 + 1e-3
        kept_in = torch.float64 if query.dtype == torch.float64 else torch.float32
        return output.to(query.dtype), lse.to(kept_in)

    def backward(
        grad_output: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
        causal: bool,
    ) -> Any:
        tensors = grad_output.double(), query.double(), key.double(), value.double(), output.double(), lse.double()
        return tuple(found.to(query.dtype) for found in math_kernel.backward(*tensors, scale, causal))

    return Kernel("float64", forward, backward, row_alignment=row_alignment)


def rows_of(length: int, degree: int, rank: int) -> torch.Tensor:
    segments = local_segments(length, Topology(degree, rank, 1, degree))
    return torch.cat([torch.arange(start, end) for start, end in segments])


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, infinite where something is not finite."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return error if math.isfinite(error) else math.inf


def solve(case: Case, mesh: SequenceMesh, kernel: Kernel) -> dict[str, float]:
    """How far this rank's output, log-sum-exp and gradients are from those of one call in float64."""
    everything = whole(case)
    query, key, value, grad = (tensor.double() for tensor in everything)
    output, lse = math_kernel.forward(query, key, value, SCALE, True)
    expected = (output, lse.mT, *math_kernel.backward(grad, query, key, value, output, lse, SCALE, True))
    mine = rows_of(case.length, case.ring, mesh.ring_rank)
    query, key, value, grad = (tensor[:, mine] for tensor in everything)
    output, lse = ring.ring_forward(query, key, value, SCALE, kernel, mesh)
    gradients = ring.ring_backward(grad, query, key, value, output, lse, SCALE, kernel, mesh)
    assert {output.dtype, *(gradient.dtype for gradient in gradients)} == {case.dtype}
    names, found = ("output", "lse", "dq", "dk", "dv"), (output, lse.mT, *gradients)
    errors = {}
    for name, tensor, wanted in zip(names, found, expected, strict=True):
        # the query's gradient along the shift of the scores is a difference of large numbers in any kernel
        shown = slice(None, -1) if name == "dq" else slice(None)
        errors[name] = distance(tensor[..., shown], wanted[:, mine][..., shown])
    return errors


def prefixes(mesh: SequenceMesh, kernel: Kernel) -> list[tuple[int, bool, bool]]:
    """(rows, same output bits, same log-sum-exp bits) of calls over the first rows against the call over all."""
    mine = rows_of(LENGTH, RANKS, mesh.ring_rank)
    query, key, value, _ = (tensor[:, mine] for tensor in whole(Case(RANKS, batch=2)))
    output, lse = ring.ring_forward(query, key, value, SCALE, kernel, mesh)
    found = []
    for rows in range(1, len(mine) + 1):
        some, some_lse = ring.ring_forward(query, key, value, SCALE, kernel, mesh, rows)
        found.append((rows, torch.equal(some, output[:, :rows]), torch.equal(some_lse, lse[:, :, :rows])))
    return found


def events(mesh: SequenceMesh) -> dict[str, list[Any]]:
    """What a rank does, in order: "post" a transfer, "wait" for it, or a kernel call as its number of scores."""
    seen: list[Any] = []
    inner, post = float64_kernel(), dist.batch_isend_irecv

    class Waited:
        def __init__(self, work: Any) -> None:
            self.work = work

        def wait(self) -> None:
            self.work.wait()
            seen.append("wait")

    def counted(call: Any, query_at: int) -> Any:
        def run(*arguments: Any) -> Any:
            rows, keys = (arguments[at].shape[1] for at in (query_at, query_at + 1))
            seen.append(rows * keys // (2 if arguments[-1] else 1))  # the last says whether it is causal
            return call(*arguments)

        return run

    def posted(operations: list[Any]) -> list[Any]:
        seen.append("post")
        works = post(operations)
        return [Waited(works[0]), *works[1:]]

    mine = rows_of(LENGTH, RANKS, mesh.ring_rank)
    query, key, value, grad = (tensor[:, mine] for tensor in whole(Case(RANKS)))
    kernel = Kernel("seen", counted(inner.forward, 0), counted(inner.backward, 1))
    dist.batch_isend_irecv = posted
    try:
        output, lse = ring.ring_forward(query, key, value, SCALE, kernel, mesh)
        forward_events = list(seen)
        seen.clear()
        ring.ring_backward(grad, query, key, value, output, lse, SCALE, kernel, mesh)
    finally:
        dist.batch_isend_irecv = post
    return {"forward": forward_events, "backward": list(seen)}


@contextmanager
def replaced(name: str, value: Any) -> Iterator[None]:
    original = getattr(ring, name)
    setattr(ring, name, value(original))
    try:
        yield
    finally:
        setattr(ring, name, original)


def _last_wins(output: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor) -> None:
    output.copy_(partial)
    lse.copy_(partial_lse)


def _raw_exponentials(
    output: torch.Tensor, lse: torch.Tensor, partial: torch.Tensor, partial_lse: torch.Tensor
) -> None:
    """The formula as it stands in a textbook."""
    known, new = lse.exp(), partial_lse.exp()
    share = (new / (known + new)).transpose(1, 2).unsqueeze(-1)
    output.copy_(output * (1 - share) + partial * share)
    lse.copy_((known + new).log())


def _gradients_stay(post: Callable[..., Any]) -> Callable[..., Any]:
    class Here:
        def __init__(self, block: torch.Tensor) -> None:
            self.block = block

        def arrived(self) -> torch.Tensor:
            return self.block

    return lambda block, mesh, step=None, chain=False: Here(block) if step is None else post(block, mesh, step, chain)


def _late_first(visible: Callable[..., Any]) -> Callable[..., Any]:
    """As if a block came from the other side of the ring."""
    return lambda mesh, step, rows, chunk: visible(mesh, mesh.ring_degree - step, rows, chunk)


BREAKAGES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "partial results replace each other": ("_merge", lambda _: _last_wins),
    "gradients of keys are not sent home": ("_post", _gradients_stay),
    "blocks taken for those of other ranks": ("_visible", _late_first),
}


def everything() -> dict[str, Any]:
    """All that is measured, in one start of four processes."""
    meshes = {degree: create_mesh(Topology(RANKS, dist.get_rank(), 1, degree)) for degree in (2, RANKS)}
    kernel = float64_kernel()
    found: dict[str, Any] = {"cases": [solve(case, meshes[case.ring], kernel) for case in CASES]}
    found["rows"] = prefixes(meshes[RANKS], kernel)
    found["aligned rows"] = prefixes(meshes[RANKS], float64_kernel(row_alignment=4))
    found["events"] = events(meshes[RANKS])
    for what, (name, value) in BREAKAGES.items():
        with replaced(name, value):
            found[what] = solve(Case(RANKS), meshes[RANKS], kernel)
    with replaced("_merge", lambda _: _raw_exponentials):
        found["raw exponentials"] = [solve(case, meshes[RANKS], kernel) for case in (Case(RANKS), CASES[-2])]
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[str, Any]]:
    return run_distributed(everything, RANKS)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[str(case) for case in CASES])
def test_output_and_gradients_equal_one_kernel_over_the_whole_sequence(by_rank: Any, index: int) -> None:
    case = CASES[index]
    bound = {torch.bfloat16: BFLOAT16, torch.float64: 1e-12}.get(case.dtype, RELATIVE)
    if case.largest_score > 50:  # float32 holds a log-sum-exp of 30,000 to 0.002: probabilities cannot be better
        bound = case.largest_score * 2**-21
    for found in by_rank:
        assert all(error < bound for error in found["cases"][index].values()), found["cases"][index]


@pytest.mark.parametrize("what", ["rows", "aligned rows"])
def test_first_rows_have_the_bits_of_the_call_over_all(by_rank: Any, what: str) -> None:
    for found in by_rank:
        assert [rows for rows, _, _ in found[what]] == list(range(1, LENGTH // RANKS + 1))
        assert all(output and lse for _, output, lse in found[what]), found[what]


def test_every_rank_computes_the_same_at_every_step_while_the_next_block_is_on_its_way(by_rank: Any) -> None:
    step = 2 * (LENGTH // (2 * RANKS)) ** 2  # scores: two chunks of rows meet one of keys, or one of rows two of keys
    for found in by_rank:
        assert found["events"]["forward"] == ["post", step, "wait"] * (RANKS - 1) + [step]
        between = [
            "wait",
            "post",
            "post",
            step,
            "wait",
        ]  # keys arrived; the next keys, and gradients; gradients arrived
        last = ["wait", "post", step, "wait", "post", "wait"]  # no next keys; gradients home
        assert found["events"]["backward"] == ["post", step] + between * (RANKS - 2) + last


@pytest.mark.parametrize("what", BREAKAGES)
def test_breakages_are_noticed(by_rank: Any, what: str) -> None:
    for found in by_rank:
        assert max(found[what].values()) > 100 * RELATIVE, what


def test_the_extreme_cases_are_extreme(by_rank: Any) -> None:
    for found in by_rank:
        mild, extreme = found["raw exponentials"]
        assert max(mild.values()) < RELATIVE
        assert max(extreme.values()) == math.inf
