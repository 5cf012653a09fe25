"""The project's own training step as a contestant: its model, engine, kernels and `train_step`, not a copy of them.

Flows in: a Work. Flows out: timings; for some commands a summary of a GPU trace, or gradients.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.benchmark.gradients import gradients_of
from ultralong_ray.benchmark.launch import group_timeout
from ultralong_ray.benchmark.measure import StepNumbers, Work, measure, progress
from ultralong_ray.benchmark.setups import LEARNING_RATE
from ultralong_ray.benchmark.tokens import sequence, slice_of
from ultralong_ray.benchmark.trace import traced
from ultralong_ray.config import PretrainConfig
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.topology import Topology, local_segments
from ultralong_ray.storage import Location
from ultralong_ray.train.engine import deepspeed_config, init_distributed, initialize, make_optimizer
from ultralong_ray.train.step import MicroBatch, to_device, train_step
from ultralong_ray.train.weights import build_model


class Ours:
    """One rank of the project's trainer without Ray and files. Making it is collective over all ranks."""

    def __init__(self, work: Work, device: torch.device) -> None:
        init_distributed(device)
        benchmark, setup = work.benchmark, work.setup
        self.work, self.device = work, device
        self.config = benchmark.config(setup.layers)
        self.topology = Topology(dist.get_world_size(), dist.get_rank(), setup.ulysses, setup.ring)
        self.segments = local_segments(setup.length, self.topology)
        timeout = group_timeout(benchmark.limit_seconds)
        self.mesh = create_mesh(self.topology, timeout)
        train = PretrainConfig(
            global_batch_sequences=self.topology.dp_size,
            learning_rate=LEARNING_RATE,
            precision=benchmark.precision,
            seed=benchmark.seed,
            gradient_checkpointing=setup.keep != "none",
        )
        dtype = torch.bfloat16 if train.precision == "bfloat16" else torch.float32
        self.kernel = choose_kernel(setup.attention, device, dtype, self.config["head_dim"])
        folder = Path(work.folder) / f"model-{setup.layers}"
        if dist.get_rank() == 0:
            Location.of(folder / "config.json").write_json(self.config)
        dist.barrier()
        plan = setup.plan
        config = deepspeed_config(train, self.topology.world_size, 1, plan.offload_optimizer)
        model = build_model(Location.of(folder), benchmark.seed, train, plan, config, device)
        self.engine = initialize(model, make_optimizer(model, train, device), config, timeout)

    @property
    def causal_lm(self) -> Any:
        module: Any = self.engine.module
        return module.causal_lm

    def ids(self, index: int, length: int | None = None) -> Any:
        """int64 [length], default the setup's: the whole sequence of this rank's group in a step."""
        length, vocab = length or self.work.setup.length, self.config["vocab_size"]
        return sequence(length, vocab, self.work.benchmark.seed, index, self.topology.dp_rank)

    def batch(self, index: int) -> MicroBatch:
        """Of step `index`, warm-up steps first."""
        benchmark = self.work.benchmark
        if benchmark.warmup_length and index < benchmark.warmup:
            segments = local_segments(benchmark.warmup_length, self.topology)
            return to_device(slice_of(self.ids(index, benchmark.warmup_length), segments), self.device)
        return to_device(slice_of(self.ids(index), self.segments), self.device)

    def step(self, micro_batch: MicroBatch) -> StepNumbers:
        result = train_step(self.engine, [micro_batch], self.mesh, self.kernel, 0.0)
        sums = result.rank_sums.sum(0).tolist()
        return StepNumbers(sums[0] / sums[1], float(result.grad_norm))


def built(work: Work, device: torch.device) -> tuple[Ours, dict[str, Any]]:
    """The trainer, and the beginning of its rank's answer."""
    started = time.perf_counter()
    progress(work, "builds the model")
    ours = Ours(work, device)
    build_seconds = time.perf_counter() - started
    progress(work, f"model of {work.setup.layers} layers built, attention kernel {ours.kernel.name}")
    return ours, {"kernel": ours.kernel.name, "build_seconds": build_seconds}


def run(work: Work, device: torch.device) -> dict[str, Any]:
    """Every rank's part of the contestant."""
    ours, answer = built(work, device)
    benchmark = work.benchmark
    if benchmark.compare_gradients:
        answer["gradients"] = gradients_of(ours.engine, Path(work.folder), lambda: ours.step(ours.batch(0)))
    answer |= measure(work, device, ours.batch, ours.step)
    if benchmark.profile:
        progress(work, "one more step, traced")
        batch = ours.batch(benchmark.warmup + benchmark.steps)
        answer["trace"] = traced(lambda: ours.step(batch), device, Path(work.folder))
    return answer
