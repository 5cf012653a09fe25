"""Peak memory of a rank, on the GPU and on the host, as a sum of named parts in GiB.

A step has few moments at which memory can be highest: the head and its loss, the backward pass through a layer's MLP
and through its attention (the deepest point, when nothing kept has been freed), the embedding's gradient, the
optimizer. Each is summed, and the largest is the peak.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from ultralong_ray.planner.workload import GIB, Workload

Parts = dict[str, float]  # name -> GiB

MASTER_BYTES, MOMENT_BYTES = 4, 8  # per parameter: float32 weights; Adam's two float32 moments
REDUCE_BUCKET_ELEMENTS = 500_000_000  # below ZeRO-3: DeepSpeed 0.19.8's default; there train/engine.py sets a layer
SUB_GROUP_ELEMENTS = 1_000_000_000  # DeepSpeed's default: how many parameters ZeRO-3's optimizer updates at a time


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """`phases`: (moment, parts that torch allocates). `allocated_gib` is what torch.cuda.max_memory_allocated counts.

    `gib` adds what the device must hold besides: allocator slack, CUDA context and NCCL.
    """

    phases: tuple[tuple[str, Parts], ...]
    outside: Parts  # what stands beside the allocated tensors
    host: Parts  # of a rank
    ranks_per_node: int

    @property
    def peak(self) -> tuple[str, Parts]:
        """The moment of the peak and its parts."""
        return max(self.phases, key=lambda phase: sum(phase[1].values()))

    @property
    def allocated_gib(self) -> float:
        return sum(self.peak[1].values())

    @property
    def gib(self) -> float:
        return self.allocated_gib + sum(self.outside.values())

    @property
    def host_gib(self) -> float:
        return sum(self.host.values())

    @property
    def host_node_gib(self) -> float:
        return self.host_gib * self.ranks_per_node


def predict_memory(work: Workload, first_step: bool = False) -> MemoryPrediction:
    """Peak memory of the fullest rank. `first_step`: Adam's moments do not exist before the first update."""
    states, gathered, kept = _states(work), _gathered(work), _kept(work)
    moments = states.pop("Adam moments")
    early = {} if first_step else {"Adam moments": moments}
    bytes_by_phase: list[tuple[str, Parts]] = [
        ("loss", {**states, **early, **gathered, **kept, **_head(work)}),
        ("backward of an MLP", {**states, **early, **gathered, **kept, **_mlp_backward(work)}),
        ("backward of attention", {**states, **early, **gathered, **kept, **_attention_backward(work)}),
        ("backward of the embedding", {**states, **early, **_embedding(work)}),
        ("optimizer", {**states, "Adam moments": moments, **_update(work)}),
    ]
    phases = tuple((name, _gib(parts)) for name, parts in bytes_by_phase)
    costs, highest = work.costs, max(sum(parts.values()) for _, parts in phases)
    outside = {
        "CUDA context": costs.context_gib,
        "NCCL": costs.nccl_gib,
        "allocator slack": costs.allocator_slack * highest,
    }
    return MemoryPrediction(phases, outside, _gib(_host(work)), work.hardware.gpus_on_a_node)


def _gib(parts: Parts) -> Parts:
    return {name: size / GIB for name, size in parts.items() if size}


def _states(work: Workload) -> Parts:
    """What lives from step to step, bytes."""
    parameters, on_device = work.shape.parameters, not work.plan.offload_optimizer
    masters = work.zero_stage >= 1 or work.element_bytes < MASTER_BYTES
    bucket = float(REDUCE_BUCKET_ELEMENTS * work.element_bytes)
    if work.zero_stage == 3:
        bucket = work.costs.reduce_bucket_layers * work.layer_weight_bytes
    return {
        "weights": work.partition(3) * parameters * work.element_bytes,
        "float32 weights": on_device * masters * work.partition(1) * parameters * MASTER_BYTES,
        "Adam moments": on_device * work.partition(1) * parameters * MOMENT_BYTES,
        "gradients": on_device * work.partition(2) * parameters * work.gradient_bytes,
        "reduce bucket": bucket if work.zero_stage >= 2 else 0.0,
    }


def _gathered(work: Workload) -> Parts:
    return {"gathered layers": (work.zero_stage == 3) * work.costs.gathered_layers * work.layer_weight_bytes}


def _kept(work: Workload) -> Parts:
    """What all layers together keep for the backward pass, and what is on its way from the host.

    A layer's replay frees what it kept and fetches what the layer before it left on the host, so the most is held
    at one layer: at the last one, or where those that kept on the device are done and the host's turn comes.
    """
    plan, shape = work.plan, work.shape
    if not plan.keep:
        # Autograd keeps, per layer: both norms' inputs and outputs, what norms of q and k leave, gathered q, k, v,
        # attention's output before and after the exchange, and of the MLP gate, its activation, up and their product.
        attention = work.qk_norm_bytes + 3 * work.query_bytes + 2 * work.key_bytes
        layer = 4 * work.hidden_bytes + attention + 4 * work.intermediate_bytes
        return {"kept by autograd": shape.layers * layer}
    device, host = zip(*(work.kept_bytes(layer) for layer in plan.keep), strict=True)
    held = list(itertools.accumulate(device))  # by layer: its own and those of the layers before it
    fetched = [own + before for own, before in zip(host, (0.0, *host), strict=False)]
    fullest = max(range(shape.layers), key=lambda layer: held[layer] + fetched[layer])
    inputs = sum(work.hidden_bytes for layer in plan.keep[: fullest + 1] if layer.inputs == "device")
    return {
        "kept inputs": inputs,
        "kept attention": held[fullest] - inputs,
        "fetched from the host": fetched[fullest],
    }


def _head(work: Workload) -> Parts:
    """Loss and its gradient in one pass: the weight and its float32 gradient, which is then rounded; a tile's logits,
    which become their own gradient; the last hidden states before and after the norm, and their gradient."""
    rows = min(work.plan.loss_tile_tokens, work.rows)
    elements = work.shape.vocab * work.shape.hidden
    return {
        "head and its gradient": 2 * work.vocabulary_bytes + 4.0 * elements,
        "last hidden states": 3 * work.hidden_bytes,
        "logits of a tile": work.costs.logit_tensors * rows * work.shape.vocab * work.element_bytes,
    }


def _replayed(work: Workload) -> Parts:
    """What one layer's replay holds for its own backward, with the gradients of its weights."""
    partial = any(layer.attention_rows < 1 for _, layer in work.kept)
    return {
        "layer's weight gradients": work.layer_weight_bytes,
        "layer's query, key, value": work.query_bytes + 2 * work.key_bytes,
        "layer's query and key norms": work.qk_norm_bytes,
        "layer's attention again": work.query_bytes if partial else 0.0,
    }


def _mlp_backward(work: Workload) -> Parts:
    """What both norms left, the residual between them, the output projection's input; gradients in and out; a tile."""
    shape, tile = work.shape, min(work.plan.mlp_tile_tokens if work.plan.keep else work.rows, work.rows)
    accumulated = 4.0 * shape.mlp_matrices if tile < work.rows else 0.0
    return {
        **_replayed(work),
        "layer's other tensors": (3 + 2 * work.costs.norm_tensors) * work.hidden_bytes + work.query_bytes,
        "MLP tile": work.costs.mlp_tile_tensors * tile * shape.intermediate * work.element_bytes + accumulated,
    }


def _attention_backward(work: Workload) -> Parts:
    """What the first norm left, the residual's gradient and the incoming one, which its caller holds to the end; the
    attention output's gradient; dq, dk and dv.

    The kernel sums dq in float32, and dk, dv too where query heads share them. A ring holds the next block of keys
    and values, float32 sums of all three gradients, and sends those of dk and dv along.
    """
    floats = 4.0 / work.element_bytes
    shared = work.shape.heads > max(work.shape.kv_heads, work.plan.ulysses_degree)
    gradients = (1 + floats) * work.query_bytes + 2 * (1 + floats * shared) * work.key_bytes
    ring = 0.0
    if work.plan.ring_degree > 1:
        ring = floats * work.query_bytes + 2 * (2 + 2 * floats) * work.key_bytes
    return {
        **_replayed(work),
        "layer's other tensors": (2 + work.costs.norm_tensors) * work.hidden_bytes,
        "output gradient": work.query_bytes,
        "query, key, value gradients": gradients,
        "ring buffers": ring,
    }


def _embedding(work: Workload) -> Parts:
    return {"embedding and its gradient": 2 * work.vocabulary_bytes, "hidden gradient": work.hidden_bytes}


def _update(work: Workload) -> Parts:
    """A float32 copy of the gradients where they were summed in less: of a sub-group, below ZeRO-3 of a rank's part."""
    if work.gradient_bytes >= MASTER_BYTES or work.plan.offload_optimizer:
        return {}
    share = work.partition(1) * work.shape.parameters
    return {"float32 gradients": MASTER_BYTES * (min(SUB_GROUP_ELEMENTS, share) if work.zero_stage == 3 else share)}


def _host(work: Workload) -> Parts:
    """Host memory of a rank, bytes. An offloaded optimizer has gradients in float32 like its weights."""
    share = work.partition(1) * work.shape.parameters
    written = work.shape.parameters / work.hardware.num_gpus  # of a checkpoint; replicas share the work
    in_memory = work.plan.checkpoint_snapshot == "memory"
    return {
        "kept activations": sum(number * work.kept_bytes(layer)[1] for number, layer in work.kept),
        "optimizer": work.plan.offload_optimizer * share * (2 * MASTER_BYTES + MOMENT_BYTES),
        "checkpoint snapshot": in_memory * written * (MASTER_BYTES + MOMENT_BYTES),
        "checkpoint staging": (not in_memory) * 4.0 * min(SUB_GROUP_ELEMENTS, share),
        "process": work.costs.process_host_gib * GIB,
    }
