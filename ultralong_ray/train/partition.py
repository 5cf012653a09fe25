"""Which part of every parameter's float32 state this rank keeps, and how to read and write it.

In goes DeepSpeed's engine; out come `Part`s: a name, a range of the flattened parameter, and its master weight and
Adam moments. A part says nothing of the ZeRO stage or the number of ranks, so what one layout wrote another can read.

Read against DeepSpeed 0.19.8. ZeRO-3 cuts each parameter into equal parts, padded at the end, and has functions to set
the local part. ZeRO-1 and 2 cut a flat group of parameters; `_hp_mapping` says which range of a parameter lies in this
rank's cut (DeepSpeed's universal checkpoint reads it too). At stage 0 there is torch's own AdamW, whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.utils import (
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

MASTER = "master"
KINDS = (MASTER, "exp_avg", "exp_avg_sq")  # the last two are the keys of torch's AdamW


@dataclass(frozen=True, slots=True)
class Part:
    """Elements [start, start + numel) of the flattened parameter `name`, of which this rank keeps the state."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    numel: int
    replicated: bool  # every rank has the same part
    get: Callable[[str], torch.Tensor]  # kind -> float32 [numel]
    put: Callable[[str, torch.Tensor], None]  # kind, float32 [numel]


def share_of(part: Part, rank: int, world_size: int) -> Part:
    """What this rank writes of a part: all of it, or of what every rank has an equal share."""
    if not part.replicated:
        return part
    begin, end = part.numel * rank // world_size, part.numel * (rank + 1) // world_size
    return replace(part, start=begin, numel=end - begin, get=lambda kind: part.get(kind)[begin:end])


def parts_of(engine: Any) -> list[Part]:
    """This rank's part of every parameter; ranks that keep nothing of a parameter leave it out.

    The Adam moments can be read or written when a step was taken or `make_moments` was called.
    """
    make = _stage3_part if _is_stage3(engine) else _stage12_part if _is_sharded(engine) else _stage0_part
    made = [make(engine, name, parameter) for name, parameter in engine.module.named_parameters()]
    return [part for part in made if part is not None]


def make_moments(engine: Any, steps: int) -> None:
    """Give every tensor that AdamW updates its state, as after `steps` updates; the moments are to be written."""
    optimizer = _adam(engine)
    fused = optimizer.defaults["fused"]
    for flat in _updated_tensors(engine):
        state = optimizer.state[flat]
        # torch keeps the count on the host unless the update is one fused kernel
        state["step"] = torch.tensor(float(steps), device=flat.device if fused else "cpu")
        for kind in KINDS[1:]:
            if kind not in state:
                state[kind] = torch.zeros_like(flat)


def adopt_masters(engine: Any) -> None:
    """Make the parameters that the model computes with follow the master weights. Collective."""
    optimizer = engine.optimizer
    if _is_stage3(engine):
        optimizer.checkpoint_event_prologue()  # no parameter stays gathered with its old value
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif _is_sharded(engine):
        optimizer.update_lp_params()


def _is_sharded(engine: Any) -> bool:
    return not isinstance(engine.optimizer, torch.optim.Optimizer)


def _is_stage3(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if _is_sharded(engine) else engine.optimizer


def _updated_tensors(engine: Any) -> list[torch.Tensor]:
    if _is_stage3(engine):
        return engine.optimizer.fp32_partitioned_groups_flat
    if _is_sharded(engine):
        return engine.optimizer.single_partition_of_fp32_groups
    return [parameter for group in engine.optimizer.param_groups for parameter in group["params"]]


def _stage3_part(engine: Any, name: str, parameter: Any) -> Part | None:
    padded = parameter.partition_numel()
    start = padded * engine.optimizer._get_param_partition_rank(parameter)
    numel = min(padded, parameter.ds_numel - start)
    if numel <= 0:
        return None

    def get(kind: str) -> torch.Tensor:
        # DeepSpeed's public getters are this and a copy to the GPU, which an offloaded state need not make
        key = None if kind == MASTER else kind
        value, _ = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)
        return value.detach()[:numel]

    def put(kind: str, value: torch.Tensor) -> None:
        whole = torch.nn.functional.pad(value, (0, padded - numel))  # [padded]
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, whole)
        else:
            safe_set_local_optimizer_state(parameter, whole, kind)

    return Part(name, tuple(parameter.ds_shape), start, numel, False, get, put)


def _stage12_part(engine: Any, name: str, parameter: Any) -> Part | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None

    # The fragments of the moments that DeepSpeed links are missing for all groups but the first, so they are cut here.
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    place = mapping.hp_fragment_address

    def get(kind: str) -> torch.Tensor:
        state = flat if kind == MASTER else _adam(engine).state[flat][kind]
        return state.detach().narrow(0, place.start, place.numel)

    def put(kind: str, value: torch.Tensor) -> None:
        get(kind).copy_(value)

    address = mapping.lp_fragment_address
    return Part(name, tuple(parameter.shape), address.start, address.numel, False, get, put)


def _stage0_part(engine: Any, name: str, parameter: Any) -> Part:
    def get(kind: str) -> torch.Tensor:
        value = parameter if kind == MASTER else engine.optimizer.state[parameter][kind]
        return value.detach().view(-1)

    def put(kind: str, value: torch.Tensor) -> None:
        get(kind).copy_(value)

    return Part(name, tuple(parameter.shape), 0, parameter.numel(), True, get, put)
