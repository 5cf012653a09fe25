"""One optimizer step: slices in, parameters changed, numbers of the step out.

The gradient that all ranks and micro-batches give together is that of the token-weighted mean over the global batch,
sum(w * ce) / sum(w). A rank knows only its own sum, and DeepSpeed averages gradients over the world, so each backward
starts from  world_size * local_sum / global_weight,  where global_weight is summed over all micro-batches and ranks
before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.parallel.context import AttentionContext
from ultralong_ray.parallel.documents import DocumentLayout, document_layout
from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.parallel.mesh import SequenceMesh
from ultralong_ray.train.engine import take_step
from ultralong_ray.types import SequenceSlice


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A SequenceSlice on the device, and the layout that attention needs where documents are masked."""

    input_ids: torch.Tensor  # [batch, seq_local]
    position_ids: torch.Tensor  # [batch, seq_local]
    labels: torch.Tensor  # [batch, seq_local]
    loss_weight: torch.Tensor  # [batch, seq_local]
    documents: DocumentLayout | None
    weight: float  # sum of loss_weight


@dataclass(frozen=True, slots=True)
class StepResult:
    """On the device until someone asks: reading it is the one synchronisation of a step."""

    rank_sums: torch.Tensor  # float64 [world_size, 5]: loss sum, weight sum, peak memory in GiB, notices of every rank
    grad_norm: torch.Tensor  # float32 [], of the whole gradient before clipping


def to_device(part: SequenceSlice, device: torch.device) -> MicroBatch:
    def move(array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return MicroBatch(
        input_ids=move(part.input_ids),
        position_ids=move(part.position_ids),
        labels=move(part.labels),
        loss_weight=move(part.loss_weight),
        documents=None if part.document_ids is None else document_layout(part.document_ids, device),
        weight=float(part.loss_weight.sum(dtype="float64")),
    )


def no_notices() -> tuple[float, float]:
    return 0.0, 0.0


def train_step(
    engine: Any,
    micro_batches: Sequence[MicroBatch],
    mesh: SequenceMesh,
    kernel: Kernel,
    memory_gib: float,
    notices: Callable[[], tuple[float, float]] = no_notices,
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then the update. Collective over all ranks.

    `memory_gib` is this rank's peak so far, carried along with the sums, as is what `notices` says when the step is
    done: two numbers that every rank is to know of every other. A step without any target leaves a zero
    gradient and a loss of 0 / 0, which the caller refuses.
    """
    device, world_size = engine.device, dist.get_world_size()
    local_weight = sum(micro_batch.weight for micro_batch in micro_batches)
    global_weight = torch.tensor(local_weight, dtype=torch.float64, device=device)
    dist.all_reduce(global_weight)
    scale = (world_size / global_weight.clamp_min(torch.finfo(torch.float32).tiny)).float()
    local_sum = torch.zeros((), dtype=torch.float64, device=device)
    for index, micro_batch in enumerate(micro_batches):
        loss_sum = engine(
            input_ids=micro_batch.input_ids,
            position_ids=micro_batch.position_ids,
            labels=micro_batch.labels,
            loss_weight=micro_batch.loss_weight,
            attention_context=AttentionContext(mesh, kernel, micro_batch.documents),
        )
        local_sum += loss_sum.detach()
        engine.backward(loss_sum * scale, scale_wrt_gas=False)
        if index < len(micro_batches) - 1:
            engine.step()  # counts the micro-batch; the optimizer runs at the last one only
    grad_norm = take_step(engine)
    # An all-reduce of one row each: torch renamed the all-gather of tensors between 2.11 and 2.13.
    rank_sums = torch.zeros(world_size, 5, dtype=torch.float64, device=device)
    rank_sums[dist.get_rank(), 0] = local_sum
    rank_sums[dist.get_rank(), 1:] = torch.tensor([local_weight, memory_gib, *notices()], dtype=torch.float64)
    dist.all_reduce(rank_sums)
    return StepResult(rank_sums, grad_norm)
