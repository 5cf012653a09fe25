"""Rotary position embeddings: how each scheme turns (theta, factor, original window) into angular frequencies.

In goes a `RopeConfig` with the head dimension, theta and the original window; out come frequencies in float64 and the
block of a Hugging Face `config.json` that makes transformers compute the same. Numpy only: the frequencies that a
model uses at run time are transformers' own, and tests hold the two equal.

Notation: d = head_dim, pair i = 0..d/2-1, f_i = theta^(-2i/d), L = original window, s = factor,
r_i = L * f_i / (2 pi) = full turns of pair i inside the original window.

Sources: YaRN (arXiv 2309.00071, NTK-by-parts ramp and temperature), Llama 3.1 (`apply_scaling` in
meta-llama/llama-models `models/llama3/model.py`), position interpolation (arXiv 2306.15595), NTK-aware scaling (bloc97,
LocalLLaMA 2023), and transformers 5.23 `modeling_rope_utils.py` for the spelling of the blocks and its own `yarn`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import RopeConfig
from ultralong_ray.types import UserError

FloatArray = NDArray[np.float64]
NTK_FIELD = "ntk_scaling"  # of config.json: what the raised theta of an NTK-aware model was made from
YARN_FIELDS = ("attention_factor", "mscale", "mscale_all_dim", "truncate")  # which transformers reads, and we do not


def inv_freq(rope: RopeConfig, head_dim: int, theta: float, original_context_length: int) -> FloatArray:
    """Radians per token of every pair.

    Returns: float64 [head_dim / 2], descending.

    Scheme `llama3` is UltraLong's "YaRN with alpha 1, beta 4": NTK-by-parts of YaRN section 3.2 without its
    temperature, which is the same function as Llama 3.1's scaling with low/high_freq_factor = alpha/beta.
    Scheme `yarn` is Hugging Face's: its ramp is linear in the pair index, so its values differ on the ramp.
    """
    if rope.scheme == "ntk":
        theta = ntk_theta(theta, rope.factor, head_dim)
    kept = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)  # [head_dim / 2]
    if rope.scheme in ("none", "ntk"):
        return kept
    if rope.scheme == "linear":
        return kept / rope.factor
    if rope.scheme == "llama3":
        turns = original_context_length * kept / (2 * math.pi)  # [head_dim / 2]
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        keep = 1.0 - _yarn_ramp(rope, head_dim, theta, original_context_length)
    keep = np.clip(keep, 0.0, 1.0)  # [head_dim / 2]: 1 keeps a pair, 0 divides it by the factor
    return keep * kept + (1.0 - keep) * kept / rope.factor


def _yarn_ramp(rope: RopeConfig, head_dim: int, theta: float, original_context_length: int) -> FloatArray:
    """Transformers' ramp: 0 up to the pair that turns `high_freq_factor` times, 1 from the one at `low_freq_factor`."""

    def pair_with_turns(turns: float) -> float:
        return head_dim * math.log(original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_with_turns(rope.high_freq_factor)), 0)
    last = min(math.ceil(pair_with_turns(rope.low_freq_factor)), head_dim - 1)
    # transformers widens an empty ramp by 0.001 pairs; the same here, so that both agree
    width = last - first if last != first else 0.001
    return np.clip((np.arange(head_dim // 2, dtype=np.float64) - first) / width, 0.0, 1.0)


def ntk_theta(theta: float, factor: float, head_dim: int) -> float:
    """NTK-aware base: theta * s^(d/(d-2)), chosen so that the slowest pair is slowed by exactly s."""
    return theta * factor ** (head_dim / (head_dim - 2))


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 0.1 ln(s) + 1 for `yarn` (YaRN equation 22), 1 for every other scheme."""
    return 0.1 * math.log(rope.factor) + 1.0 if rope.scheme == "yarn" else 1.0


def to_hf(rope: RopeConfig, head_dim: int, theta: float, original_context_length: int) -> dict[str, Any]:
    """The `rope_parameters` block of transformers 5, rope_theta included.

    NTK-aware scaling has no rope type there: it is written as the default type with the raised theta. (`ntk_record`
    says beside the block what it was raised from, so that a longer window is measured from the same origin.)
    """
    if rope.scheme == "none":
        return {"rope_type": "default", "rope_theta": float(theta)}
    if rope.scheme == "ntk":
        return {"rope_type": "default", "rope_theta": ntk_theta(theta, rope.factor, head_dim)}
    block: dict[str, Any] = {"rope_type": rope.scheme, "rope_theta": float(theta), "factor": float(rope.factor)}
    if rope.scheme == "linear":
        return block
    block["original_max_position_embeddings"] = original_context_length
    if rope.scheme == "llama3":
        return block | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    return block | {"beta_slow": rope.low_freq_factor, "beta_fast": rope.high_freq_factor}


def ntk_record(rope: RopeConfig, theta: float, original_context_length: int) -> dict[str, Any]:
    """`NTK_FIELD` of a config.json, which transformers carries along unread."""
    return {"factor": rope.factor, "rope_theta": theta, "original_max_position_embeddings": original_context_length}


def to_older_hf(block: dict[str, Any]) -> dict[str, Any]:
    """The two fields by which transformers 4.x, and engines built on it, say what `rope_parameters` says."""
    scaling = {name: value for name, value in block.items() if name != "rope_theta"}
    return {"rope_theta": block["rope_theta"], "rope_scaling": None if block["rope_type"] == "default" else scaling}


@dataclass(frozen=True, slots=True)
class HfRope:
    """What a Hugging Face config says about positions. `original_context_length` is None where it says nothing.

    `theta` is the one before NTK-aware scaling; `unread_fields` are those of the block that `rope` has no place for.
    """

    rope: RopeConfig
    theta: float
    original_context_length: int | None
    unread_fields: tuple[str, ...] = ()


def from_hf(config: dict[str, Any]) -> HfRope:
    """Read the block of a `config.json`: `rope_parameters` (transformers 5) or `rope_scaling` + `rope_theta` (4.x).

    Raises: UserError for a rope type that this project cannot extend, or a rotary part smaller than the head.
    """
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = block.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise UserError("config.json gives no rope_theta (neither in rope_parameters nor beside it); add it")
    rotary_share = block.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rotary_share != 1.0:
        raise UserError(f"config.json: partial_rotary_factor {rotary_share}; only models that rotate whole heads work")
    kind = block.get("rope_type", block.get("type", "default"))
    original = block.get("original_max_position_embeddings")
    if kind == "default":
        return _unstretched(config.get(NTK_FIELD), float(theta))
    if kind not in ("llama3", "linear", "yarn"):
        raise UserError(
            f"config.json: rope type {kind!r} cannot be extended; types that can: default, llama3, linear, yarn"
        )
    needed = ("factor", "low_freq_factor", "high_freq_factor") if kind == "llama3" else ("factor",)
    if lacking := [name for name in needed if block.get(name) is None]:
        raise UserError(f"config.json: the RoPE block of type {kind!r} has no {', '.join(lacking)}; add it")
    fields = {"scheme": kind, "factor": block["factor"]}
    if kind == "llama3":
        fields |= {name: block[name] for name in ("low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        fields |= {"low_freq_factor": block.get("beta_slow") or 1.0, "high_freq_factor": block.get("beta_fast") or 32.0}
    if kind != "linear" and original is None:
        original = config.get("max_position_embeddings")
    unread = tuple(name for name in YARN_FIELDS if kind == "yarn" and block.get(name) is not None)
    return HfRope(RopeConfig(**fields), float(theta), original, unread)


def _unstretched(record: dict[str, Any] | None, theta: float) -> HfRope:
    """A default block; `record` (`NTK_FIELD`) says of an NTK-aware one what its theta was raised from."""
    if record is None:
        return HfRope(RopeConfig(scheme="none"), theta, None)
    rope = RopeConfig(scheme="ntk", factor=record["factor"])
    return HfRope(rope, float(record["rope_theta"]), record["original_max_position_embeddings"])
