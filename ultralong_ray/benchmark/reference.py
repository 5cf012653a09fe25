"""One Llama layer between embedding and head, for a few target rows of a very long sequence, in float32 and exact.

A loss that has targets at S rows only depends on those rows' queries and on every key and value before them. Its value
and *all* its weight gradients therefore cost a time linear in the sequence: S x s scores instead of s x s. Since the
gradient of a layer is linear in the gradient of its output, rows drawn at random test the very operator that a full
loss would use, and a kernel that mixes up rows anywhere shows up in dK and dV of rows that should have none.

Flows in: config.json, weights, token ids, target rows. Flows out: loss, gradients by name, the layer's output rows.
Plain torch operations on blocks of keys; no kernel, layout or exchange of `parallel` is used. Every rank takes a run of
key positions, and sums are joined by all-reduce. Softmax is merged by log-sum-exp as in flash attention (arXiv
2205.14135), and its gradient is dS = P * (dO V^T - rowsum(dO * O)).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, silu

from ultralong_ray.model.angles import cos_sin
from ultralong_ray.model.rope import from_hf, inv_freq

BLOCK_TOKENS = 4096  # keys at a time
LAYER = "model.layers.0."


@dataclass(frozen=True, slots=True)
class Targets:
    """Rows whose next token is predicted."""

    positions: torch.Tensor  # int64 [S], ascending
    labels: torch.Tensor  # int64 [S]


class ReferenceLayer:
    """The float32 model. `weights`: name as in transformers -> float32 leaf that requires grad, on one device."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
        self.weights, self.ids = weights, ids  # ids: int64 [s]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim, self.eps = config["head_dim"], config["rms_norm_eps"]
        self.scale = self.head_dim**-0.5
        found = from_hf(config)
        original = found.original_context_length or config["max_position_embeddings"]
        self.frequencies = torch.from_numpy(inv_freq(found.rope, self.head_dim, found.theta, original)).to(ids.device)

    def solve(self, targets: Targets) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
        """(mean loss, gradients by name, the layer's output rows [S, hidden]), the same on all ranks. Collective."""
        query = self._query(targets.positions)  # [S, heads, head_dim], with graph
        rows = query.detach()
        attended, lse = self._attend(rows, targets.positions)
        leaf = attended.clone().requires_grad_()
        loss, output = self._tail(leaf, targets)
        loss.backward()
        assert leaf.grad is not None
        if dist.get_rank() != 0:  # every rank computes the tail, one may count it
            for weight in self.weights.values():
                weight.grad = None
        query_grad = self._attend_backward(rows, targets.positions, attended, lse, leaf.grad)
        query.backward(query_grad)
        gradients = {}
        for name, weight in self.weights.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(gradient)
            gradients[name] = gradient
        return loss.item(), gradients, output.detach()

    def _normed(self, positions: torch.Tensor) -> torch.Tensor:
        hidden = embedding(self.ids[positions], self.weights["model.embed_tokens.weight"])  # [rows, hidden]
        return rms_norm(hidden, hidden.shape[-1:], self.weights[LAYER + "input_layernorm.weight"], self.eps)

    def _rotated(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """heads: [rows, heads, head_dim]."""
        cos, sin = cos_sin(positions[None], self.frequencies, 1.0, torch.float32)  # [1, rows, head_dim]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos[0, :, None] + torch.cat([-second, first], dim=-1) * sin[0, :, None]

    def _query(self, positions: torch.Tensor) -> torch.Tensor:
        projected = linear(self._normed(positions), self.weights[LAYER + "self_attn.q_proj.weight"])
        return self._rotated(projected.unflatten(-1, (self.heads, self.head_dim)), positions)

    def _key_value(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [rows, kv_heads, head_dim]."""
        normed = self._normed(positions)
        key, value = (
            linear(normed, self.weights[f"{LAYER}self_attn.{name}_proj.weight"]).unflatten(
                -1, (self.kv_heads, self.head_dim)
            )
            for name in ("k", "v")
        )
        return self._rotated(key, positions), value

    def _blocks(self) -> Iterator[torch.Tensor]:
        """This rank's key positions, a block at a time."""
        share = -(-len(self.ids) // dist.get_world_size())
        start, end = dist.get_rank() * share, min((dist.get_rank() + 1) * share, len(self.ids))
        for first in range(start, end, BLOCK_TOKENS):
            yield torch.arange(first, min(first + BLOCK_TOKENS, end), device=self.ids.device)

    def _scores(self, query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[kv_heads, group, S, block], minus infinity above the diagonal."""
        grouped = query.unflatten(1, (self.kv_heads, -1))  # [S, kv_heads, group, head_dim]
        scores = torch.einsum("skgd,bkd->kgsb", grouped, key) * self.scale
        return scores.masked_fill_(keys > rows[:, None], float("-inf"))

    @torch.no_grad()
    def _attend(self, query: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [S, heads * head_dim] and log-sum-exp [kv_heads, group, S] over the keys of all ranks."""
        group = self.heads // self.kv_heads
        largest = torch.full((self.kv_heads, group, len(rows)), -1e30, device=query.device)
        weight_sum = torch.zeros_like(largest)
        total = torch.zeros(*largest.shape, self.head_dim, device=query.device)
        for keys in self._blocks():
            key, value = self._key_value(keys)
            scores = self._scores(query, key, rows, keys)
            new_largest = torch.maximum(largest, scores.amax(-1))
            shrink = torch.exp(largest - new_largest)
            weights = torch.exp(scores - new_largest[..., None])  # [kv_heads, group, S, block]
            weight_sum = weight_sum * shrink + weights.sum(-1)
            total = total * shrink[..., None] + torch.einsum("kgsb,bkd->kgsd", weights, value)
            largest = new_largest
        overall = largest.clone()
        dist.all_reduce(overall, op=dist.ReduceOp.MAX)
        shrink = torch.exp(largest - overall)
        weight_sum, total = weight_sum * shrink, total * shrink[..., None]
        dist.all_reduce(weight_sum)
        dist.all_reduce(total)
        output = total / weight_sum[..., None]  # [kv_heads, group, S, head_dim]
        return output.permute(2, 0, 1, 3).flatten(1), overall + weight_sum.log()

    def _tail(self, attended: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and the layer's output rows [S, hidden] from attention's output [S, heads * head_dim]."""
        weights = self.weights
        hidden = embedding(self.ids[targets.positions], weights["model.embed_tokens.weight"])
        hidden = hidden + linear(attended, weights[LAYER + "self_attn.o_proj.weight"])
        normed = rms_norm(hidden, hidden.shape[-1:], weights[LAYER + "post_attention_layernorm.weight"], self.eps)
        gate, up = (linear(normed, weights[f"{LAYER}mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        output = hidden + linear(silu(gate) * up, weights[LAYER + "mlp.down_proj.weight"])
        final = rms_norm(output, output.shape[-1:], weights["model.norm.weight"], self.eps)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])  # absent: tied
        return cross_entropy(linear(final, head), targets.labels), output

    def _attend_backward(
        self,
        query: torch.Tensor,  # [S, heads, head_dim]
        rows: torch.Tensor,
        attended: torch.Tensor,  # [S, heads * head_dim]
        lse: torch.Tensor,  # [kv_heads, group, S]
        grad: torch.Tensor,  # of `attended`
    ) -> torch.Tensor:
        """This rank's part of the query's gradient; that of keys and values goes on into the weights' `.grad`."""
        shape = (self.kv_heads, -1, self.head_dim)
        grouped, grad_output = query.unflatten(1, shape[:2]), grad.unflatten(1, shape)  # [S, kv_heads, group, head_dim]
        delta = (grad_output * attended.unflatten(1, shape)).sum(-1).permute(1, 2, 0)  # [kv_heads, group, S]
        query_grad = torch.zeros_like(grouped)
        for keys in self._blocks():
            key, value = self._key_value(keys)  # with graph down to the weights
            with torch.no_grad():
                weights = torch.exp(self._scores(query, key, rows, keys) - lse[..., None])
                value_grad = torch.einsum("kgsb,skgd->bkd", weights, grad_output)
                score_grad = weights * (torch.einsum("skgd,bkd->kgsb", grad_output, value) - delta[..., None])
                key_grad = torch.einsum("kgsb,skgd->bkd", score_grad, grouped) * self.scale
                query_grad += torch.einsum("kgsb,bkd->skgd", score_grad, key) * self.scale
            torch.autograd.backward([key, value], [key_grad, value_grad])
        return query_grad.flatten(1, 2)
