"""Several answers decoded together, for transformers' models in one process (read against 5.17 and 5.23).

A step of decoding reads all weights and starts hundreds of small kernels, for one answer as for twenty. So prompts are
read one after the other, each leaves its keys and values here, and then one forward a step takes the next token of
every answer that goes on. Linear layers see a batch. Attention is each prompt's own, by the kernel that decodes a
single one: no padding, no mask, nothing to pay for an answer that is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ultralong_ray.eval.chunk_attention import DECODE_BACKENDS, no_mask, sees_all_tokens
from ultralong_ray.eval.engine import Request
from ultralong_ray.model.angles import rope_type_by_length

TOGETHER_ATTENTION = "ultralong_together"


def can_decode_together(config: Any) -> bool:
    """Not where attention slides, since a new token sees all keys here, nor where transformers computes the angles of
    all prompts by the length of the longest one."""
    return sees_all_tokens(config) and not rope_type_by_length(config)


class HeldPrompt:
    """The keys and values of one prompt and, as it grows, of its answer. Takes memory for all of both at once."""

    def __init__(self, cache: DynamicCache, new_tokens: int) -> None:
        """Copies what `cache` holds of one prompt; `new_tokens`: how many the answer may have."""
        self.tokens = cache.get_seq_length()
        room = self.tokens + new_tokens
        layers: list[Any] = cache.layers
        self._layers = [tuple(_with_room(held, room) for held in (layer.keys, layer.values)) for layer in layers]

    def grown(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next token's [1, kv_heads, 1, head_dim]; returns all of the layer [1, kv_heads, seq, head_dim].

        It counts as held once `tokens` is raised, when every layer has it.
        """
        for held, new in zip(self._layers[layer], (key, value), strict=True):
            held[:, :, self.tokens] = new[:, :, 0]
        keys, values = (held[:, :, : self.tokens + 1] for held in self._layers[layer])
        return keys, values


def _with_room(held: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of [1, kv_heads, seq, head_dim] with room for `rows` rows."""
    grown = held.new_empty(*held.shape[:2], rows, held.shape[3])
    grown[:, :, : held.shape[2]] = held
    return grown


def grouped(requests: Iterable[Request], most_tokens: Callable[[], int]) -> Iterator[list[Request]]:
    """Neighbours whose prompts and answers together have at most `most_tokens()` tokens; a longer one stands alone."""
    group: list[Request] = []
    tokens = 0
    for request in requests:
        if group and tokens + request.tokens > most_tokens():
            yield group
            group, tokens = [], 0
        group.append(request)
        tokens += request.tokens
    if group:
        yield group


def next_logits(model: Any, held: Sequence[HeldPrompt], tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """Logits [batch, vocab] after one more token of each prompt, inside `decoding_together`. tokens: [batch]."""
    ids = torch.tensor(tokens, device=device)[:, None]  # [batch, 1]
    positions = torch.tensor([prompt.tokens for prompt in held], device=device)[:, None]  # [batch, 1]
    output = model(ids, position_ids=positions, use_cache=False, held=held)
    for prompt in held:
        prompt.tokens += 1
    return output.logits[:, -1]


@contextmanager
def decoding_together(model: Any) -> Iterator[None]:
    """Inside, the model's attention is that of this file."""
    AttentionInterface.register(TOGETHER_ATTENTION, _attention)
    AttentionMaskInterface.register(TOGETHER_ATTENTION, no_mask)
    usual = model.config._attn_implementation
    model.set_attn_implementation(TOGETHER_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [batch, heads, 1, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, 1, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    held: Sequence[HeldPrompt],
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls. Returns ([batch, 1, heads, head_dim], no attention weights)."""
    layer: Any = module.layer_idx
    outputs = []
    with sdpa_kernel(DECODE_BACKENDS):
        for row, prompt in enumerate(held):
            one = slice(row, row + 1)
            keys, values = prompt.grown(layer, key[one], value[one])
            output, _ = sdpa_attention_forward(module, query[one], keys, values, None, scaling=scaling, is_causal=False)
            outputs.append(output)
    return torch.cat(outputs), None
