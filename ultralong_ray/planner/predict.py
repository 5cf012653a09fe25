"""A layout in, its cost out: peak memory, step time, throughput. No search here; planner.choose looks for layouts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ultralong_ray.flops import Ledger, ModelShape, ledger, mfu
from ultralong_ray.planner.costs import COSTS, Costs
from ultralong_ray.planner.hardware import TERA, Hardware
from ultralong_ray.planner.memory import MemoryPrediction, predict_memory
from ultralong_ray.planner.steptime import Seconds, predict_time
from ultralong_ray.planner.workload import Workload
from ultralong_ray.types import TrainPlan, UserError


@dataclass(frozen=True)
class Prediction:
    """What one optimizer step of a workload takes. A search asks most layouts only whether they fit."""

    work: Workload
    memory: MemoryPrediction

    @functools.cached_property
    def time(self) -> Seconds:
        """Parts of the step."""
        return predict_time(self.work)

    @functools.cached_property
    def flops(self) -> Ledger:
        """Of the whole step, over all ranks."""
        sequences = self.work.accumulation * self.work.data_parallel * self.work.micro_batch_sequences
        return ledger(self.work.shape, self.work.sequence_length, self.work.plan).times(sequences)

    @property
    def step_seconds(self) -> float:
        return sum(self.time.values())

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        sequences = self.work.accumulation * self.work.data_parallel * self.work.micro_batch_sequences
        return sequences * self.work.sequence_length / self.step_seconds

    @property
    def mfu(self) -> float:
        """Causal model FLOPs over the peak of all GPUs."""
        hardware = self.work.hardware
        share = mfu(
            self.flops.model_flops_causal, self.step_seconds, hardware.num_gpus, hardware.gpu.peak_tflops * TERA
        )
        assert share is not None
        return share

    @property
    def fits_device(self) -> bool:
        return self.memory.gib <= self.work.device_usable_gib

    @property
    def fits_host(self) -> bool:
        return self.memory.host_node_gib <= self.work.host_usable_gib

    @property
    def fits(self) -> bool:
        return self.fits_device and self.fits_host


def kernel_of(attention: str, hardware: Hardware) -> str | None:
    """The kernel whose rates count for a recipe's `attention`: the best one for "auto", None where none was timed."""
    if attention == "auto":
        return hardware.gpu.best_kernel
    return None if attention == "math" else attention


def predict(
    shape: ModelShape,
    sequence_length: int,
    plan: TrainPlan,
    hardware: Hardware,
    *,
    kernel: str = "auto",
    micro_batch_sequences: int = 1,
    global_batch_sequences: int | None = None,
    zero_stage: int = 3,
    element_bytes: int = 2,
    gradient_bytes: int = 4,
    first_step: bool = False,
    costs: Costs = COSTS,
) -> Prediction:
    """Cost of `plan` on `hardware`. Tokens per sequence; the batch is one pass per group where none is given.

    Raises UserError when the plan's degrees do not divide the GPUs, or its layers are not the model's.
    """
    if hardware.num_gpus % plan.degree:
        raise UserError(f"{hardware.num_gpus} GPUs cannot form groups of {plan.degree}")
    if plan.keep and len(plan.keep) != shape.layers:
        raise UserError(f"the plan keeps {len(plan.keep)} layers, the model has {shape.layers}")
    rated = kernel_of(kernel, hardware)
    if rated is None:
        raise UserError(f"no speed is known for attention kernel {kernel!r}")
    groups = hardware.num_gpus // plan.degree
    batch = global_batch_sequences or groups * micro_batch_sequences
    work = Workload(
        shape,
        sequence_length,
        plan,
        hardware,
        rated,
        micro_batch_sequences,
        batch,
        zero_stage,
        element_bytes,
        gradient_bytes,
        costs,
    )
    return predict_work(work, first_step)


def predict_work(work: Workload, first_step: bool = False) -> Prediction:
    return Prediction(work, predict_memory(work, first_step))
