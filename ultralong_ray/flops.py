"""The FLOP ledger: what one sequence costs, counted in three ways that differ by up to 2.7 times, each by its name.

Flows in: the shape of a model, a sequence length, a plan. Flows out: floating-point operations.

*model, causal*: 6*N*s + 6*L*h*s^2. What training needs without recomputation: attention's forward is 2*L*h*s^2 once
  the upper triangle is left out, its backward twice that. MFU here is always this over the peak.
*hardware*: what the kernels execute: flash attention's backward is 2.5 times its forward (it computes the scores
  again), and a plan that keeps less computes more a second time.
*ALST-style*: 8*N*s + 16*L*h*s^2, the counter of ArcticTraining 0.8 (trainer/flops_counter.py, checkpointing on):
  attention as if not causal, with a second forward. Only for comparison with figures that were counted so.

N is without the input embedding, which multiplies nothing; h is heads * head_dim; s tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ultralong_ray.config import ArchitectureConfig
from ultralong_ray.types import TrainPlan

FLASH_BACKWARD_SHARE = 2.5  # backward over forward FLOPs: five matrix products instead of two


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-class decoder in integers, and which biases and norms it has besides."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # of every query and key head

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> ModelShape:
        """The shape that a Llama-class config.json describes. KeyError names an absent field.

        Fields that the model's class in transformers 5.23 does not read make no difference.
        """
        heads = config["num_attention_heads"]
        kind = config.get("model_type", "llama")
        attention_bias = kind in ("llama", "qwen3") and bool(config.get("attention_bias"))
        return ModelShape(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=attention_bias or kind == "qwen2",
            output_bias=attention_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
            qk_norm=kind == "qwen3",
        )

    @staticmethod
    def from_architecture(architecture: ArchitectureConfig) -> ModelShape:
        return ModelShape.from_config(architecture.model_dump())

    @property
    def attention_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Elements of one layer's query, key, value and output projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def mlp_matrices(self) -> int:
        """Elements of one layer's gate, up and down projections."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden + self.qk_norm * 2 * self.head_dim
        biases = (
            self.qkv_bias * self.head_dim * (self.heads + 2 * self.kv_heads)
            + self.output_bias * self.hidden
            + self.mlp_bias * (2 * self.intermediate + self.hidden)
        )
        return self.attention_matrices + self.mlp_matrices + norms + biases

    @property
    def parameters(self) -> int:
        embeddings = (1 if self.tied else 2) * self.vocab * self.hidden
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def matmul_parameters(self) -> int:
        """N: parameters that multiply every token. The head counts, tied or not; the input embedding never."""
        return self.layers * (self.attention_matrices + self.mlp_matrices) + self.vocab * self.hidden


@dataclass(frozen=True, slots=True)
class Ledger:
    """FLOPs of forward and backward over one or more sequences, under each convention."""

    model_flops_causal: float
    hardware_flops: float
    alst_flops: float

    def times(self, sequences: int) -> Ledger:
        return Ledger(self.model_flops_causal * sequences, self.hardware_flops * sequences, self.alst_flops * sequences)


def ledger(shape: ModelShape, sequence_length: int, plan: TrainPlan) -> Ledger:
    """The three counts for one plain causal sequence trained under `plan`, over all ranks that share it."""
    length, matrices = float(sequence_length), shape.matmul_parameters
    squares = shape.attention_width * length**2  # of one layer
    replayed = sum(replayed_attention(layer.attention_rows, plan.ring_degree).mean for layer in plan.keep)
    attention = 2.0 * squares * (shape.layers * (1 + FLASH_BACKWARD_SHARE) + replayed)
    return Ledger(
        model_flops_causal=6.0 * matrices * length + 6.0 * shape.layers * squares,
        hardware_flops=(6.0 * matrices + 2.0 * replayed_matrices(shape, plan)) * length + attention,
        alst_flops=8.0 * matrices * length + 16.0 * shape.layers * squares,
    )


def prefill_flops(shape: ModelShape, tokens: int) -> float:
    """Causal forward FLOPs of one prompt, 2*N*s + 2*L*h*s^2; the head multiplies the last token only."""
    matrices = shape.layers * (shape.attention_matrices + shape.mlp_matrices)
    attention = 2.0 * shape.layers * shape.attention_width * float(tokens) ** 2
    return 2.0 * matrices * tokens + 2.0 * shape.vocab * shape.hidden + attention


def replayed_matrices(shape: ModelShape, plan: TrainPlan) -> int:
    """Elements of the matrices that multiply every token a second time: all of a layer but the down projection."""
    return len(plan.keep) * (shape.attention_matrices + 2 * shape.hidden * shape.intermediate)


@dataclass(frozen=True, slots=True)
class ReplayedShare:
    """Share of a layer's causal attention forward that is computed twice: over all ranks, and on the slowest."""

    mean: float
    slowest: float


def replayed_attention(rows_kept: float, ring_degree: int) -> ReplayedShare:
    """What keeping the last `rows_kept` of every rank's rows leaves to be computed again.

    Without a ring a rank sees whole sequences, and the first rows (1 - a) cost (1 - a)^2. Ring rank r holds chunks r
    and 2R-1-r of 2R, in this order. In units of chunk^2 its share p of the rows, up to the half, costs
    r*f + f^2/2 with f = 2p, and beyond it r + 1/2 + (2R-1-r)*g + g^2/2 with g = 2p - 1, of 2R in all: the last
    rank's early rows are the dearest, and the others wait for it.
    """
    again = 2.0 * (1.0 - rows_kept)
    early, late = min(again, 1.0), max(again - 1.0, 0.0)

    def share(rank: float) -> float:
        early_cost = rank * early + early**2 / 2
        return (early_cost + (2 * ring_degree - 1 - rank) * late + late**2 / 2) / (2 * ring_degree)

    return ReplayedShare(mean=share((ring_degree - 1) / 2), slowest=share(ring_degree - 1))


def mfu(model_flops_causal: float, seconds: float, num_devices: int, peak_flops: float | None) -> float | None:
    """Utilisation in causal model FLOPs, 0 to 1; None where the peak of a device, in FLOP/s, is unknown."""
    return None if peak_flops is None else model_flops_causal / seconds / num_devices / peak_flops
