"""Attention over keys and values that lie on many ranks, for transformers' models (read against 5.17 and 5.23).

Prefill of a chunk: every rank has some rows of it. Among themselves they attend as in training (Ulysses exchange,
ring). To the keys of earlier chunks, which stay where they are, the queries travel: all ranks get all queries of the
chunk, attend to their own slice without a mask, and send each row's partial result home ("pass-Q", arXiv 2411.01783).

Decode: all ranks compute the same new token, each attends to its own slice, and one small all-gather brings the partial
results together. The token's own key and value are held by one rank only.

Partial results and their merging: partial_attention.py.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from ultralong_ray.eval.kv_cache import KVSlice
from ultralong_ray.eval.partial_attention import Partial, attend_slice, merge, no_keys
from ultralong_ray.parallel.kernels.kernel import Kernel, within_limit
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.parallel.ring import ring_forward
from ultralong_ray.parallel.ulysses import gather_sequence, scatter_sequence
from ultralong_ray.types import UserError

SHARDED_ATTENTION = "ultralong_sharded"


@dataclass(frozen=True, slots=True)
class ShardedPass:
    """One forward of the model; travels through it as keyword `sharded_pass`. All ranks of `mesh` are the world."""

    cache: KVSlice
    mesh: SequenceMesh
    kernel: Kernel
    decode: bool  # one token, computed by all ranks
    cached_tokens: int  # that all ranks together hold of what comes before
    new_rows: int  # of this rank's rows, the first ones, whose keys and values it keeps; the others are padding


def register_sharded_attention() -> None:
    """Make `attn_implementation="ultralong_sharded"` known to transformers; calling it again changes nothing."""
    AttentionInterface.register(SHARDED_ATTENTION, _attention)
    AttentionMaskInterface.register(SHARDED_ATTENTION, _no_mask)
    # torch 2.13 has another name for all_gather_into_tensor, which torch 2.11 does not know
    warnings.filterwarnings("ignore", r".torch\.distributed\..* is deprecated", FutureWarning)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """transformers knows only this rank's positions: a mask it would build is wrong, so it builds none."""


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, heads, seq_local, head_dim]
    key: torch.Tensor,  # [1, kv_heads, seq_local, head_dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sharded_pass: ShardedPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls. Returns ([1, seq_local, heads, head_dim], no attention weights)."""
    if sliding_window:
        raise UserError(
            f"the model's config asks for sliding_window {sliding_window}; the sharded engine computes full causal "
            f"attention: set use_sliding_window to false (or sliding_window to null), or use the in-process engine"
        )
    layer: Any = module.layer_idx
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kept = slice(0, sharded_pass.new_rows)
    sharded_pass.cache.write(layer, key[0].transpose(0, 1)[kept], value[0].transpose(0, 1)[kept])
    if sharded_pass.decode:
        keys, values = sharded_pass.cache.read(layer, sharded_pass.new_rows)
        own = attend_slice(query[0, :, 0], keys, values, scale, sharded_pass.kernel)
        return _merged_over_ranks(own).to(query.dtype)[None, None], None
    return _prefill(query, key, value, scale, layer, sharded_pass), None


def _prefill(
    query: torch.Tensor,  # [1, heads, seq_local, head_dim]
    key: torch.Tensor,  # [1, kv_heads, seq_local, head_dim]
    value: torch.Tensor,
    scale: float,
    layer: int,
    sharded_pass: ShardedPass,
) -> torch.Tensor:
    """[1, seq_local, heads, head_dim]: this rank's rows of a chunk over the chunk and all that is cached."""
    mesh, kernel = sharded_pass.mesh, within_limit(sharded_pass.kernel)
    gathered = gather_sequence(query, key, value, mesh)
    if mesh.ring_degree > 1:
        output, lse = ring_forward(*gathered, scale, kernel, mesh)
    else:
        output, lse = kernel.forward(*gathered, scale, True)
    output = scatter_sequence(output, mesh)
    if sharded_pass.cached_tokens == 0:
        return output
    own_lse = scatter_sequence(lse.mT.unsqueeze(-1), mesh).squeeze(-1)  # [1, seq_local, heads]
    earlier, earlier_lse = _over_cached(query, scale, layer, sharded_pass)
    merged, _ = merge([output, *earlier.unsqueeze(1)], torch.stack([own_lse, *earlier_lse.unsqueeze(1)]))
    return merged.to(query.dtype)


def _over_cached(query: torch.Tensor, scale: float, layer: int, sharded_pass: ShardedPass) -> Partial:
    """This rank's rows over every rank's slice: [degree, seq_local, heads, head_dim], [degree, seq_local, heads]."""
    degree = dist.get_world_size()
    rows = query[0].transpose(0, 1).contiguous()  # [seq_local, heads, head_dim]
    everyone = rows.new_empty(degree * rows.shape[0], *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows)
    keys, values = sharded_pass.cache.read(layer)
    if keys.shape[1]:
        output, lse = within_limit(sharded_pass.kernel).forward(everyone[None], keys, values, scale, False)
        output, lse = output[0].contiguous(), lse[0].mT.contiguous().float()
    else:
        output, lse = no_keys(everyone)
    home, home_lse = torch.empty_like(output), torch.empty_like(lse)
    dist.all_to_all_single(home, output)
    dist.all_to_all_single(home_lse, lse)
    return home.unflatten(0, (degree, -1)), home_lse.unflatten(0, (degree, -1))


def _merged_over_ranks(own: Partial) -> torch.Tensor:
    """float32 [heads, head_dim], bit-equal on all ranks."""
    packed = torch.cat([own[0], own[1].unsqueeze(-1)], -1)  # [heads, head_dim + 1]
    gathered = packed.new_empty(dist.get_world_size() * packed.shape[0], packed.shape[1])
    dist.all_gather_into_tensor(gathered, packed)
    parts = gathered.unflatten(0, (-1, packed.shape[0]))  # [degree, heads, head_dim + 1]
    return merge(parts[..., :-1], parts[..., -1])[0]
