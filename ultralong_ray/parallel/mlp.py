"""The gated MLP of a decoder layer in tiles of rows, without a third forward when the layer is replayed.

Flows in: the normed hidden states of a layer. Flows out: the MLP's output; in the backward pass the gradients of the
hidden states and of the weights. No intermediate of more than a tile exists, and none is kept:

    forward   gate, up, silu(gate) * up, down          by tile, nothing kept but the input
    replay    nothing: only residual additions follow, and no gradient reads their value
    backward  gate, up again, then all gradients        by tile, weight gradients summed in float32

Plain checkpointing of a tiled MLP runs its forward three times (once, once in the replay, once more in its own
backward). transformers 5.17-5.23: Llama, Qwen2, Qwen3 and Mistral share this shape of MLP.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ultralong_ray.parallel.elementwise import swiglu, swiglu_backward
from ultralong_ray.types import UserError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def install_tiled_mlp(mlp: nn.Module, tile_tokens: int, value_unread: Callable[[], bool]) -> None:
    """Give this MLP a forward in tiles. `value_unread` says whether the output's value is needed just now.

    Raises UserError for an MLP that is not down_proj(silu(gate_proj(x)) * up_proj(x)).
    """
    refuse_other_shapes(mlp)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        linears = [getattr(mlp, name) for name in PROJECTIONS]
        return _TiledMLP.apply(
            hidden, *(part.weight for part in linears), *(part.bias for part in linears), tile_tokens, value_unread()
        )

    mlp.forward = forward


def refuse_other_shapes(mlp: nn.Module) -> None:
    """UserError naming what is missing or different."""
    name = type(mlp).__name__
    linears = [getattr(mlp, part, None) for part in PROJECTIONS]
    remedy = "set gradient_checkpointing to false, or train a dense Llama, Qwen or Mistral model"
    if not all(isinstance(part, nn.Linear) for part in linears):
        found = ", ".join(child for child, _ in mlp.named_children()) or "no parts"
        raise UserError(f"the model's MLP {name} ({found}) is not made of {', '.join(PROJECTIONS)}; {remedy}")
    # torch's own class, or the one that transformers 5 puts in its place
    if type(getattr(mlp, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        activation = type(getattr(mlp, "act_fn", None)).__name__
        raise UserError(f"the model's MLP {name} has the activation {activation}, not SiLU; {remedy}")


def tile_slices(rows: int, tile_tokens: int) -> list[slice]:
    """Consecutive slices of at most `tile_tokens` rows, as equal as can be: a short last one would waste the GPU."""
    tiles = max(1, -(-rows // tile_tokens))
    bounds = [rows * tile // tiles for tile in range(tiles + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


class _TiledMLP(torch.autograd.Function):
    """hidden [..., hidden_size]; gate and up weights [intermediate, hidden_size], down [hidden_size, intermediate]."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        weights, biases, (tile_tokens, unread) = rest[:3], rest[3:6], rest[6:]
        ctx.save_for_backward(hidden, *weights, *biases)
        ctx.tile_tokens = tile_tokens
        if unread:
            return unread_output(hidden)
        rows = hidden.flatten(0, -2)  # [rows, hidden_size]
        output = torch.empty_like(rows)
        for tile in tile_slices(len(rows), tile_tokens):
            active = swiglu(*gate_and_up(rows[tile], weights, biases))
            output[tile] = linear(active, weights[2], biases[2])
        return output.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        weights, biases = tuple(parameters[:3]), tuple(parameters[3:])
        grad_output = grads[0].flatten(0, -2)  # [rows, hidden_size]
        rows = hidden.flatten(0, -2)
        grad_rows = torch.empty_like(rows)
        tiles = tile_slices(len(rows), ctx.tile_tokens)
        sums = [None if p is None else GradientSum(p, len(tiles)) for p in parameters]
        for tile in tiles:
            _tile_backward(rows[tile], grad_output[tile], grad_rows[tile], weights, biases, sums)
        return grad_rows.view_as(hidden), *(None if total is None else total.result() for total in sums), None, None


def unread_output(hidden: torch.Tensor) -> torch.Tensor:
    """Something of the output's shape: one number, taking no memory."""
    return hidden.new_zeros(()).expand_as(hidden)


def gate_and_up(
    rows: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two first products of the MLP, [rows, intermediate] each."""
    return linear(rows, weights[0], biases[0]), linear(rows, weights[1], biases[1])


def _tile_backward(
    rows: torch.Tensor,  # [tile, hidden_size]
    grad_output: torch.Tensor,  # [tile, hidden_size]
    grad_rows: torch.Tensor,  # [tile, hidden_size], written
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    sums: list[GradientSum | None],  # of gate, up and down weights, then of their biases
) -> None:
    gate, up = gate_and_up(rows, weights, biases)
    grad_gate, grad_up, active = swiglu_backward(grad_output @ weights[2], gate, up)
    del gate, up
    for total, bias_total, grad, entered in zip(
        sums[:3], sums[3:], (grad_gate, grad_up, grad_output), (rows, rows, active), strict=True
    ):
        assert total is not None
        total.add_product(grad, entered)
        if bias_total is not None:
            bias_total.add_rows(grad)
    torch.mm(grad_gate, weights[0], out=grad_rows)
    grad_rows.addmm_(grad_up, weights[1])


class GradientSum:
    """The gradient of one parameter over tiles: as it comes where there is one tile, else a float32 sum."""

    def __init__(self, parameter: torch.Tensor, tiles: int) -> None:
        self._dtype = parameter.dtype
        self._total = None if tiles == 1 else torch.zeros_like(parameter, dtype=torch.float32)

    def add_product(self, grad: torch.Tensor, entered: torch.Tensor) -> None:
        """Add grad.T @ entered, [rows, out] and [rows, in] to [out, in]."""
        if self._total is None:
            self._total = grad.T @ entered
        else:
            add_product_(self._total, grad.T, entered)

    def add_rows(self, grad: torch.Tensor) -> None:
        """Add grad summed over its rows."""
        summed = grad.sum(0, dtype=torch.float32)
        self._total = summed if self._total is None else self._total.add_(summed)

    def result(self) -> torch.Tensor:
        assert self._total is not None
        return self._total.to(self._dtype)


def add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right with a float32 total. On CUDA the product of half-precision factors is never rounded."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(left @ right)
