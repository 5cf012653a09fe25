"""A training stage's numbers for Prometheus, from the rank that knows them: all from rank 0, memory from every rank.

Flows in: what the loop knows after a step or a checkpoint. Flows out: metrics of watch/metrics.py.
"""

from __future__ import annotations

import functools
import resource
import statistics
import time

import torch

from ultralong_ray.parallel.topology import Topology
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.job import TrainJob
from ultralong_ray.train.status import RECENT_STEPS, restarts_of
from ultralong_ray.types import StepMetrics
from ultralong_ray.watch.metrics import count, show
from ultralong_ray.watch.trace_events import predicted_parts

PLAN_FILE = "plan.json"


class TrainGauges:
    """One rank's view of its job. Made when training begins; `steps`: (done, planned)."""

    def __init__(self, job: TrainJob, topology: Topology, device: torch.device, steps: tuple[int, int]) -> None:
        self._name, self._rank, self._world_size = job.section, topology.rank, topology.world_size
        self._batch, self._device = job.train.global_batch_sequences, device
        self._dtype = torch.bfloat16 if job.train.precision == "bfloat16" else torch.float32
        self._seconds: list[float] = []
        self._checkpoint_step, planned_steps = steps
        if self._rank != 0:
            return
        stage = job.stage
        self._show("planned_steps", planned_steps)
        self._show("planned_sequences", planned_steps * self._batch)
        self._show("restarts", len(restarts_of(read_events(stage))))
        self._show("step_timestamp_seconds", time.time())
        self._show("checkpoint_timestamp_seconds", time.time())  # nothing older can be lost
        self._show_plan(stage)

    def step(self, metrics: StepMetrics, waited_seconds: float, parts: dict[str, float] | None) -> None:
        """After a step; `waited_seconds` of it for its data. `parts`: seconds by part where the step was watched."""
        self._memory()
        if self._rank != 0:
            return
        self._seconds = [*self._seconds[1 - RECENT_STEPS :], metrics.step_seconds]
        teraflops = metrics.model_flops_causal / metrics.step_seconds / self._world_size / 1e12
        numbers = {
            "step": metrics.step,
            "sequences": metrics.step * self._batch,
            "tokens": metrics.tokens,
            "tokens_per_second": metrics.tokens_per_second,
            "step_seconds": metrics.step_seconds,
            "time_left_seconds": (metrics.num_steps - metrics.step) * statistics.median(self._seconds),
            "loss_nats": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "model_tflops_per_second": teraflops,
            "step_timestamp_seconds": time.time(),
        }
        for name, value in numbers.items():
            self._show(name, value)
        peak = "measured" if metrics.mfu is None else "nominal"
        ratio = teraflops / self._measured_teraflops if metrics.mfu is None else metrics.mfu
        show("ultralong_train_mfu_ratio", ratio, stage=self._name, peak=peak)
        self._part("data wait", waited_seconds)
        if metrics.checkpoint_seconds:  # the loop stood still: a share for each step since the checkpoint before
            self._part("checkpoint", metrics.checkpoint_seconds / max(1, metrics.step - self._checkpoint_step))
            self._checkpoint_step = metrics.step
        for part, seconds in (parts or {}).items():
            self._part(part, max(0.0, seconds - waited_seconds) if part == "other" else seconds)

    @functools.cached_property
    def _measured_teraflops(self) -> float:
        return matrix_teraflops(self._device, self._dtype)

    def committed(self, step: int) -> None:
        """When the checkpoint of `step` is whole."""
        if self._rank == 0:
            self._show("checkpoint_step", step)
            self._show("checkpoint_timestamp_seconds", time.time())

    def _memory(self) -> None:
        rank = str(self._rank)
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
        show("ultralong_train_memory_gib", resident, stage=self._name, rank=rank, place="host")
        if torch.cuda.is_initialized():
            allocated = torch.cuda.max_memory_allocated() / 2**30
            show("ultralong_train_memory_gib", allocated, stage=self._name, rank=rank, place="device")

    def _show_plan(self, stage: Location) -> None:
        file = stage / PLAN_FILE
        prediction = file.read_json().get("prediction") if file.exists() else None
        if prediction is None:
            return
        for place, field in (("device", "device_allocated_gib"), ("host", "host_rank_gib")):
            show("ultralong_train_planned_memory_gib", prediction[field], stage=self._name, place=place)
        for part, seconds in predicted_parts(prediction["step_parts_seconds"]).items():
            self._part(part, seconds, "predicted")

    def _part(self, part: str, seconds: float, source: str = "measured") -> None:
        show("ultralong_train_step_part_seconds", seconds, stage=self._name, part=part, source=source)

    def _show(self, name: str, value: float) -> None:
        show(f"ultralong_train_{name}", value, stage=self._name)


def matrix_teraflops(device: torch.device, dtype: torch.dtype) -> float:
    """Of one worker in square matrix products: a stand-in for the peak of a device that no table names."""
    size, best = (8192 if device.type == "cuda" else 512), float("inf")
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    for _ in range(5):
        started = time.perf_counter()
        float((left @ right)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def count_failure(stage: Location, name: str) -> None:
    """Count the end of a training that failed, by the first account of why, on the driver: it outlives the workers."""
    failures = [event for event in read_events(stage) if event["event"] == "failure"]
    last = failures[-1]["time"] if failures else 0.0
    of_this_end = [event for event in failures if last - event["time"] < 60 and event["rank"] is not None]
    kind = (of_this_end or failures or [{"cause": "unknown"}])[0]["cause"].split(":")[0]
    count("ultralong_train_failures", stage=name, kind=kind)
