"""A decoder layer that forgets its forward pass, but for its input and its attention output, and replays the rest.

Flows in: a Hugging Face causal model (dense Llama, Qwen2, Qwen3, Mistral), what each layer keeps, and the store where
kept tensors wait. Flows out: the same model, whose layers go through one autograd function each:

    forward   the layer without a graph; its input and the attention's output and log-sum-exp go to the store
    backward  the layer again, with a graph, from its input; attention takes what was kept instead of computing it,
              the MLP computes nothing (parallel/mlp.py); then the gradients

Attention is dear (its cost grows with the square of the length) and its output small; the rest is cheap and large.
Hooks of nn.Module.__call__ (ZeRO-3's) stay around the layer and see one forward and one backward. Inside the layer the
replay repeats its collectives in the order of the forward pass, layer by layer backwards, on every rank alike. Read
against transformers 5.23, torch 2.13 and DeepSpeed 0.19.8.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ultralong_ray.parallel.mlp import install_tiled_mlp
from ultralong_ray.train.activation_store import ActivationStore, DeviceTensor, HostTensor
from ultralong_ray.types import LayerKeep

# A recomputed prefix is a multiple of this, so that it falls into the same blocks of rows as the whole did.
PREFIX_ROWS = 512


def install_replay(causal_lm: Any, keep: Sequence[LayerKeep], mlp_tile_tokens: int, store: ActivationStore) -> None:
    """Make every decoder layer of `causal_lm` replay itself; `keep` has one entry per layer.

    Attention must honour `attention_context.kept` (parallel/context.py). Without gradients (evaluation) a layer runs as
    ever. Raises UserError for an MLP of another shape, ValueError when `keep` does not fit.
    """
    layers = list(causal_lm.model.layers)
    if len(keep) != len(layers):
        raise ValueError(f"a keep policy of {len(keep)} layers for a model of {len(layers)}")
    before: LayerReplay | None = None
    for layer, layer_keep in zip(layers, keep, strict=True):
        replay = LayerReplay(layer, layer_keep, store, before)
        install_tiled_mlp(layer.mlp, mlp_tile_tokens, replay.is_replaying)
        layer.forward = replay.forward
        before = replay


def recomputed_rows(rows: int, share_kept: float) -> int:
    """How many first rows of `rows` are computed again: at most 1 - share, a multiple of 512; all where share is 0."""
    if share_kept == 0:
        return rows
    return int(rows * (1 - share_kept)) // PREFIX_ROWS * PREFIX_ROWS


class LayerReplay:
    """One decoder layer's way through both passes."""

    def __init__(self, layer: nn.Module, keep: LayerKeep, store: ActivationStore, before: LayerReplay | None) -> None:
        self.keep, self.store, self.before = keep, store, before
        self.compute: Callable[..., torch.Tensor] = layer.forward
        self._parameters = layer.parameters
        self._replaying = False
        # Of the last forward pass, for the layer after this one to fetch; the autograd graph owns it.
        self.latest: weakref.ref[Kept] | None = None

    def is_replaying(self) -> bool:
        return self._replaying

    def forward(self, hidden: torch.Tensor, **others: Any) -> torch.Tensor:
        """What the layer's forward gives: hidden [batch, seq_local, hidden_size] to the same shape."""
        if not torch.is_grad_enabled():
            return self.compute(hidden, **others)
        # The parameters are inputs of the function, so that autograd itself adds up their gradients: DeepSpeed counts
        # on seeing each of them in the graph.
        trained = [parameter for parameter in self._parameters() if parameter.requires_grad]
        return _Replay.apply(self, others, hidden, *trained)

    def run(self, hidden: torch.Tensor, others: dict[str, Any], kept: Kept, replaying: bool) -> torch.Tensor:
        """The layer's own forward, its attention told where to save or load."""
        if "attention_context" in others:
            context = dataclasses.replace(others["attention_context"], kept=AttentionSlot(self, kept, replaying))
            others = {**others, "attention_context": context}
        self._replaying = replaying
        try:
            return self.compute(hidden, **others)
        finally:
            self._replaying = False

    def fetch_before(self) -> None:
        """Start to bring back what the layer before this one kept: its replay is next."""
        kept = self.before.latest() if self.before is not None and self.before.latest is not None else None
        if kept is not None:
            kept.fetch()


@dataclasses.dataclass(slots=True, weakref_slot=True)
class Kept:
    """What one forward pass of one layer left. Dropped with its graph, it frees what it holds."""

    hidden: DeviceTensor | HostTensor | None = None  # [batch, seq_local, hidden_size]
    output: DeviceTensor | HostTensor | None = None  # [batch, kept rows, heads_local, head_dim]
    lse: DeviceTensor | HostTensor | None = None  # [batch, heads_local, kept rows]

    def fetch(self) -> None:
        for tensor in (self.hidden, self.output, self.lse):
            if tensor is not None:
                tensor.fetch()


class AttentionSlot:
    """The KeptAttention of one layer in one pass."""

    def __init__(self, layer: LayerReplay, kept: Kept, replaying: bool) -> None:
        self._layer, self._kept = layer, kept
        self.replaying = replaying

    def save(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep the last rows: output [batch, rows, heads_local, head_dim], lse [batch, heads_local, rows]."""
        policy, store, rows = self._layer.keep, self._layer.store, output.shape[1]
        first = recomputed_rows(rows, policy.attention_rows)
        if first == rows:
            return
        if first > 0:
            output, lse = output[:, first:], lse[:, :, first:]
            if policy.attention == "device":
                output, lse = output.clone(), lse.clone()  # a view would hold the memory of all rows
        self._kept.output, self._kept.lse = (store.keep(tensor, policy.attention) for tensor in (output, lse))

    def load(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(output, lse) of the last rows that were kept, or None. The slot is empty afterwards."""
        output, lse = self._kept.output, self._kept.lse
        self._kept.output = self._kept.lse = None
        return None if output is None or lse is None else (output.take(), lse.take())


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: LayerReplay, others: dict[str, Any], hidden: torch.Tensor, *trained: torch.Tensor
    ) -> torch.Tensor:
        ctx.layer, ctx.others, ctx.trained = layer, others, trained
        ctx.kept = Kept(hidden=layer.store.keep(hidden, layer.keep.inputs))
        layer.latest = weakref.ref(ctx.kept)
        return layer.run(hidden, others, ctx.kept, replaying=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        layer, kept = ctx.layer, ctx.kept
        if kept.hidden is None:
            raise RuntimeError("backward ran twice through one forward pass of a layer")
        hidden = kept.hidden.take().detach().requires_grad_()
        kept.hidden = None
        layer.fetch_before()
        with torch.enable_grad():
            output = layer.run(hidden, ctx.others, kept, replaying=True)
        root = get_gradient_edge(output)
        del output  # its value is not needed, and it is as large as the input
        gradients = torch.autograd.grad(root, (hidden, *ctx.trained), grads, allow_unused=True)
        return None, None, *gradients
