"""One training stage on one cluster, and the sizes per rank that memory and time both start from.

global batch = accumulation x data-parallel groups x micro-batch sequences
rows         = micro-batch sequences x sequence length / (Ulysses x ring degree), of one rank in one pass
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ultralong_ray.flops import ModelShape
from ultralong_ray.planner.costs import COSTS, Costs
from ultralong_ray.planner.hardware import Hardware
from ultralong_ray.types import LayerKeep, TrainPlan

GIB = 2.0**30
LSE_BYTES = 4
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be predicted. `gradient_bytes`: of the accumulated gradients; under train/engine.py 4, and 2 in
    bfloat16 at ZeRO stage 1."""

    shape: ModelShape
    sequence_length: int
    plan: TrainPlan
    hardware: Hardware
    kernel: str
    micro_batch_sequences: int = 1
    global_batch_sequences: int = 1
    zero_stage: int = 3
    element_bytes: int = 2  # of weights and activations
    gradient_bytes: int = 4
    costs: Costs = COSTS

    @property
    def data_parallel(self) -> int:
        return self.hardware.num_gpus // self.plan.degree

    @property
    def accumulation(self) -> int:
        """Forward passes of one rank per optimizer step."""
        return max(1, self.global_batch_sequences // (self.data_parallel * self.micro_batch_sequences))

    @property
    def rows(self) -> int:
        return self.micro_batch_sequences * self.sequence_length // self.plan.degree

    @property
    def hidden_bytes(self) -> float:
        """A [rows, hidden] tensor."""
        return float(self.rows * self.shape.hidden * self.element_bytes)

    @property
    def query_bytes(self) -> float:
        """A rank's queries: all heads of its rows, or the same number of elements after the exchange."""
        return float(self.rows * self.shape.attention_width * self.element_bytes)

    @property
    def key_bytes(self) -> float:
        """A rank's keys (or values) as attention sees them; heads are repeated where ranks outnumber them."""
        heads = max(self.shape.kv_heads, self.plan.ulysses_degree)
        return float(self.rows * heads * self.shape.head_dim * self.element_bytes)

    @property
    def qk_norm_bytes(self) -> float:
        """What the norms of one layer's queries and keys leave for their backward; 0 where there are none.

        They are transformers' own (parallel/norm.py): of each element the float32 input and the normalised value in
        the type of the weights, of each head and row a float32 factor. Heads are neither exchanged nor repeated yet.
        """
        heads = self.shape.qk_norm * (self.shape.heads + self.shape.kv_heads)
        of_head = self.shape.head_dim * (FLOAT32_BYTES + self.element_bytes) + FLOAT32_BYTES
        return float(self.rows * heads * of_head)

    @property
    def intermediate_bytes(self) -> float:
        """A [rows, intermediate] tensor."""
        return float(self.rows * self.shape.intermediate * self.element_bytes)

    @property
    def layer_weight_bytes(self) -> float:
        """One decoder layer, gathered."""
        return float(self.shape.layer_parameters * self.element_bytes)

    @property
    def vocabulary_bytes(self) -> float:
        """The embedding, or the head, gathered."""
        return float(self.shape.vocab * self.shape.hidden * self.element_bytes)

    @property
    def device_usable_gib(self) -> float:
        return self.costs.device_usable * self.hardware.gpu.memory_gib

    @property
    def host_usable_gib(self) -> float:
        """Of a node."""
        return self.costs.host_usable * self.hardware.host_memory_gib_per_node

    def partition(self, stage: int) -> float:
        """The share of a state that a rank holds when ZeRO partitions it from `stage` on."""
        return 1.0 / self.hardware.num_gpus if self.zero_stage >= stage else 1.0

    @property
    def kept(self) -> list[tuple[int, LayerKeep]]:
        """Neighbouring layers that keep alike, as (how many, what)."""
        return [(len(list(run)), layer) for layer, run in itertools.groupby(self.plan.keep)]

    def kept_bytes(self, layer: LayerKeep) -> tuple[float, float]:
        """What a layer keeps between forward and backward: bytes on (device, host) of a rank."""
        attention = layer.attention_rows * (self.query_bytes + self.rows * self.shape.heads * LSE_BYTES)
        device = (layer.inputs == "device") * self.hidden_bytes + (layer.attention == "device") * attention
        return device, self.hidden_bytes + attention - device
