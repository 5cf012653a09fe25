"""Rotary angles that are exact at millions of tokens: positions in, the cos and sin of a Hugging Face model out.

An angle is position x frequency. transformers (and vLLM, and Megatron) form that product in float32, whose spacing at
4M is 0.25 rad, and so are off by up to half of that. Here the product is formed in float64 from float64 frequencies and
brought into one turn before it becomes float32. The result is within 1e-6 rad, the table costs one pass per forward.

Which of the two a model was trained with stands in its config.json as `rotary_angles`; transformers carries the field
along unread, and without it the angles are float32. Read against transformers 5.17 and 5.23.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from ultralong_ray.model.rope import NTK_FIELD, from_hf, inv_freq
from ultralong_ray.types import UserError

CONFIG_FIELD = "rotary_angles"  # in config.json: "exact" or "float32"
TILE_ROWS = 2**16  # rows whose float64 angles exist at a time: 32 MiB a temporary at head_dim 128
TURN = 2.0 * math.pi
BY_LENGTH = ("dynamic", "longrope")  # transformers' RoPE types whose frequencies follow from the length of a forward


def frequency_tolerance(factor: float) -> float:
    """Relative error of transformers' float32 frequencies: on the ramp of llama3 and yarn two terms cancel to one that
    is `factor` times smaller. Far below what another RoPE scheme would make."""
    return max(1e-5, 2e-7 * factor)


def cos_sin(
    position_ids: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every angle times `scaling`, in the doubled layout that transformers rotates halves with.

    position_ids: integers [batch, seq]. frequencies: float64 [head_dim / 2], radians per token.
    Returns: two tensors of `dtype` [batch, seq, head_dim].
    """
    positions = position_ids.flatten()  # [rows]
    pairs = frequencies.numel()
    cos = torch.empty(positions.numel(), 2 * pairs, dtype=dtype, device=positions.device)  # [rows, head_dim]
    sin = torch.empty_like(cos)
    for start in range(0, positions.numel(), TILE_ROWS):
        tile = slice(start, start + TILE_ROWS)
        angles = positions[tile, None].double() * frequencies  # [tile, pairs]
        # Within half a turn float32 resolves 1.2e-7 rad. At 4M the float64 product itself is within 5e-10.
        angles = angles.sub_((angles / TURN).round_(), alpha=TURN).float()
        for table, values in ((cos, angles.cos()), (sin, angles.sin())):
            values.mul_(scaling)
            table[tile, :pairs] = values
            table[tile, pairs:] = values
    shape = (*position_ids.shape, 2 * pairs)
    return cos.view(shape), sin.view(shape)


def install_angles(causal_lm: Any) -> None:
    """Make the model compute the angles that its config.json names; "float32" leaves transformers' forward as it is.

    The forward of this one rotary module is replaced. Its frequencies are kept outside of the module, where neither
    zero.Init nor a cast of the module's buffers reaches them.

    Raises: UserError for another value of the field, or a RoPE block whose frequencies this project cannot compute.
    """
    config = causal_lm.config
    kind = getattr(config, CONFIG_FIELD, "float32")
    if kind == "float32":
        return
    if kind != "exact":
        raise UserError(f'config.json: {CONFIG_FIELD} is {kind!r}; it can be "exact" or "float32"')
    rotary = causal_lm.model.rotary_emb
    rotary.forward = functools.partial(_exact_forward, rotary.attention_scaling, _Frequencies(config, rotary.inv_freq))


def rope_type_by_length(config: Any) -> str | None:
    """The model's RoPE type where transformers chooses its frequencies anew in every forward, by the largest position
    in it: angles then depend on how a prompt is cut into forwards, and with "dynamic" on longer prompts before it."""
    block = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    blocks = [block, *(each for each in block.values() if isinstance(each, dict))]  # some have one a kind of layer
    return next((each["rope_type"] for each in blocks if each.get("rope_type") in BY_LENGTH), None)


def reset_angles(causal_lm: Any) -> None:
    """Take rotary modules of `BY_LENGTH` back to the frequencies that they were made with."""
    for module in causal_lm.modules():
        if not hasattr(module, "original_max_seq_len"):
            continue
        for name, value in list(module.named_buffers(recurse=False)):
            if name.endswith("original_inv_freq"):
                # a copy, since longrope writes into it
                setattr(module, name.replace("original_inv_freq", "inv_freq"), value.clone())
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, module.original_max_seq_len)


class _Frequencies:
    """A model's frequencies in float64, copied once to each device that asks."""

    def __init__(self, config: Any, computed_by_transformers: torch.Tensor) -> None:
        fields = ("rope_parameters", "max_position_embeddings", NTK_FIELD)
        found = from_hf({field: getattr(config, field, None) for field in fields})
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        original = found.original_context_length or config.max_position_embeddings
        values = inv_freq(found.rope, head_dim, found.theta, original)  # float64 [head_dim / 2]
        theirs = computed_by_transformers.double().cpu().numpy()
        tolerance = frequency_tolerance(found.rope.factor)
        if theirs.shape != values.shape or not np.allclose(theirs, values, rtol=tolerance, atol=0.0):
            raise UserError(
                f"config.json: exact angles of the RoPE block {config.rope_parameters} are not what transformers makes "
                f'of it; set {CONFIG_FIELD} (model.rope.angles) to "float32"'
            )
        self._on_device = {torch.device("cpu"): torch.from_numpy(values)}

    def on(self, device: torch.device) -> torch.Tensor:
        """float64 [head_dim / 2]."""
        if device not in self._on_device:
            self._on_device[device] = self._on_device[torch.device("cpu")].to(device)
        return self._on_device[device]


@torch.no_grad()
def _exact_forward(
    scaling: float,
    frequencies: _Frequencies,
    x: torch.Tensor,  # [batch, seq, hidden_size]; only its dtype and device are used
    position_ids: torch.Tensor,  # [batch, seq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' rotary modules return: cos and sin, [batch, seq, head_dim] in the dtype of `x`."""
    return cos_sin(position_ids.to(x.device), frequencies.on(x.device), scaling, x.dtype)
