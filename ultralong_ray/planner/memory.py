"""Peak memory of a rank, on the GPU and on the host, as a sum of named parts in GiB.

A step has few moments at which memory can be highest: the head and its loss, the backward pass through a layer's MLP
and through its attention (the deepest point, when nothing kept has been freed), the embedding's gradient, the
optimizer. Each is summed, and the largest is the peak. The counts of tensors follow train/replay.py, parallel/mlp.py,
parallel/loss.py and parallel/ring.py: change them together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ultralong_ray.planner.workload import GIB, Workload

Parts = dict[str, float]  # name -> GiB

MASTER_BYTES, MOMENT_BYTES = 4, 8  # per parameter: float32 weights; Adam's two float32 moments
REDUCE_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed 0.19.8's default, allocated once
SUB_GROUP_ELEMENTS = 1_000_000_000  # the same: how many parameters the optimizer updates at a time
LOGIT_BYTES = 12  # per logit of a tile: product, float32 copy, log-softmax, gradient
CONTEXT_GIB = 0.6  # CUDA context, kernels, cuBLAS workspace: outside torch's allocator [assumed]
NCCL_GIB = 1.0  # communicators' buffers: outside it as well [assumed]
ALLOCATOR_SLACK = 0.04  # reserved beyond allocated, with expandable segments [assumed]
PROCESS_HOST_GIB = 4.0  # Python, CUDA and NCCL in a rank's resident memory, slices of the corpus [assumed]
HOST_USABLE = 0.9  # of a node's memory: the rest is the system's and Ray's [assumed]


@dataclass(frozen=True, slots=True)
class MemoryPrediction:
    """`phases`: (moment, parts that torch allocates). `allocated_gib` is what torch.cuda.max_memory_allocated counts.

    `gib` adds what the device must hold besides: allocator slack, CUDA context and NCCL.
    """

    phases: tuple[tuple[str, Parts], ...]
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
    def outside(self) -> Parts:
        """What stands beside the allocated tensors."""
        return {"CUDA context": CONTEXT_GIB, "NCCL": NCCL_GIB, "allocator slack": ALLOCATOR_SLACK * self.allocated_gib}

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
    return MemoryPrediction(phases, _gib(_host(work)), work.hardware.gpus_on_a_node)


def _gib(parts: Parts) -> Parts:
    return {name: size / GIB for name, size in parts.items() if size}


def _states(work: Workload) -> Parts:
    """What lives from step to step, bytes."""
    parameters, on_device = work.shape.parameters, not work.plan.offload_optimizer
    masters = work.zero_stage >= 1 or work.element_bytes < MASTER_BYTES
    bucket = REDUCE_BUCKET_ELEMENTS * work.element_bytes if work.zero_stage >= 2 else 0
    return {
        "weights": work.partition(3) * parameters * work.element_bytes,
        "float32 weights": on_device * masters * work.partition(1) * parameters * MASTER_BYTES,
        "Adam moments": on_device * work.partition(1) * parameters * MOMENT_BYTES,
        "gradients": on_device * work.partition(2) * parameters * work.gradient_bytes,
        "reduce bucket": float(bucket),
    }


def _gathered(work: Workload) -> Parts:
    """The layer that computes and the next one."""
    return {"gathered layers": 2 * work.layer_weight_bytes if work.zero_stage == 3 else 0.0}


def _kept(work: Workload) -> Parts:
    """What all layers together keep for the backward pass, and what is on its way from the host."""
    plan, shape = work.plan, work.shape
    if not plan.keep:
        # Autograd keeps, per layer: both norms' inputs and outputs, gathered q, k, v, attention's output before and
        # after the exchange; of the MLP only its input, which is the second norm's output.
        layer = 4 * work.hidden_bytes + 3 * work.query_bytes + 2 * work.key_bytes
        return {"kept by autograd": shape.layers * layer}
    inputs = sum(work.hidden_bytes for layer in plan.keep if layer.inputs == "device")
    kept = [work.kept_bytes(layer) for layer in plan.keep]
    return {
        "kept inputs": inputs,
        "kept attention": sum(device for device, _ in kept) - inputs,
        "fetched from the host": 2 * max(host for _, host in kept),
    }


def _head(work: Workload) -> Parts:
    """Loss and its gradient in one pass: the weight, its gradient in float32 and a tile's share of it."""
    rows = min(work.plan.loss_tile_tokens, work.rows)
    elements = work.shape.vocab * work.shape.hidden
    return {
        "head and its gradient": 2 * work.vocabulary_bytes + 4.0 * elements,
        "last hidden states": 3 * work.hidden_bytes,
        "logits of a tile": float(rows * work.shape.vocab * LOGIT_BYTES),
    }


def _replayed(work: Workload) -> Parts:
    """What one layer's replay holds for its own backward, with the gradients of its weights."""
    partial = any(layer.attention_rows < 1 for layer in work.plan.keep)
    return {
        "layer's weight gradients": work.layer_weight_bytes,
        "layer's query, key, value": work.query_bytes + 2 * work.key_bytes,
        "layer's attention again": work.query_bytes if partial else 0.0,
    }


def _mlp_backward(work: Workload) -> Parts:
    """Norm outputs, the residual, the output projection's input; gradients in and out; one tile's intermediates."""
    shape, tile = work.shape, min(work.plan.mlp_tile_tokens, work.rows)
    accumulated = 4.0 * shape.mlp_matrices if tile < work.rows else 0.0
    return {
        **_replayed(work),
        "layer's other tensors": 7 * work.hidden_bytes + work.query_bytes,
        "MLP tile": 6.0 * tile * shape.intermediate * work.element_bytes + accumulated,
    }


def _attention_backward(work: Workload) -> Parts:
    """The first norm's output and the residual's gradient; output gradient before and after the exchange; dq, dk, dv.

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
        "layer's other tensors": 2 * work.hidden_bytes,
        "output gradient": 2 * work.query_bytes,
        "query, key, value gradients": gradients,
        "ring buffers": ring,
    }


def _embedding(work: Workload) -> Parts:
    return {"embedding and its gradient": 2 * work.vocabulary_bytes, "hidden gradient": work.hidden_bytes}


def _update(work: Workload) -> Parts:
    """A float32 copy of a sub-group's gradients where they were summed in less."""
    if work.gradient_bytes >= MASTER_BYTES or work.plan.offload_optimizer:
        return {}
    return {"float32 gradients": 4.0 * min(SUB_GROUP_ELEMENTS, work.partition(1) * work.shape.parameters)}


def _host(work: Workload) -> Parts:
    """Host memory of a rank, bytes."""
    share = work.partition(1) * work.shape.parameters
    return {
        "kept activations": sum(work.kept_bytes(layer)[1] for layer in work.plan.keep),
        "optimizer": work.plan.offload_optimizer * share * (MASTER_BYTES + MOMENT_BYTES + work.gradient_bytes),
        "checkpoint staging": 4.0 * min(SUB_GROUP_ELEMENTS, share),
        "process": PROCESS_HOST_GIB * GIB,
    }
