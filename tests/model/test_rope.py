"""RoPE frequencies against transformers' own and against literal values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ultralong_ray.config import RopeConfig
from ultralong_ray.model.rope import attention_factor, from_hf, inv_freq, ntk_theta, to_hf
from ultralong_ray.types import UserError

HEAD_DIM, THETA, ORIGINAL = 128, 500_000.0, 8192


def hf_frequencies(block: dict[str, Any], head_dim: int = HEAD_DIM) -> tuple[np.ndarray, float]:
    config = LlamaConfig(
        hidden_size=head_dim * 2,
        num_attention_heads=2,
        max_position_embeddings=4_194_304,
        rope_parameters=block,  # type: ignore[arg-type]
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[block["rope_type"]](config, None)  # type: ignore[call-arg]
    return frequencies.double().numpy(), factor


@pytest.mark.parametrize("factor", [1.0, 8.0, 128.0, 256.0, 512.0])
@pytest.mark.parametrize("scheme", ["llama3", "linear", "yarn"])
def test_equals_transformers(scheme: Any, factor: float) -> None:
    rope = RopeConfig(scheme=scheme, factor=factor)
    theirs, their_attention_factor = hf_frequencies(to_hf(rope, HEAD_DIM, THETA, ORIGINAL))
    ours = inv_freq(rope, HEAD_DIM, THETA, ORIGINAL)
    assert ours.shape == (HEAD_DIM // 2,) and ours.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(their_attention_factor, rel=1e-12)


@pytest.mark.parametrize(("head_dim", "theta", "original"), [(32, 10_000.0, 512), (64, 1e6, 32_768)])
def test_equals_transformers_for_other_shapes(head_dim: int, theta: float, original: int) -> None:
    rope = RopeConfig(scheme="llama3", factor=8.0)
    theirs, _ = hf_frequencies(to_hf(rope, head_dim, theta, original), head_dim)
    np.testing.assert_allclose(inv_freq(rope, head_dim, theta, original), theirs, rtol=1e-6, atol=0)


def test_published_values_of_factor_128() -> None:
    frequencies = inv_freq(RopeConfig(factor=128.0), HEAD_DIM, THETA, ORIGINAL)
    ramp = [2.10636606e-3, 1.27021152e-3, 7.38988651e-4, 4.05734455e-4, 2.00280939e-4, 7.67266443e-5]
    np.testing.assert_allclose(frequencies[29:35], ramp, rtol=5e-9)
    assert frequencies[63] == pytest.approx(1.91807874e-8, rel=5e-9)


def test_llama3_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain = inv_freq(RopeConfig(scheme="none"), HEAD_DIM, THETA, ORIGINAL)
    stretched = inv_freq(RopeConfig(factor=512.0), HEAD_DIM, THETA, ORIGINAL)
    np.testing.assert_array_equal(stretched[:29], plain[:29])
    np.testing.assert_allclose(stretched[35:], plain[35:] / 512.0, rtol=1e-15)


def test_llama3_is_not_hugging_face_yarn() -> None:
    """The trap: the same alpha and beta, another ramp and a temperature."""
    llama3 = inv_freq(RopeConfig(scheme="llama3", factor=128.0), HEAD_DIM, THETA, ORIGINAL)
    yarn = inv_freq(RopeConfig(scheme="yarn", factor=128.0), HEAD_DIM, THETA, ORIGINAL)
    ratio = np.maximum(yarn / llama3, llama3 / yarn)
    assert ratio.max() == pytest.approx(1.83, abs=0.01)
    assert attention_factor(RopeConfig(scheme="yarn", factor=128.0)) == pytest.approx(0.1 * math.log(128) + 1)
    assert attention_factor(RopeConfig(scheme="llama3", factor=128.0)) == 1.0


def test_ntk_slows_the_slowest_pair_by_the_factor() -> None:
    plain = inv_freq(RopeConfig(scheme="none"), HEAD_DIM, THETA, ORIGINAL)
    ntk = inv_freq(RopeConfig(scheme="ntk", factor=16.0), HEAD_DIM, THETA, ORIGINAL)
    assert plain[-1] / ntk[-1] == pytest.approx(16.0, rel=1e-12)
    assert ntk[0] == plain[0] == 1.0
    block = to_hf(RopeConfig(scheme="ntk", factor=16.0), HEAD_DIM, THETA, ORIGINAL)
    assert block == {"rope_type": "default", "rope_theta": ntk_theta(THETA, 16.0, HEAD_DIM)}


@pytest.mark.parametrize("scheme", ["llama3", "linear", "yarn", "none"])
def test_block_is_read_back(scheme: Any) -> None:
    rope = RopeConfig(scheme=scheme, factor=1.0 if scheme == "none" else 32.0)
    read = from_hf({"rope_parameters": to_hf(rope, HEAD_DIM, THETA, ORIGINAL)})
    assert (read.rope, read.theta) == (rope, THETA)
    assert read.original_context_length == (ORIGINAL if scheme in ("llama3", "yarn") else None)


def test_old_spelling_is_read() -> None:
    """config.json of Llama 3.1 as transformers 4.x wrote it."""
    block = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    read = from_hf({"rope_theta": 500000.0, "rope_scaling": block, "max_position_embeddings": 131072})
    assert (read.rope, read.theta, read.original_context_length) == (RopeConfig(factor=8.0), 500000.0, 8192)
    older = from_hf({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}})
    assert older.rope == RopeConfig(scheme="linear", factor=4.0)
    assert from_hf({"rope_theta": 1e4, "rope_scaling": None}).rope.scheme == "none"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "0.5"),
        ({}, "rope_theta"),
    ],
)
def test_what_cannot_be_extended_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_hf(config)
