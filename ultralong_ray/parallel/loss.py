"""Head and cross-entropy in tiles of rows: logits never exist whole.

At 128K rows and a vocabulary of 128,256 the logits alone would take 64 GiB in float32. Here a tile of them lives at a
time, and since the loss is the end of the graph its gradient is computed in the same pass, so nothing is recomputed.
Softmax and sums are float32 whatever the weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.elementwise import cross_entropy_
from ultralong_ray.parallel.mlp import add_product_, tile_slices


def tiled_cross_entropy(
    hidden: torch.Tensor,  # [rows, hidden_size]
    weight: torch.Tensor,  # [vocab, hidden_size]
    labels: torch.Tensor,  # [rows], -100 where there is no target
    loss_weight: torch.Tensor,  # [rows], 0 where there is no target
    tile_tokens: int,
) -> torch.Tensor:
    """sum(loss_weight * cross_entropy(hidden @ weight.T, labels)), a float32 scalar, nats."""
    return _TiledCrossEntropy.apply(hidden, weight, labels, loss_weight, tile_tokens)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        loss_weight: torch.Tensor,
        tile_tokens: int,
    ) -> torch.Tensor:
        wants_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if wants_gradient else None
        # float32: the sum over tiles would otherwise lose what one tile adds to a bfloat16 total
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for tile in tile_slices(hidden.shape[0], tile_tokens):
            rows = hidden[tile]
            gradient = rows @ weight.T  # [tile, vocab]: the logits, and what they become
            total += cross_entropy_(gradient, labels[tile], loss_weight[tile].float()).sum()
            if grad_hidden is not None and grad_weight is not None:
                torch.mm(gradient, weight, out=grad_hidden[tile])
                add_product_(grad_weight, gradient.T, rows)
        ctx.gradients = grad_hidden, grad_weight, weight.dtype, tile_tokens
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        # Kept by hand and scaled in place: as saved tensors they would exist twice here.
        if ctx.gradients is None:
            raise RuntimeError("backward ran twice through one loss")
        grad_hidden, grad_weight, dtype, tile_tokens = ctx.gradients
        ctx.gradients = None
        for tile in tile_slices(grad_hidden.shape[0], tile_tokens):
            # in float32: a scale rounded to bfloat16 would be off by up to 0.2 % in every gradient of the model
            grad_hidden[tile] = grad_hidden[tile].float().mul_(grads[0])
        return grad_hidden, grad_weight.mul_(grads[0]).to(dtype), None, None, None


class LossHead(nn.Module):
    """Takes the place of a model's `lm_head` and its very parameter, under the same name.

    As a module of its own it is gathered by ZeRO-3's hooks like any other, and a weight tied to the embedding stays
    tied.
    """

    def __init__(self, weight: nn.Parameter, tile_tokens: int) -> None:
        super().__init__()
        self.weight = weight
        self.tile_tokens = tile_tokens

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
        """hidden [batch, seq_local, hidden_size], labels and weights [batch, seq_local] to a float32 scalar sum."""
        return tiled_cross_entropy(
            hidden.flatten(0, 1), self.weight, labels.flatten(), loss_weight.flatten(), self.tile_tokens
        )


class LanguageModelLoss(nn.Module):
    """A Hugging Face causal language model whose forward is this rank's summed loss. Its lm_head is replaced."""

    def __init__(self, causal_lm: Any, tile_tokens: int) -> None:
        super().__init__()
        if causal_lm.lm_head.bias is not None:
            raise ValueError("a head with bias is not supported")
        causal_lm.lm_head = LossHead(causal_lm.lm_head.weight, tile_tokens)
        self.causal_lm = causal_lm

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, seq_local]
        position_ids: torch.Tensor,  # [batch, seq_local]
        labels: torch.Tensor,  # [batch, seq_local], shifted
        loss_weight: torch.Tensor,  # [batch, seq_local]
        attention_context: AttentionContext,
    ) -> torch.Tensor:
        """sum(loss_weight * cross_entropy) over this rank's tokens: a float32 scalar, nats."""
        hidden = self.causal_lm.model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, attention_context=attention_context
        ).last_hidden_state  # [batch, seq_local, hidden_size]
        return self.causal_lm.lm_head(hidden, labels, loss_weight)
