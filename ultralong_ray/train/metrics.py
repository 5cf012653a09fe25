"""Where the numbers of a step go: metrics.jsonl, TensorBoard, Ray's dashboard, the log. Rank 0 only.

Flows in: StepMetrics. Flows out, below the stage's directory: `metrics.jsonl`, one line per step and in order even
after a resume, and `tensorboard/`. An object store cannot append, so there both are rewritten at each checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import TextIO

from ray.util.metrics import Gauge
from tensorboardX import SummaryWriter

from ultralong_ray.storage import Location, copy_files, explain_full_disk
from ultralong_ray.train.events import read_events
from ultralong_ray.types import StepMetrics

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LOG_LINES = 1.0
# StepMetrics field -> (suffix of the gauge `ultralong_train_*`, what it means)
GAUGES = {
    "loss": ("loss_nats", "Weighted mean loss over the global batch, nats per token"),
    "grad_norm": ("grad_norm", "Norm of the whole gradient before clipping"),
    "learning_rate": ("learning_rate", "Learning rate of the step"),
    "step": ("step", "Optimizer steps taken"),
    "tokens": ("tokens", "Tokens consumed over all ranks"),
    "tokens_per_second": ("tokens_per_second", "Tokens per second over all ranks"),
    "step_seconds": ("step_seconds", "Wall-clock seconds of the step"),
    "mfu": ("mfu_ratio", "Causal model FLOP utilisation, 0 to 1"),
    "memory_gib": ("memory_gib", "Peak memory of the fullest rank, GiB"),
    "checkpoint_seconds": ("checkpoint_seconds", "Seconds that the loop stood still for a checkpoint"),
}


def read_metrics(stage: Location) -> list[StepMetrics]:
    """The steps recorded below a stage's directory; a half-written last line is left out."""
    file = stage / METRICS_FILE
    if not file.exists():
        return []
    lines = file.read_bytes().decode().splitlines(keepends=True)
    return [StepMetrics(**json.loads(line)) for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Records steps. Lines after `resumed_step` are of a run that was lost with them, and are dropped."""

    def __init__(self, stage: Location, resumed_step: int, name: str) -> None:
        self.stage = stage
        self.name = name
        self.records = [record for record in read_metrics(stage) if record.step <= resumed_step]
        self._tensorboard_folder = stage.path + "/tensorboard" if stage.is_local else tempfile.mkdtemp()
        self._tensorboard = SummaryWriter(self._tensorboard_folder, purge_step=resumed_step + 1)
        self._gauges = {
            field: Gauge(f"ultralong_train_{suffix}", description, tag_keys=("stage",))
            for field, (suffix, description) in GAUGES.items()
        }
        breakdowns = sum(event["event"] == "breakdown" for event in read_events(stage))
        restarts = Gauge("ultralong_train_restarts", "Attempts that broke down so far", tag_keys=("stage",))
        restarts.set(breakdowns, tags={"stage": name})
        self._tensorboard.add_scalar(f"{name}/restarts", breakdowns, resumed_step)
        self._last_log_seconds = float("-inf")
        self._rewrite()
        self._sink = _appender(stage) if stage.is_local else None

    def write(self, metrics: StepMetrics) -> None:
        self.records.append(metrics)
        if self._sink is not None:
            with explain_full_disk(self.stage.uri):
                self._sink.write(_line(metrics))
                self._sink.flush()
        for field, gauge in self._gauges.items():
            value = getattr(metrics, field)
            if value is not None:
                gauge.set(float(value), tags={"stage": self.name})
                self._tensorboard.add_scalar(f"{self.name}/{field}", value, metrics.step)
        self._log(metrics)

    def flush(self) -> None:
        """Make what was written so far visible below the stage; called before each checkpoint is committed."""
        self._tensorboard.flush()
        if not self.stage.is_local:
            self._rewrite()
            copy_files(Location.of(self._tensorboard_folder), self.stage / "tensorboard")

    def close(self) -> None:
        self._tensorboard.close()
        self.flush()
        if self._sink is not None:
            self._sink.close()
        else:
            shutil.rmtree(self._tensorboard_folder, ignore_errors=True)

    def _rewrite(self) -> None:
        # a copy: a checkpoint's thread writes while the loop adds
        (self.stage / METRICS_FILE).write_bytes("".join(map(_line, list(self.records))).encode())

    def _log(self, metrics: StepMetrics) -> None:
        """A line per step, but at most one per second of steps faster than that; the first and last always."""
        now = time.monotonic()
        edge = len(self.records) == 1 or metrics.step == metrics.num_steps
        if now - self._last_log_seconds < SECONDS_BETWEEN_LOG_LINES and not edge:
            return
        self._last_log_seconds = now
        logger.info("%s %s", self.name, log_line(metrics, self.records[-20:]))


def _appender(stage: Location) -> TextIO:
    return Path((stage / METRICS_FILE).path).open("a")


def _line(metrics: StepMetrics) -> str:
    return json.dumps(dataclasses.asdict(metrics)) + "\n"


def log_line(metrics: StepMetrics, recent: list[StepMetrics]) -> str:
    """One step in words; the time left is that of the `recent` steps' median."""
    seconds = sorted(record.step_seconds for record in recent)[len(recent) // 2]
    left = int(seconds * (metrics.num_steps - metrics.step))
    utilisation = "" if metrics.mfu is None else f", MFU {metrics.mfu:.1%} (causal model FLOPs)"
    return (
        f"step {metrics.step}/{metrics.num_steps}: loss {metrics.loss:.4f}, grad norm {metrics.grad_norm:.3f}, "
        f"lr {metrics.learning_rate:.2e}, {metrics.tokens_per_second:,.0f} tokens/s{utilisation}, "
        f"{metrics.memory_gib:.1f} GiB, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
    )
