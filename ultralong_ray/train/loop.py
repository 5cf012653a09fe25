"""The training loop of one rank: build, restore, step, record, save. Knows torch.distributed, not Ray.

Flows in: a TrainJob and the process group that the launcher made. Flows out: metrics and TensorBoard below the stage's
directory, its checkpoints and its events (train/events.py); `report` hears of every checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import resource
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ultralong_ray.flops import ModelShape, ledger, mfu
from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.kernels.choose import choose_kernel
from ultralong_ray.parallel.mesh import create_mesh
from ultralong_ray.parallel.topology import Topology
from ultralong_ray.planner.hardware import peak_flops
from ultralong_ray.storage import Location
from ultralong_ray.train.bad_steps import SpikeWatch, refuse_broken, refuse_spike
from ultralong_ray.train.batches import accumulation_steps, read_ahead
from ultralong_ray.train.checkpoint import (
    CHECKPOINTS,
    Restored,
    folders,
    forget_others,
    load_newest,
    root_to_resume,
)
from ultralong_ray.train.checkpoint_files import Manifest
from ultralong_ray.train.checkpoint_write import CheckpointWriter, Saved
from ultralong_ray.train.engine import deepspeed_config, init_distributed, initialize, make_optimizer, set_learning_rate
from ultralong_ray.train.events import node_name, read_events, record_event
from ultralong_ray.train.failures import refuse_superseded, taken_over
from ultralong_ray.train.gauges import TrainGauges
from ultralong_ray.train.job import TrainJob
from ultralong_ray.train.metrics import MetricsWriter
from ultralong_ray.train.notices import FAILED, NONE, Interrupted, cause_of
from ultralong_ray.train.order import cursor_after, sequences_of_step
from ultralong_ray.train.patience import collective_timeout
from ultralong_ray.train.preflight import RunShape, check_first_loss, preflight
from ultralong_ray.train.schedule import learning_rate
from ultralong_ray.train.step import StepResult, train_step
from ultralong_ray.train.step_profile import StepProfiler, spanned
from ultralong_ray.train.watchdog import Watchdog, checkpoint_seconds
from ultralong_ray.train.weights import build_model
from ultralong_ray.types import StepMetrics, UserError

logger = logging.getLogger(__name__)

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
        timeout = collective_timeout(job.first_step_seconds)
        self.mesh = create_mesh(self.topology, timeout)
        dtype = self.dtype = torch.bfloat16 if self.train.precision == "bfloat16" else torch.float32
        head_dim = self.shape.get("head_dim") or self.shape["hidden_size"] // self.shape["num_attention_heads"]
        self.kernel = spanned(choose_kernel(self.train.attention, device, dtype, head_dim))
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        self.peak_flops = peak_flops(device_name, job.recipe.cluster.peak_tflops_per_worker)
        accumulation = accumulation_steps(self.train, self.topology)
        config = deepspeed_config(self.train, self.topology.world_size, accumulation, plan.offload_optimizer)
        model = build_model(job.model, job.random_seed, self.train, plan, config, device)
        self.engine = initialize(model, make_optimizer(model, self.train, device), config, timeout)
        self.flush: Callable[[], None] = lambda: None  # called before a checkpoint is committed

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

    def restore(self, seconds: dict[str, float]) -> int:
        """Continue from the newest whole checkpoint; the steps that it holds. Collective. `saver` is made here.

        seconds: what the start took before this, by its parts, for the event. Raises UserError where the checkpoint is
        of another stage and leaves nothing to train.
        """
        began = time.perf_counter()
        accepted = self.job.resume_anyway
        root = root_to_resume(self.job.stage, self.identity, accepted)
        restored = load_newest(self.engine, root, self.identity, accepted)
        if restored is not None and root != self.job.stage / CHECKPOINTS:
            self._refuse_ended(root, restored)
        everyone: list[Any] = [None] * self.topology.world_size
        refusal = taken_over(read_events(self.job.stage), self.job.driver) if self.topology.rank == 0 else None
        dist.all_gather_object(everyone, (node_name(), uuid.uuid4().hex[:8], refusal))
        nodes, (_, self.attempt, refusal) = [node for node, *_ in everyone], everyone[0]
        if refusal is not None:
            raise UserError(refusal)
        seconds = {**seconds, "restore": round(time.perf_counter() - began, 1)}
        about: dict[str, Any] = {
            "layout": self.layout,
            "nodes": nodes,
            "attempt": self.attempt,
            "driver": self.job.driver,
            "start_seconds": seconds,
        }
        self.seen = folders(self.job.stage / CHECKPOINTS) if self.topology.rank == 0 else frozenset()
        if self.topology.rank == 0 and restored is None:
            record_event(self.job.stage, "start", **about)
        elif self.topology.rank == 0 and restored is not None:
            found = {"step": restored.step, "checkpoint": restored.name, "passed_over": restored.passed_over}
            record_event(self.job.stage, "resume", **about, **found)
        local = self.train.local_checkpoint_folder
        self.saver = CheckpointWriter(
            self.engine,
            self.job.stage / CHECKPOINTS,
            self.job.plan.checkpoint_snapshot,
            None if local is None else Path(local).expanduser() / self.job.stage.name,
            self._committed,
            self._before_commit,
        )
        self.patience_seconds = checkpoint_seconds(self.saver.num_bytes)
        return 0 if restored is None else restored.step

    def _refuse_ended(self, root: Location, restored: Restored) -> None:
        """Raise UserError where a checkpoint of another stage is at or beyond our last step: no step would be ours."""
        if restored.step >= self.num_steps:
            field = f"{self.job.section}.steps"
            given = f"one epoch, as {field} is not given, is" if self.train.steps is None else f"{field} is"
            raise UserError(
                f"checkpoint {root / restored.name} is of step {restored.step}, {given} {self.num_steps}; set {field} "
                f"above {restored.step}, or submit without --resume-anyway to start again"
            )

    def checkpoint(self, step: int) -> float:
        """Take a snapshot; the seconds that it took. `saver.start()` then lets it be written. Collective."""
        cursor = cursor_after(step, self.train.global_batch_sequences, self.reader.manifest.num_sequences)
        read = {"epoch": cursor.epoch, "sequence": cursor.sequence}
        return self.saver.take(Manifest(step, self.identity, self.layout, read))

    def _before_commit(self) -> None:
        """Raise as refuse_superseded does; else metrics go first. Runs in rank 0's thread."""
        refuse_superseded(read_events(self.job.stage), self.attempt, self.job.driver)
        self.flush()

    def _committed(self, saved: Saved) -> None:
        """Record a checkpoint and forget those that need not be kept. Runs in rank 0's thread."""
        facts = {key: value for key, value in dataclasses.asdict(saved).items() if key not in ("step", "name")}
        facts["seconds"] = facts.pop("blocked_seconds")
        record_event(self.job.stage, "checkpoint", step=saved.step, checkpoint=saved.name, **facts)
        train, every_nth = self.train, self.train.keep_every_nth
        every_steps = None if every_nth is None else every_nth * train.checkpoint_every_steps
        root = self.job.stage / CHECKPOINTS
        try:
            # the manifest may have waited for its storage
            refuse_superseded(read_events(self.job.stage), self.attempt, self.job.driver)
            forget_others(root, saved.name, train.keep_checkpoints, every_steps, self.seen)
        except OSError as error:  # the next one tries again
            logger.warning("old checkpoints below %s could not be removed: %s", root, error)

    def heed(self, result: StepResult, watchdog: Watchdog) -> list[int]:
        """What the ranks were asked for by now. Raises, on every rank, what a checkpoint failed with. Collective."""
        rows = result.rank_sums[:, 3:].tolist()
        self.saver.known_step = max(self.saver.known_step, int(rows[0][1]))
        notices = [int(row[0]) for row in rows]
        if FAILED in notices:
            watchdog.allow("a checkpoint that failed", self.patience_seconds)  # other ranks may be at their part of it
            self.saver.wait()
        return notices

    def preflight(self) -> None:
        """The checks of train/preflight.py for this run. Collective; UserError on every rank when one fails."""
        length, batch = self.reader.manifest.sequence_length, self.train.micro_batch_sequences
        shape = RunShape.of(self.job.section, self.shape, length, batch, self.dtype)
        model: Any = self.engine.module
        rope = (model.causal_lm.model.rotary_emb.inv_freq, self.shape, self.job.recipe.model.rope)
        stated_gib = self.job.recipe.cluster.host_memory_gib_per_node
        preflight(shape, self.job.plan, self.mesh, self.kernel, rope, self.device, stated_gib)

    def metrics(self, step: int, result: StepResult, started_seconds: float) -> StepMetrics:
        """The step as numbers; reading them waits for the device. Raises UserError when the loss is not finite.

        `started_seconds` is what time.perf_counter() said when the step before was done.
        """
        sums, grad_norm = result.rank_sums.tolist(), float(result.grad_norm)
        step_seconds = time.perf_counter() - started_seconds
        batch, manifest = self.train.global_batch_sequences, self.reader.manifest
        refuse_broken(step, sums, grad_norm, self.sequences(step), self.job.stage / CHECKPOINTS, self.job.section)
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

    def sequences(self, step: int) -> list[int]:
        """The packed sequences of a step."""
        train = self.train
        return sequences_of_step(step, train.global_batch_sequences, self.reader.manifest.num_sequences, train.seed)

    def account_for_spike(self, step: int, cause: str | None) -> None:
        """Warn of a loss that stands out, or stop there, as the recipe says. Every rank knows the same loss."""
        if cause is not None:
            words = f"step {step}: {cause}, sequences {self.sequences(step)}"
            if self.train.on_loss_spike == "stop":
                refuse_spike(step, words, self.job.stage / CHECKPOINTS, self.job.section)
            if self.topology.rank == 0:
                logger.warning("%s", words)
                record_event(self.job.stage, "spike", step=step, sequences=self.sequences(step), cause=cause)

    def close(self) -> None:
        """Free the engine while all ranks are alive: gloo otherwise aborts a process that leaves first."""
        del self.engine
        gc.collect()
        dist.barrier()


def run(job: TrainJob, device: torch.device, report: Report, asked: Callable[[], int] = lambda: NONE) -> int:
    """Train to the last step and return the step that training started from. Collective over all ranks.

    On GPUs the checks of train/preflight.py come first; with `job.preflight_only` nothing comes after them.
    `report({"step", "loss"})` is called on every rank, in the same order, for every checkpoint once it is committed.
    `asked()` says at the end of every step whether to leave (train/notices.py): then the step is saved, and
    Interrupted raised.
    """
    times = [time.perf_counter()]
    trainer = Trainer(job, device)
    times.append(time.perf_counter())
    if job.preflight_only or device.type == "cuda":
        trainer.preflight()
    times.append(time.perf_counter())
    if job.preflight_only:
        trainer.close()
        return 0
    build, check = (round(after - before, 1) for before, after in itertools.pairwise(times))
    restored = trainer.restore({"build": build, "preflight": check})
    writer = MetricsWriter(job.stage, restored, job.section) if trainer.topology.rank == 0 else None
    if writer is not None:
        trainer.flush = writer.flush
    try:
        patience = job.train.hang_timeout_seconds, job.first_step_seconds
        with Watchdog(job.stage, trainer.attempt, restored + 1, *patience) as watchdog:
            notices = _train_on(trainer, restored, writer, report, asked, watchdog)
    except Exception:
        trainer.saver.finish()  # what was taken before the error is worth keeping
        raise
    except BaseException:
        trainer.saver.abandon()
        raise
    if writer is not None:
        writer.close()
    step, cause = trainer.saver.known_step, cause_of(notices) if any(notices) else ""
    if trainer.topology.rank == 0 and cause:
        record_event(job.stage, "interrupted", step=step, rank=None, node=None, cause=f"{cause}; step {step} is saved")
    elif trainer.topology.rank == 0:
        record_event(job.stage, "end", step=trainer.num_steps)
    trainer.close()
    if cause:
        raise Interrupted(max(notices), step, cause)
    return restored


def _train_on(
    trainer: Trainer,
    restored: int,
    writer: MetricsWriter | None,
    report: Report,
    asked: Callable[[], int],
    watchdog: Watchdog,
) -> list[int]:
    """The steps after `restored`. Returns the notices of all ranks, by which they stopped; zeros after the last step.

    What was saved is committed then.
    """
    job, train, topology, device = trainer.job, trainer.train, trainer.topology, trainer.device
    saver, losses, notices = trainer.saver, {}, [NONE]
    reported, spikes = saver.known_step, SpikeWatch(train.loss_spike_factor)
    gauges = TrainGauges(job, topology, device, (restored, trainer.num_steps))
    profiler = StepProfiler(device, active=topology.rank == 0)

    def tell() -> tuple[float, float]:
        return FAILED if saver.failed() else asked(), saver.committed_step()

    def report_new() -> int:
        if saver.known_step > reported:
            facts = {"step": saver.known_step, "num_steps": trainer.num_steps, "loss": losses.pop(saver.known_step)}
            report(facts)
            gauges.committed(saver.known_step)
        return saver.known_step

    started = time.perf_counter()
    batches = read_ahead(restored + 1, trainer.num_steps, trainer.reader, train, topology, device)
    for step, micro_batches in batches:
        waited_seconds = time.perf_counter() - started
        set_learning_rate(trainer.engine, learning_rate(train, step, trainer.num_steps))
        with profiler.step():
            kernel, memory = trainer.kernel, peak_memory_gib(device)
            result = train_step(trainer.engine, micro_batches, trainer.mesh, kernel, memory, tell)
            metrics = trainer.metrics(step, result, started)
        if step == 1 and device.type == "cuda":
            check_first_loss(metrics.loss, trainer.shape["vocab_size"], pretrained=job.random_seed is None)
        trainer.account_for_spike(step, spikes.spike(metrics.loss))
        last = step == trainer.num_steps
        notices = trainer.heed(result, watchdog) if not last else [NONE]
        reported = report_new()
        due = last or any(notices) or step % train.checkpoint_every_steps == 0
        if due:
            watchdog.allow(f"the checkpoint of step {step}", trainer.patience_seconds)
            losses[step] = metrics.loss
            metrics = dataclasses.replace(metrics, checkpoint_seconds=trainer.checkpoint(step))
            reported = report_new()
        started = time.perf_counter()
        gauges.step(metrics, waited_seconds, profiler.parts(metrics.step_seconds))
        if writer is not None:
            writer.write(metrics)
        if due:
            saver.start()  # after the step's line, which belongs to what is saved
        if any(notices):
            break
        if not last:
            watchdog.beat(step)
    watchdog.allow("the upload of the last checkpoint", trainer.patience_seconds)
    saver.wait()
    report_new()
    return notices


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
