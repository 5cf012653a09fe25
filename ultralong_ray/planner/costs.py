"""Every constant of the predictions that is no data sheet's: counts read off the training code, and a few assumptions.

The counts say how many tensors are alive, or how often memory is passed over, at one point of one layer; they follow
train/replay.py, parallel/mlp.py, parallel/norm.py, parallel/loss.py, parallel/ulysses.py and train/engine.py, so change
them together. What marks [assumed] is an estimate to be replaced by measurements.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Costs:
    """Tensors and passes are counted in whole ones of the width named: hidden, query (all heads), intermediate."""

    # Tensors alive in the backward pass of a layer.
    norm_tensors: float = 1  # of hidden width, that one norm leaves for its backward: a fused one leaves its output
    mlp_tile_tensors: float = 3  # of intermediate width, in a tile: gate, up, product, and their gradients in place
    logit_tensors: float = 1  # of a tile's logits, in the type of the weights: they become their own gradient
    gathered_layers: float = 2  # the one that computes and the next one
    reduce_bucket_layers: float = 1  # gradients on their way; one bucket of a layer

    # Passes over memory, reads and writes each counted.
    norm_forward: float = 2  # of hidden width, one norm
    norm_backward: float = 4
    rotary: float = 10  # of query and key width, in each direction: transformers' own, not fused
    swiglu_forward: float = 3  # of intermediate width
    swiglu_backward: float = 6
    logit_passes: float = 4  # of a tile's logits: the product written; read twice and written by the cross-entropy
    update_bytes: float = (
        30  # per parameter of Adam: gradient, weight, moments read; weight, moments, bf16 copy written
    )

    # Speeds, as shares of a data sheet's.
    # Kernels timed alone run faster than in a whole step on a hot, power-limited GPU. Fitted to three measured steps of
    # the Llama-3.1-8B shape on 4 x H200 (10.8 s at 128K; 30.7 s at 512K, 8 layers; 130.7 s at 512K with compilation).
    sustained_share: float = 0.93
    gemm_share: float = 600 / 989.5  # of peak, large bfloat16 products: 600 TFLOP/s on an H100 [assumed]
    link_share: float = 0.8  # of NVLink, PCIe, network and memory that large transfers reach [assumed]
    ring_share: float = 0.97  # of attention's rate: Ulysses x ring over Ulysses alone in MagiAttention's benchmark
    host_adam_gbytes_per_second: float = 200.0  # of a node's memory, for Adam on its CPUs [assumed]
    # Of a step: its batch, the engine's and metrics' own work. Fitted to three trainings of a model 512 wide with steps
    # of a tenth of a second (jobs/results/planner_of_the_reproduction_2xh200.json).
    around_model_seconds: float = 0.04

    # Memory outside torch's tensors.
    context_gib: float = 0.6  # CUDA context, kernels, cuBLAS workspace [assumed]
    nccl_gib: float = 1.0  # communicators' buffers [assumed]
    allocator_slack: float = 0.04  # reserved beyond allocated, with expandable segments [assumed]
    process_host_gib: float = 4.0  # Python, CUDA and NCCL in a rank's resident memory, slices of the corpus [assumed]
    device_usable: float = 0.95  # of what torch reports as total: room for what a prediction misses [chosen]
    host_usable: float = 0.9  # of a node's memory: the rest is the system's and Ray's [assumed]


COSTS = Costs()
