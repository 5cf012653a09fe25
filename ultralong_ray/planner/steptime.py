"""Seconds of an optimizer step as a sum of named parts.

Work is FLOPs over measured rates and bytes over the speeds of links. Transfers that run beside computation (weights
of the next layer, kept activations, keys and values of the ring) count only for what computation does not cover. The
counts of tensors follow train/replay.py, parallel/ulysses.py and parallel/ring.py: change them together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong_ray.flops import FLASH_BACKWARD_SHARE, replayed_attention, replayed_matrices
from ultralong_ray.planner.hardware import GIGA, TERA
from ultralong_ray.planner.workload import Workload

Seconds = dict[str, float]

LINK_SHARE = 0.8  # of a link's or a memory's data sheet speed that large transfers reach [assumed]
RING_SHARE = 0.97  # of a whole call's rate: blocks of a Ulysses x ring against Ulysses alone, MagiAttention's benchmark
UPDATE_BYTES = 30  # per parameter of Adam: gradient, weight and moments read; weight, moments, bfloat16 copy written
HOST_MEMORY_GBYTES_PER_SECOND = 200.0  # of a node, for Adam on its CPUs [assumed]
LOGIT_PASSES_BYTES = 24  # per logit: softmax and its gradient, read and written


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
    return {name: seconds for name, seconds in step.items() if seconds}


def _layer(work: Workload) -> LayerTime:
    shape, plan, gpu = work.shape, work.plan, work.hardware.gpu
    forward_rate, backward_rate = gpu.attention_tflops(work.kernel, work.sequence_length)
    if plan.ring_degree > 1:
        forward_rate, backward_rate = RING_SHARE * forward_rate, RING_SHARE * backward_rate
    causal = 2.0 * shape.attention_width * float(work.sequence_length) ** 2 * work.micro_batch_sequences / plan.degree
    again = sum(replayed_attention(layer.attention_rows, plan.ring_degree).slowest for layer in plan.keep)
    gemm = gpu.gemm_tflops * TERA
    elementwise_forward, elementwise_backward = _elementwise_bytes(work)
    memory = LINK_SHARE * gpu.memory_gbytes_per_second * GIGA
    return LayerTime(
        attention_forward=causal / (forward_rate * TERA),
        attention_backward=FLASH_BACKWARD_SHARE * causal / (backward_rate * TERA),
        attention_replay=causal / (forward_rate * TERA) * again / shape.layers,
        matrices_forward=2.0 * (shape.attention_matrices + shape.mlp_matrices) * work.rows / gemm,
        matrices_replay=2.0 * replayed_matrices(shape, plan) / shape.layers * work.rows / gemm,
        elementwise_forward=elementwise_forward / memory,
        elementwise_backward=elementwise_backward / memory,
        exchange_once=_exchange_seconds(work),
    )


def _elementwise_bytes(work: Workload) -> tuple[float, float]:
    """Bytes that one layer reads and writes outside matrix products and attention: (forward, replay and backward).

    Norms and SwiGLU fused, rotary embedding as transformers computes it (ten passes), exchanges packed and unpacked.
    """
    hidden, query, key = work.hidden_bytes, work.query_bytes, work.key_bytes
    rotary = 10 * (query + key)
    packing = 4 * (query + 2 * key) + 4 * query if work.plan.ulysses_degree > 1 else 0.0
    residuals = 6 * hidden
    floats = 4.0 / work.element_bytes
    merged = (work.plan.ring_degree - 1) * (2 * floats + 1)  # passes over an output that a ring adds up
    forward = 4 * hidden + rotary + packing + residuals + 3 * work.intermediate_bytes + merged * query
    replay = (forward - 3 * work.intermediate_bytes - merged * query) if work.plan.keep else 0.0
    gradients = 8 * hidden + rotary + packing + residuals + 9 * work.intermediate_bytes + 5 * query
    return forward, replay + gradients + merged * (query + 2 * key)


def _exchange_seconds(work: Workload) -> float:
    """One way in for query, key and value and one way out: all-to-all over NVLink, and over the network beyond."""
    degree, node = work.plan.ulysses_degree, work.hardware.gpus_on_a_node
    per_peer = (2 * work.query_bytes + 2 * work.key_bytes) / degree
    local = min(degree, node)
    nvlink = LINK_SHARE * work.hardware.gpu.nvlink_gbytes_per_second * GIGA
    network = LINK_SHARE * work.hardware.network_gbytes_per_second * GIGA
    return max((local - 1) * per_peer / nvlink, (degree - local) * per_peer / network)


def _ring_exposed(work: Workload, layer: LayerTime) -> float:
    """Seconds per layer that a ring waits for the next block: keys and values, and backward float32 dk and dv too."""
    ring = work.plan.ring_degree
    if ring == 1:
        return 0.0
    inside = work.plan.degree <= work.hardware.gpus_on_a_node
    speed = work.hardware.gpu.nvlink_gbytes_per_second if inside else work.hardware.network_gbytes_per_second
    block = 2 * work.key_bytes / (LINK_SHARE * speed * GIGA)
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
    per_byte = (ranks - 1) / ranks / (LINK_SHARE * speed * GIGA)
    if work.zero_stage < 3:
        return 2 * work.shape.parameters * work.element_bytes * per_byte / work.accumulation
    gather = work.layer_weight_bytes * per_byte
    hidden = max(0.0, gather - layer.forward) + max(0.0, 2 * gather - layer.backward)
    return work.shape.layers * hidden + 4 * work.vocabulary_bytes * per_byte


def _host_exposed(work: Workload, layer: LayerTime) -> float:
    """What of the copies to and from the host takes longer than the layer beside which they run."""
    speed = LINK_SHARE * work.hardware.gpu.pcie_gbytes_per_second * GIGA
    copies = [work.kept_bytes(kept)[1] / speed for kept in work.plan.keep]
    return sum(max(0.0, copy - layer.forward) + max(0.0, copy - layer.backward) for copy in copies)


def _head(work: Workload) -> float:
    """Three products of the head's size, and the softmax of every logit."""
    logits = float(work.rows) * work.shape.vocab
    products = 6.0 * logits * work.shape.hidden / (work.hardware.gpu.gemm_tflops * TERA)
    return products + logits * LOGIT_PASSES_BYTES / (LINK_SHARE * work.hardware.gpu.memory_gbytes_per_second * GIGA)


def _update(work: Workload) -> float:
    """Adam on the GPU, or on the node's CPUs with gradients moved there and weights back."""
    share = work.partition(1) * work.shape.parameters
    if not work.plan.offload_optimizer:
        return share * UPDATE_BYTES / (LINK_SHARE * work.hardware.gpu.memory_gbytes_per_second * GIGA)
    on_cpu = share * work.hardware.gpus_on_a_node * UPDATE_BYTES / (HOST_MEMORY_GBYTES_PER_SECOND * GIGA)
    moved = share * (work.gradient_bytes + work.element_bytes)
    return on_cpu + moved / (LINK_SHARE * work.hardware.gpu.pcie_gbytes_per_second * GIGA)
