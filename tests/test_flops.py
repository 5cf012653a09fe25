"""The ledger against figures worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong_ray.config import ArchitectureConfig
from ultralong_ray.flops import ModelShape, ledger, mfu, replayed_attention
from ultralong_ray.types import LayerKeep, TrainPlan

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# hidden 8, 1 layer, 4 query and 2 key-value heads of 2, MLP of 10, vocabulary of 5:
# attention matrices 8*8 + 2*8*4 + 8*8 = 192, MLP 3*80 = 240, head 40, so N = 472.
TINY = ModelShape(hidden=8, layers=1, heads=4, kv_heads=2, head_dim=2, intermediate=10, vocab=5)


def plan(*keep: LayerKeep, ring: int = 1) -> TrainPlan:
    return TrainPlan(1, ring, keep, 16, 16, False)


def test_llama_8b_counts_its_published_parameters() -> None:
    shape = ModelShape.from_config(LLAMA_8B)
    assert shape.parameters == 8_030_261_248
    assert shape.matmul_parameters == 8_030_261_248 - 128256 * 4096 - 65 * 4096


def test_the_three_conventions_by_hand() -> None:
    counted = ledger(TINY, 3, plan())
    assert counted.model_flops_causal == 6 * 472 * 3 + 6 * 8 * 9
    assert counted.alst_flops == 8 * 472 * 3 + 16 * 8 * 9
    assert counted.hardware_flops == 6 * 472 * 3 + 2 * 8 * 9 * 3.5  # forward 1, flash backward 2.5


def test_a_replay_costs_all_matrices_but_down_and_the_rows_not_kept() -> None:
    replayed = 2 * (192 + 160) * 3
    kept, half, none = (
        ledger(TINY, 3, plan(LayerKeep(attention_rows=rows))).hardware_flops - ledger(TINY, 3, plan()).hardware_flops
        for rows in (1.0, 0.5, 0.0)
    )
    forward = 2 * 8 * 9
    assert (kept, half, none) == (replayed, replayed + forward / 4, replayed + forward)
    assert ledger(TINY, 3, plan(LayerKeep())).model_flops_causal == ledger(TINY, 3, plan()).model_flops_causal


def test_the_ledger_of_a_batch_is_that_of_its_sequences() -> None:
    one, eight = ledger(TINY, 3, plan()), ledger(TINY, 3, plan()).times(8)
    assert eight.alst_flops == 8 * one.alst_flops and eight.hardware_flops == 8 * one.hardware_flops


@pytest.mark.parametrize("ring", [1, 2, 3, 8])
@pytest.mark.parametrize("kept_eighths", range(9))
def test_the_replayed_share_counts_row_by_row(ring: int, kept_eighths: int) -> None:
    """Against the sum over every recomputed row of the positions that it sees, chunks of 4,000 rows."""
    chunk = 4000
    total = (2 * ring * chunk) ** 2 / 2 / ring  # of one rank
    shares = []
    for rank in range(ring):
        positions = [*range(rank * chunk, (rank + 1) * chunk)]
        positions += range((2 * ring - 1 - rank) * chunk, (2 * ring - rank) * chunk)
        again = positions[: len(positions) * (8 - kept_eighths) // 8]
        shares.append(sum(position + 0.5 for position in again) / total)
    found = replayed_attention(kept_eighths / 8, ring)
    assert found.mean == pytest.approx(sum(shares) / ring)
    assert found.slowest == pytest.approx(max(shares))


def test_shapes_read_defaults_biases_and_tied_heads() -> None:
    architecture = ArchitectureConfig.model_validate(
        {**LLAMA_8B, "rope_theta": 5e5, "model_type": "qwen2", "tie_word_embeddings": True}
    )
    shape = ModelShape.from_architecture(architecture)
    assert shape.head_dim == 128 and shape.tied and shape.qkv_bias
    plain = ModelShape.from_config(LLAMA_8B)
    assert plain.parameters - shape.parameters == 128256 * 4096 - 32 * 128 * 48
    assert shape.matmul_parameters == plain.matmul_parameters
    assert ModelShape.from_config({**LLAMA_8B, "num_key_value_heads": None}).kv_heads == 32


BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_parameters_are_those_of_transformers_model(model_type: str, biases: dict[str, bool]) -> None:
    """Which of the biases that config.json asks for a model has depends on its type."""
    widths = {"hidden_size": 36, "intermediate_size": 50, "head_dim": 12, "vocab_size": 61}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = {"model_type": model_type, **widths, **heads, **biases}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert ModelShape.from_config(config).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_utilisation_is_unknown_without_a_peak() -> None:
    assert mfu(989.5e12, 2.0, 4, 989.5e12) == 0.125
    assert mfu(1.0, 1.0, 1, None) is None
