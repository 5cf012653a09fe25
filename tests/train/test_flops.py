"""The ledger against hand-computed figures."""

from __future__ import annotations

import pytest

from ultralong_ray.train.flops import matmul_parameters, mfu, model_flops, peak_flops

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_llama_8b_without_its_embedding_table_and_norms() -> None:
    assert matmul_parameters(LLAMA_8B) == 8_030_261_248 - 128256 * 4096 - 65 * 4096


def test_attention_grows_with_the_square() -> None:
    short, long = model_flops(LLAMA_8B, 1), model_flops(LLAMA_8B, 1_048_576)
    assert short == 6.0 * matmul_parameters(LLAMA_8B) + 6 * 32 * 4096
    # 1B tokens at 1M are 873 EFLOP (954 sequences) with embeddings left out
    assert long * 1e9 / 1_048_576 == pytest.approx(873e18, rel=0.01)
    assert long == 6.0 * matmul_parameters(LLAMA_8B) * 2**20 + 6.0 * 32 * 4096 * 2.0**40


def test_peaks_are_known_or_given_or_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", None) == 989.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3", 100.0) == 100e12
    assert peak_flops(None, None) is None and peak_flops("some card", None) is None
    assert mfu(989.5e12, 2.0, 4, 989.5e12) == 0.125
    assert mfu(1.0, 1.0, 1, None) is None
