"""The training loop of one rank: build, restore, step, record, save. Knows torch.distributed, not Ray.

Flows in: a TrainJob and the process group that the launcher made. Flows out: metrics and TensorBoard below the stage's
directory, its checkpoints and its events (train/events.py); `report` hears of every checkpoint.
"""

from __future__ import annotations

import gc
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.flops import ModelShape, ledger, mfu
from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.planner.hardware import peak_flops
from ultralong_ray.train.batches import accumulation_steps, read_ahead
from ultralong_ray.train.checkpoint import CHECKPOINTS, forget_others, load_newest, root_to_resume, save_checkpoint
from ultralong_ray.train.checkpoint_files import Manifest
from ultralong_ray.train.engine import deepspeed_config, init_distributed, initialize, make_optimizer, set_learning_rate
from ultralong_ray.train.events import record_event
from ultralong_ray.train.gauges import TrainGauges
from ultralong_ray.train.job import TrainJob
from ultralong_ray.train.metrics import MetricsWriter
from ultralong_ray.train.order import cursor_after, sequences_of_step
from ultralong_ray.train.preflight import RunShape, check_first_loss, preflight
from ultralong_ray.train.schedule import learning_rate
from ultralong_ray.train.step import StepResult, train_step
from ultralong_ray.train.step_profile import StepProfiler, spanned
from ultralong_ray.train.weights import build_model
from ultralong_ray.types import StepMetrics, UserError

Report = Callable[[dict[str, Any]], None]

# Fields of config.json that a checkpoint's tensors, or what they mean, depend on.
SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "rope_theta",
    "rope_parameters",
)


class NotFinite(UserError):
    """A loss or gradient is NaN or infinite."""


class Trainer:
    """One rank's engine and data. Making it is collective over all ranks."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        init_distributed(device)
        self.job, self.train, self.device = job, job.train, device
        self.reader = PackedReader(job.packed)
        self.num_steps = job.num_steps(self.reader.manifest.num_sequences)
        self.shape: dict[str, Any] = (job.model / "config.json").read_json()
        plan = job.plan
        self.topology = Topology(dist.get_world_size(), dist.get_rank(), plan.ulysses_degree, plan.ring_degree)
        self.mesh = create_mesh(self.topology)
        dtype = self.dtype = torch.bfloat16 if self.train.precision == "bfloat16" else torch.float32
        head_dim = self.shape.get("head_dim") or self.shape["hidden_size"] // self.shape["num_attention_heads"]
        self.kernel = spanned(choose_kernel(self.train.attention, device, dtype, head_dim))
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.peak_flops = peak_flops(device_name, job.recipe.cluster.peak_tflops_per_worker)
        accumulation = accumulation_steps(self.train, self.topology)
        config = deepspeed_config(self.train, self.topology.world_size, accumulation, plan.offload_optimizer)
        model = build_model(job.model, job.random_seed, self.train, plan, config, device)
        self.engine = initialize(model, make_optimizer(model, self.train, device), config)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that loads it."""
        return {
            "stage_fingerprint": self.job.fingerprint,
            **{f"{self.job.section}.{key}": value for key, value in self.train.fingerprint_fields().items()},
            **{f"model.{key}": value for key, value in self.shape.items() if key in SHAPE_KEYS},
        }

    @property
    def layout(self) -> dict[str, Any]:
        """How the ranks divide the work; a checkpoint says it, and fits any other."""
        return {
            "world_size": self.topology.world_size,
            "ulysses_degree": self.job.plan.ulysses_degree,
            "ring_degree": self.job.plan.ring_degree,
            "zero_stage": self.train.zero_stage,
        }

    def restore(self) -> int:
        """Continue from the newest whole checkpoint; the steps that it holds. Collective."""
        accepted = self.job.resume_anyway
        root = root_to_resume(self.job.stage, self.identity, accepted)
        restored = load_newest(self.engine, root, self.identity, accepted)
        if self.topology.rank == 0 and restored is None:
            record_event(self.job.stage, "start", layout=self.layout)
        elif self.topology.rank == 0 and restored is not None:
            found = {"step": restored.step, "checkpoint": restored.name, "passed_over": restored.passed_over}
            record_event(self.job.stage, "resume", layout=self.layout, **found)
        return 0 if restored is None else restored.step

    def checkpoint(self, step: int) -> None:
        """Write and commit a checkpoint, forget those that need not be kept. Collective."""
        began = time.perf_counter()
        root, train = self.job.stage / CHECKPOINTS, self.train
        cursor = cursor_after(step, train.global_batch_sequences, self.reader.manifest.num_sequences)
        read = {"epoch": cursor.epoch, "sequence": cursor.sequence}
        name = save_checkpoint(self.engine, root, Manifest(step, self.identity, self.layout, read))
        if self.topology.rank == 0:
            seconds = round(time.perf_counter() - began, 3)
            record_event(self.job.stage, "checkpoint", step=step, checkpoint=name, seconds=seconds)
            every_nth = train.keep_every_nth
            every_steps = None if every_nth is None else every_nth * train.checkpoint_every_steps
            forget_others(root, name, train.keep_checkpoints, every_steps)

    def preflight(self) -> None:
        """The checks of train/preflight.py for this run. Collective; UserError on every rank when one fails."""
        length, batch = self.reader.manifest.sequence_length, self.train.micro_batch_sequences
        shape = RunShape.of(self.job.section, self.shape, length, batch, self.dtype)
        model: Any = self.engine.module
        rope = (model.causal_lm.model.rotary_emb.inv_freq, self.shape, self.job.recipe.model.rope)
        preflight(shape, self.job.plan, self.mesh, self.kernel, rope, self.device)

    def metrics(self, step: int, result: StepResult, started_seconds: float) -> StepMetrics:
        """The step as numbers; reading them waits for the device. Raises UserError when the loss is not finite.

        `started_seconds` is what time.perf_counter() said when the step before was done.
        """
        sums, grad_norm = result.rank_sums.tolist(), float(result.grad_norm)
        step_seconds = time.perf_counter() - started_seconds
        batch, manifest = self.train.global_batch_sequences, self.reader.manifest
        refuse_broken(step, sums, grad_norm, sequences_of_step(step, batch, manifest.num_sequences, self.train.seed))
        shape = ModelShape.from_config(self.shape)
        flops = ledger(shape, manifest.sequence_length, self.job.plan).times(batch)
        cursor = cursor_after(step, batch, manifest.num_sequences)
        tokens = batch * manifest.sequence_length
        return StepMetrics(
            step=step,
            num_steps=self.num_steps,
            loss=sum(row[0] for row in sums) / sum(row[1] for row in sums),
            grad_norm=grad_norm,
            learning_rate=learning_rate(self.train, step, self.num_steps),
            tokens=step * tokens,
            tokens_per_second=tokens / step_seconds,
            step_seconds=step_seconds,
            model_flops_causal=flops.model_flops_causal,
            hardware_flops=flops.hardware_flops,
            alst_flops=flops.alst_flops,
            mfu=mfu(flops.model_flops_causal, step_seconds, self.topology.world_size, self.peak_flops),
            memory_gib=max(row[2] for row in sums),
            epoch=cursor.epoch,
            sequence=cursor.sequence,
        )

    def close(self) -> None:
        """Free the engine while all ranks are alive: gloo otherwise aborts a process that leaves first."""
        del self.engine
        gc.collect()
        dist.barrier()


def refuse_broken(step: int, sums: list[list[float]], grad_norm: float, sequences: list[int]) -> None:
    """Raise UserError when a step had no targets, NotFinite for a loss or gradient that is. `sums`: StepResult's."""
    if sum(row[1] for row in sums) == 0:
        raise UserError(f"step {step}: no token of sequences {sequences} is a target (all loss weights are 0)")
    ranks = [rank for rank, row in enumerate(sums) if not math.isfinite(row[0])]
    if ranks or not math.isfinite(grad_norm):
        what = f"loss on ranks {ranks}" if ranks else f"gradient norm ({grad_norm})"
        raise NotFinite(
            f"step {step}: the {what} is not finite, sequences {sequences}. The last checkpoint is from before this "
            f"step; lower learning_rate, lengthen warmup_steps or set gradient_clip, then submit again"
        )


def run(job: TrainJob, device: torch.device, report: Report) -> int:
    """Train to the last step and return the step that training started from. Collective over all ranks.

    On GPUs the checks of train/preflight.py come first; with `job.preflight_only` nothing comes after them.
    `report({"step", "loss"})` is called on every rank when a checkpoint is committed.
    """
    trainer = Trainer(job, device)
    topology, train = trainer.topology, job.train
    if job.preflight_only or device.type == "cuda":
        trainer.preflight()
    if job.preflight_only:
        trainer.close()
        return 0
    restored = trainer.restore()
    writer = MetricsWriter(job.stage, restored, job.section) if topology.rank == 0 else None
    gauges = TrainGauges(job, topology, device, (restored, trainer.num_steps))
    profiler = StepProfiler(device, active=topology.rank == 0)
    started = time.perf_counter()
    batches = read_ahead(restored + 1, trainer.num_steps, trainer.reader, train, topology, device)
    for step, micro_batches in batches:
        waited_seconds = time.perf_counter() - started
        set_learning_rate(trainer.engine, learning_rate(train, step, trainer.num_steps))
        with profiler.step():
            result = train_step(trainer.engine, micro_batches, trainer.mesh, trainer.kernel, peak_memory_gib(device))
            metrics = trainer.metrics(step, result, started)
        gauges.step(metrics, waited_seconds, profiler.parts(metrics.step_seconds))
        if step == 1 and device.type == "cuda":
            check_first_loss(metrics.loss, trainer.shape["vocab_size"], pretrained=job.random_seed is None)
        started = time.perf_counter()
        if writer is not None:
            writer.write(metrics)
        if step % train.checkpoint_every_steps == 0 or step == trainer.num_steps:
            if writer is not None:
                writer.flush()
            began = time.perf_counter()
            trainer.checkpoint(step)
            gauges.checkpoint(step, time.perf_counter() - began)
            report({"step": step, "loss": metrics.loss})
            started = time.perf_counter()
    if writer is not None:
        writer.close()
        record_event(job.stage, "end", step=trainer.num_steps)
    trainer.close()
    return restored


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
