"""The one place that talks to DeepSpeed's engine, read against DeepSpeed 0.19.8.

To DeepSpeed every rank is data-parallel: no mpu is passed, and gradients are averaged over the whole world at every
ZeRO stage. (With its own sequence-parallel mpu the divisor is world or world / degree, depending on the stage.) The
loss is scaled for that in `train.step`, which also is why DeepSpeed's division by accumulation steps is not used.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import get_z3_leaf_modules, groups, set_z3_leaf_module
from torch import nn
from torch.distributed import distributed_c10d

from ultralong_ray.config import TrainConfig

# Parameters of at most this many elements are never partitioned under ZeRO-3.
PERSISTENT_ELEMENTS = 100_000


def init_distributed(device: torch.device) -> None:
    """Let DeepSpeed join the torch process group that exists already."""
    if device.type == "cpu":
        # On CPU it would JIT-compile a shared-memory all-reduce: half a minute, a C++ compiler and ninja needed, for
        # an op that changes no result. (`import deepspeed.comm.torch` binds torch itself, hence the look-up.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed's own calls, once per step and rank in every log with torch 2.13.
    warnings.filterwarnings("ignore", r".torch\.distributed\..* is deprecated", FutureWarning)
    deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", dist_init_required=False, verbose=False)


def deepspeed_config(
    train: TrainConfig, world_size: int, accumulation: int, offload_optimizer: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration of this training section. `initialize` adds what depends on the model's size."""
    half = train.precision == "bfloat16"
    # Stage 0 in bfloat16 is served by stage 1, which also keeps parameters whole on every rank. DeepSpeed takes a
    # legacy fp16 optimizer for it, with which a clipped run left the float32 one (loss 3.70 against 3.57 after four
    # steps of a tiny model; stage 1 had 3.58).
    stage = max(1, train.zero_stage) if half else train.zero_stage
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": train.micro_batch_sequences * accumulation * world_size,
        "gradient_clipping": train.gradient_clip or 0.0,
        "bf16": {"enabled": half},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own AdamW would be compiled on first use.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if offload_optimizer:
        # float32 weights and optimizer state in host memory; the update runs there, with torch's AdamW
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if half and stage >= 2:
        # At stage 1 this would select BF16_Optimizer, whose checkpoints zero_to_fp32 cannot join.
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def partitioned(config: dict[str, Any], device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Modules built inside keep 1/world of each parameter on every rank under ZeRO-3, and are ordinary otherwise."""
    if config["zero_optimization"]["stage"] < 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(config_dict_or_path=config, remote_device=None if device.type == "cuda" else "cpu")


def gather_whole(module: nn.Module) -> None:
    """Under ZeRO-3, gather all parameters below `module` at once when it is called, and reduce their gradients at once.

    Without it every linear layer is gathered by itself. It is also what lets code inside the module use a weight
    without calling the module that owns it. At other ZeRO stages it changes nothing.
    """
    set_z3_leaf_module(module, True)


def fitted_to_model(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`config` with ZeRO-3's sizes, in elements, set for `model`: one layer in use, one on its way, one being reduced.

    DeepSpeed's fixed defaults (0.05, 1 and 0.5 billion) prefetch a quarter of an 8B model's layer and too little of a
    larger one's.
    """
    wholes = get_z3_leaf_modules(model)
    if config["zero_optimization"]["stage"] < 3 or not wholes:
        return config
    layer = max(sum(_size(parameter) for parameter in whole.parameters()) for whole in wholes)
    gathered = max(_gathered(whole) for whole in wholes)
    sizes = {
        # Norms and biases stay on every rank: too small to be worth a message.
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        # Exactly the next layer: prefetching stops at the first parameter that fills it, so one element more would
        # begin to gather the layer after it, in a message of its own.
        "stage3_prefetch_bucket_size": gathered,
        # Every module without parameters prefetches another bucket: this stops it at one layer ahead. Beside the head,
        # which alone is larger, nothing is prefetched, so the last layer is gathered again when the loss is done.
        "stage3_max_live_parameters": 2 * gathered,
        # Only what the very next module uses stays gathered (the head, for its backward): the last layers would
        # otherwise stay through the loss, where memory peaks.
        "stage3_max_reuse_distance": 1,
        # One reduce-scatter per layer, run beside the next layer's backward. Larger tensors (embedding, head) are
        # reduced alone and uncopied.
        "reduce_bucket_size": layer,
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    return {**config, "zero_optimization": {**config["zero_optimization"], **sizes}}


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 shows partitioned parameters as empty


def _gathered(module: nn.Module) -> int:
    return sum(size for size in map(_size, module.parameters()) if size > PERSISTENT_ELEMENTS)


@contextlib.contextmanager
def writable(parameter: nn.Parameter) -> Iterator[bool]:
    """The whole parameter for the block; what rank 0 writes there is what all ranks have. Yields: am I to write?

    Below ZeRO-3 the other ranks receive rank 0's parameters when the engine is made.
    """
    writes = dist.get_rank() == 0
    if not hasattr(parameter, "ds_id"):
        yield writes
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
        yield writes


def make_optimizer(model: nn.Module, train: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices, vectors = [], []
    for parameter in model.parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 shows partitioned parameters as flat
        (matrices if len(shape) > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (train.adam_beta1, train.adam_beta2)
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, fused=device.type == "cuda")


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], timeout: timedelta | None = None
) -> deepspeed.DeepSpeedEngine:
    """The engine around `model` and `optimizer`, with DeepSpeed's `config`. Collective over all ranks.

    `timeout` of a collective; None: torch's own. DeepSpeed reduces gradients in a copy of the world's group, for which
    it asks no timeout.
    """
    fitted = fitted_to_model(config, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=fitted, dist_init_required=False)
    if timeout is not None:
        whole: Any = groups._get_data_parallel_group()
        distributed_c10d._set_pg_timeout(timeout, whole)  # the only way in torch 2.11-2.13
    return engine


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    optimizer: Any = engine.optimizer
    for group in optimizer.param_groups:
        group["lr"] = rate


def take_step(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    """Clip, update, clear gradients after the last backward of a step. Returns the norm before clipping, float32 [].

    DeepSpeed keeps that norm for every optimizer of its own; at stage 0 in float32 there is none, so it is computed
    from the averaged gradients, which are whole on every rank.
    """
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.parameters() if p.grad is not None])
        engine.step()
    else:
        engine.step()
        norm = engine.get_global_grad_norm()
    return torch.as_tensor(norm, dtype=torch.float32, device=engine.device)
