"""Seconds of an optimizer step as a sum of named parts.

Work is FLOPs over measured rates and bytes over the speeds of links. Transfers that run beside computation (weights
of the next layer, kept activations, keys and values of the ring) count only for what computation does not cover.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong_ray.flops import FLASH_BACKWARD_SHARE, replayed_attention, replayed_matrices
from ultralong_ray.planner.hardware import GIGA, NARROW_HEAD_DIM, TERA
from ultralong_ray.planner.workload import Workload

Seconds = dict[str, float]


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One layer in one pass over a micro-batch, seconds."""

    attention_forward: float
    attention_backward: float
    attention_replay: float
    matrices_forward: float
    matrices_replay: float
    elementwise_forward: float
    elementwise_backward: float  # the replay's included
    exchange_once: float

    @property
    def forward(self) -> float:
        return self.attention_forward + self.matrices_forward + self.elementwise_forward + self.exchange_once

    @property
    def backward(self) -> float:
        """Replay and gradients."""
        attention = self.attention_backward + self.attention_replay
        matrices = 2 * self.matrices_forward + self.matrices_replay
        return attention + matrices + self.elementwise_backward + 2 * self.exchange_once


def predict_time(work: Workload) -> Seconds:
    """Parts of one optimizer step. Their sum is the prediction; kernel compilation in the first step is not in it."""
    layer, layers, passes = _layer(work), work.shape.layers, work.accumulation
    replays = bool(work.plan.keep)
    parts = {
        "attention forward": layers * layer.attention_forward,
        "attention backward": layers * layer.attention_backward,
        "attention again": layers * layer.attention_replay,
        "matrices": layers * (3 * layer.matrices_forward + layer.matrices_replay),
        "head and loss": _head(work),
        "elementwise": layers * (layer.elementwise_forward + layer.elementwise_backward),
        "Ulysses exchange": layers * (3 if replays else 2) * layer.exchange_once,
        "ring not hidden": layers * _ring_exposed(work, layer),
        "ZeRO not hidden": _zero_exposed(work, layer),
        "host transfer not hidden": _host_exposed(work, layer),
    }
    step = {name: passes * seconds for name, seconds in parts.items()}
    step["optimizer"] = _update(work)
    step["around the model"] = work.costs.around_model_seconds
    return {name: seconds for name, seconds in step.items() if seconds}


def _layer(work: Workload) -> LayerTime:
    shape, plan, gpu = work.shape, work.plan, work.hardware.gpu
    share = work.costs.ring_share if plan.ring_degree > 1 else 1.0
    if shape.head_dim > NARROW_HEAD_DIM:  # narrower ones wait for exponentials and leave the GPU below its power limit
        share *= work.costs.sustained_share
    forward_rate, backward_rate = (
        share * rate * TERA for rate in gpu.attention_tflops(work.kernel, work.sequence_length, shape.head_dim)
    )
    causal = 2.0 * shape.attention_width * float(work.sequence_length) ** 2 * work.micro_batch_sequences / plan.degree
    again = sum(
        number * replayed_attention(layer.attention_rows, plan.ring_degree).slowest for number, layer in work.kept
    )
    gemm = _gemm_rate(work)
    elementwise_forward, elementwise_backward = _elementwise_bytes(work)
    memory = _speed(work, gpu.memory_gbytes_per_second)
    return LayerTime(
        attention_forward=causal / forward_rate,
        attention_backward=FLASH_BACKWARD_SHARE * causal / backward_rate,
        attention_replay=causal / forward_rate * again / shape.layers,
        matrices_forward=2.0 * (shape.attention_matrices + shape.mlp_matrices) * work.rows / gemm,
        matrices_replay=2.0 * replayed_matrices(shape, plan) / shape.layers * work.rows / gemm,
        elementwise_forward=elementwise_forward / memory,
        elementwise_backward=elementwise_backward / memory,
        exchange_once=_exchange_seconds(work),
    )


def _elementwise_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that one layer reads and writes outside matrix products and attention: (forward, replay and backward).

    Norms, rotary embedding, SwiGLU, the packing of exchanges, residual additions; in the backward pass also what the
    kernel reads of output and gradient and its float32 dq. A ring adds up float32 outputs, and gradients.
    """
    costs = work.costs
    hidden, query, key, inner = work.hidden_bytes, work.query_bytes, work.key_bytes, work.intermediate_bytes
    rotary, residuals = costs.rotary * (query + key), 6 * hidden
    exchanged = work.plan.ulysses_degree > 1
    attention = 2 * costs.norm_forward * hidden + rotary + residuals + exchanged * 4 * (query + key)
    merges = (work.plan.ring_degree - 1) * (1 + 8.0 / work.element_bytes)  # a part read, float32 sums read and written
    forward = attention + costs.swiglu_forward * inner + merges * query
    packing = exchanged * (6 * query + 8 * key)
    gradients = 2 * costs.norm_backward * hidden + rotary + residuals + packing + 7 * query
    gradients += costs.swiglu_backward * inner
    replay = attention if work.plan.keep else 0.0
    return forward, replay + gradients + merges * (query + 2 * key)


def _exchange_seconds(work: Workload) -> float:
    """One way in for query, key and value and one way out: all-to-all over NVLink, and over the network beyond."""
    degree, node = work.plan.ulysses_degree, work.hardware.gpus_on_a_node
    per_peer = (2 * work.query_bytes + 2 * work.key_bytes) / degree
    local = min(degree, node)
    nvlink = _speed(work, work.hardware.gpu.nvlink_gbytes_per_second)
    network = _speed(work, work.hardware.network_gbytes_per_second)
    return max((local - 1) * per_peer / nvlink, (degree - local) * per_peer / network)


def _ring_exposed(work: Workload, layer: LayerTime) -> float:
    """Seconds per layer that a ring waits for the next block: keys and values, and backward float32 dk and dv too."""
    ring = work.plan.ring_degree
    if ring == 1:
        return 0.0
    inside = work.plan.degree <= work.hardware.gpus_on_a_node
    speed = work.hardware.gpu.nvlink_gbytes_per_second if inside else work.hardware.network_gbytes_per_second
    block = 2 * work.key_bytes / _speed(work, speed)
    forward = max(0.0, block - layer.attention_forward / ring)
    backward = max(0.0, block * (1 + 4.0 / work.element_bytes) - layer.attention_backward / ring)
    again = forward if layer.attention_replay else 0.0
    return (ring - 1) * (forward + backward + again)


def _zero_exposed(work: Workload, layer: LayerTime) -> float:
    """Gathering a layer twice and reducing its gradients once, beside its computation; head and embedding bare.

    A node's adapters work together: between nodes the collective runs at the sum of their speeds or NVLink's.
    """
    ranks, hardware = work.hardware.num_gpus, work.hardware
    if ranks == 1:
        return 0.0
    speed = hardware.gpu.nvlink_gbytes_per_second
    if hardware.num_nodes > 1:
        speed = min(speed, hardware.network_gbytes_per_second * hardware.gpus_on_a_node)
    per_byte = (ranks - 1) / ranks / _speed(work, speed)
    if work.zero_stage < 3:
        return 2 * work.shape.parameters * work.element_bytes * per_byte / work.accumulation
    gather = work.layer_weight_bytes * per_byte
    hidden = max(0.0, gather - layer.forward) + max(0.0, 2 * gather - layer.backward)
    return work.shape.layers * hidden + 4 * work.vocabulary_bytes * per_byte


def _host_exposed(work: Workload, layer: LayerTime) -> float:
    """What of the copies to and from the host takes longer than the layer beside which they run."""
    speed = _speed(work, work.hardware.gpu.pcie_gbytes_per_second)
    copies = [(number, work.kept_bytes(kept)[1] / speed) for number, kept in work.kept]
    return sum(number * (max(0.0, copy - layer.forward) + max(0.0, copy - layer.backward)) for number, copy in copies)


def _head(work: Workload) -> float:
    """Three products of the head's size, and the softmax of every logit."""
    logits, gpu = float(work.rows) * work.shape.vocab, work.hardware.gpu
    products = 6.0 * logits * work.shape.hidden / _gemm_rate(work)
    passed = work.costs.logit_passes * logits * work.element_bytes
    return products + passed / _speed(work, gpu.memory_gbytes_per_second)


def _update(work: Workload) -> float:
    """Adam on the GPU, or on the node's CPUs with gradients moved there and weights back."""
    share = work.partition(1) * work.shape.parameters
    if not work.plan.offload_optimizer:
        return share * work.costs.update_bytes / _speed(work, work.hardware.gpu.memory_gbytes_per_second)
    on_cpu = (
        share * work.hardware.gpus_on_a_node * work.costs.update_bytes / (work.costs.host_adam_gbytes_per_second * GIGA)
    )
    moved = share * (work.gradient_bytes + work.element_bytes)
    return on_cpu + moved / _speed(work, work.hardware.gpu.pcie_gbytes_per_second)


def _speed(work: Workload, gbytes_per_second: float) -> float:
    """What large transfers reach of a data sheet's GB/s, in bytes per second."""
    return work.costs.link_share * gbytes_per_second * GIGA


def _gemm_rate(work: Workload) -> float:
    """FLOP/s of large matrix products within a step."""
    return work.costs.sustained_share * work.costs.gemm_share * work.hardware.gpu.peak_tflops * TERA
