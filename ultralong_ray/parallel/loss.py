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
        for start in range(0, hidden.shape[0], tile_tokens):
            tile = slice(start, start + tile_tokens)
            rows = hidden[tile]
            log_probs = (rows @ weight.T).float().log_softmax(-1)  # [tile, vocab]
            target = labels[tile].clamp_min(0).unsqueeze(1)  # [tile, 1]; ignored rows point anywhere, weigh nothing
            scale = loss_weight[tile].float().unsqueeze(1)  # [tile, 1]
            total -= (log_probs.gather(1, target) * scale).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(1, target, torch.full_like(scale, -1.0))
            grad = grad.mul_(scale).to(weight.dtype)
            grad_hidden[tile] = grad @ weight
            grad_weight += grad.T @ rows
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None


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
