"""Rotary angles at up to 4M tokens; numpy's extended precision is the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ultralong_ray.config import RopeConfig
from ultralong_ray.model import angles
from ultralong_ray.model.angles import cos_sin, install_angles
from ultralong_ray.model.rope import attention_factor, inv_freq, to_hf
from ultralong_ray.train.preflight import rope_finding
from ultralong_ray.types import UserError

HEAD_DIM, THETA, ORIGINAL, WINDOW = 128, 500_000.0, 8192, 2**22
SCHEMES = {"llama3": 512.0, "yarn": 512.0, "linear": 512.0, "ntk": 512.0, "none": 1.0}
BOUNDARIES = [0, 1, 2, ORIGINAL - 1, ORIGINAL, 65_535, 65_536, 2**20 - 1, 2**20, 2**21 + 1, 2**22 - 2, 2**22 - 1, 2**22]
EXACT = 1e-4  # rad


def positions() -> torch.Tensor:
    """Boundaries and 2,000 draws below 4M as [2, rows / 2]."""
    drawn = np.random.default_rng(0).integers(0, WINDOW, 2001)
    return torch.from_numpy(np.concatenate([BOUNDARIES, drawn])).view(2, -1)


def model(scheme: str, kind: str | None, model_type: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A one-layer model with full-size heads and the RoPE block of `scheme`."""
    rope = RopeConfig(scheme=scheme, factor=SCHEMES[scheme])  # type: ignore[arg-type]
    fields: dict[str, Any] = {} if kind is None else {"rotary_angles": kind}
    config = AutoConfig.for_model(
        model_type,
        hidden_size=2 * HEAD_DIM,
        head_dim=HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        max_position_embeddings=WINDOW,
        rope_parameters=to_hf(rope, HEAD_DIM, THETA, ORIGINAL),
        **fields,
    )
    causal_lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    install_angles(causal_lm)
    return causal_lm


def run(causal_lm: Any, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return causal_lm.model.rotary_emb(torch.zeros(2, 1, 1, dtype=dtype), position_ids=positions())


def wanted(scheme: str) -> np.ndarray:
    """Angles in extended precision, [2, rows / 2, head_dim / 2]."""
    rope = RopeConfig(scheme=scheme, factor=SCHEMES[scheme])  # type: ignore[arg-type]
    frequencies = inv_freq(rope, HEAD_DIM, THETA, ORIGINAL).astype(np.longdouble)
    return positions().numpy()[..., None].astype(np.longdouble) * frequencies


def angle_errors(cos: torch.Tensor, sin: torch.Tensor, angles_wanted: np.ndarray) -> np.ndarray:
    """|angle - wanted| in rad, modulo whole turns."""
    turned = (cos.double().numpy() + 1j * sin.double().numpy())[..., : HEAD_DIM // 2]
    wanted_turn = (np.cos(angles_wanted) + 1j * np.sin(angles_wanted)).astype(np.complex128)
    return np.abs(np.angle(turned * wanted_turn.conj()))


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_exact_to_4m_positions_for_every_scheme(scheme: str) -> None:
    cos, sin = run(model(scheme, "exact"))
    assert cos.shape == sin.shape == (*positions().shape, HEAD_DIM)
    assert torch.equal(cos[..., : HEAD_DIM // 2], cos[..., HEAD_DIM // 2 :])
    assert torch.equal(sin[..., : HEAD_DIM // 2], sin[..., HEAD_DIM // 2 :])
    assert angle_errors(cos, sin, wanted(scheme)).max() < EXACT
    scale = attention_factor(RopeConfig(scheme=scheme, factor=SCHEMES[scheme]))  # type: ignore[arg-type]
    np.testing.assert_allclose(torch.hypot(cos, sin).numpy(), scale, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["llama3", "none"])
def test_float32_products_are_not_exact(scheme: str) -> None:
    """What the switch is for: the same comparison fails by orders of magnitude."""
    cos, sin = run(model(scheme, "float32"))
    assert 0.1 < angle_errors(cos, sin, wanted(scheme)).max() < 0.3


@pytest.mark.parametrize("kind", ["float32", None])
def test_float32_is_transformers_bit_for_bit(kind: str | None) -> None:
    causal_lm = model("yarn", kind)
    theirs = type(causal_lm.model.rotary_emb)(config=causal_lm.config)
    for ours, expected in zip(run(causal_lm), theirs(torch.zeros(2, 1, 1), position_ids=positions()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_family_calls_it(model_type: str) -> None:
    """Exact and float32 angles give nearly the same logits at near positions and clearly others at far ones."""
    torch.manual_seed(0)
    exact, rounded = model("none", "exact", model_type).eval(), model("none", "float32", model_type).eval()
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.fill_(2.0)
        rounded.load_state_dict(exact.state_dict())
        ids = torch.randint(0, 32, (1, 24))
        near, far = torch.arange(24)[None], torch.arange(24)[None] * 170_001
        near_exact, near_rounded = (m(ids, position_ids=near).logits for m in (exact, rounded))
        far_exact, far_rounded = (m(ids, position_ids=far).logits for m in (exact, rounded))
    near_difference = (near_exact - near_rounded).abs().max()
    assert (far_exact - far_rounded).abs().max() > 100 * near_difference > 0


def test_scores_depend_on_distance_alone() -> None:
    """The angle between two tokens is the same at the start of a sequence and at 4M, and that of their distance."""
    frequencies = torch.from_numpy(inv_freq(RopeConfig(factor=512.0), HEAD_DIM, THETA, ORIGINAL))
    distances = torch.tensor([1, 7, 4097, 131_071])
    for offset in (0, 65_535, 2**22 - 131_072):
        cos, sin = cos_sin(torch.stack([distances + offset, distances * 0 + offset]), frequencies, 1.0, torch.float32)
        turn = torch.complex(cos.double(), sin.double())[..., : HEAD_DIM // 2]
        alone = torch.outer(distances.double(), frequencies)
        error = (turn[0] * turn[1].conj() * torch.polar(torch.ones_like(alone), -alone)).angle().abs().max()
        assert error < EXACT


def test_bfloat16_output_is_the_rounded_exact_one() -> None:
    causal_lm = model("llama3", "exact", dtype=torch.bfloat16)
    for half, whole in zip(run(causal_lm, torch.bfloat16), run(causal_lm), strict=True):
        assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())


def test_a_cast_of_the_whole_model_leaves_the_frequencies_exact() -> None:
    """As zero.Init and DeepSpeed's engine do to what a module holds."""
    causal_lm = model("llama3", "exact").bfloat16()
    assert causal_lm.model.rotary_emb.inv_freq.dtype == torch.bfloat16, "the cast reaches the module's own"
    assert angle_errors(*run(causal_lm), wanted("llama3")).max() < EXACT


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model("llama3", "exact"))
    monkeypatch.setattr(angles, "TILE_ROWS", 100)
    assert all(torch.equal(a, b) for a, b in zip(run(model("llama3", "exact")), whole, strict=True))


def test_what_cannot_be_computed_is_refused() -> None:
    with pytest.raises(UserError, match="rotary_angles is 'double'"):
        model("llama3", "double")
    causal_lm = model("yarn", "float32")
    causal_lm.config.rotary_angles = "exact"
    causal_lm.config.rope_parameters["factor"] = 256.0  # no longer what the module was made from
    with pytest.raises(UserError, match=r"model\.rope\.angles"):
        install_angles(causal_lm)


def test_float32_rounding_of_a_large_factor_is_no_other_rope() -> None:
    """On the ramp transformers' two terms cancel: at factor 512 one pair is off by 1.3e-5."""
    rope = RopeConfig(scheme="llama3", factor=512.0)
    block = to_hf(rope, HEAD_DIM, 640_000.0, 4096)
    causal_lm = model("none", None)
    config = causal_lm.config.to_dict() | {"rope_parameters": block, "rotary_angles": "exact"}
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stored = causal_lm.model.rotary_emb.inv_freq
    assert np.abs(stored.double().numpy() / inv_freq(rope, HEAD_DIM, 640_000.0, 4096) - 1.0).max() > 1e-5
    install_angles(causal_lm)
    assert rope_finding(stored, config, rope).ok
