"""The tiled MLP against the module it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from ultralong_ray.parallel import mlp as mlp_module
from ultralong_ray.parallel.mlp import GradientSum, install_tiled_mlp, tile_slices
from ultralong_ray.types import UserError

ROWS, HIDDEN, INTERMEDIATE = 37, 16, 24


def made(bias: bool, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaMLP:
    torch.manual_seed(3)
    shape = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=2, mlp_bias=bias, **changes
    )
    return LlamaMLP(shape).to(dtype)


def hidden_states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(2, ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()


def gradients(mlp: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    output = mlp(hidden)
    weight = torch.arange(output.numel(), dtype=output.dtype).view_as(output).sin()
    return output.detach(), list(torch.autograd.grad((output * weight).sum(), [hidden, *mlp.parameters()]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile_tokens", [1, 20, 73, 74, 1000])
def test_output_and_gradients_equal_the_plain_module(tile_tokens: int, bias: bool) -> None:
    expected_output, expected = gradients(made(bias), hidden_states())
    tiled = made(bias)
    install_tiled_mlp(tiled, tile_tokens, lambda: False)
    output, found = gradients(tiled, hidden_states())
    torch.testing.assert_close(output, expected_output, rtol=1e-6, atol=1e-6)
    assert len(found) == (7 if bias else 4)
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


@pytest.mark.parametrize("tiles", [1, 600])
def test_a_bfloat16_gradient_is_rounded_once_however_many_tiles(tiles: int) -> None:
    generator = torch.Generator().manual_seed(6)
    grad, entered = (torch.randn(600, 8, generator=generator).to(torch.bfloat16) + 1 for _ in range(2))
    total, bias = (GradientSum(torch.empty(shape, dtype=torch.bfloat16), tiles) for shape in ((8, 8), (8,)))
    for tile in tile_slices(600, 600 // tiles):
        total.add_product(grad[tile], entered[tile])
        bias.add_rows(grad[tile])
    product = grad.double().T @ entered.double()
    for found, exact in ((total.result(), product), (bias.result(), grad.double().sum(0))):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0.0)


def test_nothing_as_wide_as_the_mlp_is_kept_for_the_backward_pass() -> None:
    tiled = made(False)
    install_tiled_mlp(tiled, 8, lambda: False)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        tiled(hidden_states())
    assert saved and not [shape for shape in saved if shape[-1] == INTERMEDIATE and shape[0] != HIDDEN]


def test_an_unread_value_costs_no_product_and_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compute = mlp_module.gate_and_up
    monkeypatch.setattr(mlp_module, "gate_and_up", lambda rows, *rest: calls.append(len(rows)) or compute(rows, *rest))
    expected = gradients(made(True), hidden_states())[1]
    tiled = made(True)
    install_tiled_mlp(tiled, 20, lambda: True)
    output = tiled(hidden_states())
    assert calls == [] and output.shape == (2, ROWS, HIDDEN)
    found = gradients(tiled, hidden_states())[1]
    assert sum(calls) == 2 * ROWS  # the backward pass, once over all rows
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-6


def test_tiles_are_even_cover_all_rows_and_are_never_too_large() -> None:
    for rows in (1, 7, 64, 65, 1000):
        for tile_tokens in (1, 8, 64, 999, 5000):
            tiles = tile_slices(rows, tile_tokens)
            sizes = [tile.stop - tile.start for tile in tiles]
            assert [tile.start for tile in tiles[1:]] == [tile.stop for tile in tiles[:-1]]
            assert (tiles[0].start, tiles[-1].stop) == (0, rows)
            assert max(sizes) <= tile_tokens and max(sizes) - min(sizes) <= 1


def test_other_mlps_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"LlamaMLP has the activation \w*GELU\w*, not SiLU"):
        install_tiled_mlp(made(False, hidden_act="gelu"), 8, lambda: False)
    experts = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"Sequential \(0\) is not made of gate_proj, up_proj, down_proj"):
        install_tiled_mlp(experts, 8, lambda: False)
