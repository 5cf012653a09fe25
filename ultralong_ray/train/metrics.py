"""Where the numbers of a step go: metrics.jsonl, TensorBoard, the log. Rank 0 only. (Prometheus: train/gauges.py.)

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

from ultralong_ray.storage import Location, copy_files, explain_full_disk
from ultralong_ray.train.events import read_events, read_lines
from ultralong_ray.types import StepMetrics

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LOG_LINES = 1.0
# Fields of StepMetrics that TensorBoard draws
DRAWN = (
    "loss",
    "grad_norm",
    "learning_rate",
    "step",
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "mfu",
    "memory_gib",
    "checkpoint_seconds",
)


def read_metrics(stage: Location) -> list[StepMetrics]:
    """The steps recorded below a stage's directory; lines cut short or damaged are left out."""
    return read_lines(stage / METRICS_FILE, lambda fields: StepMetrics(**fields))


class MetricsWriter:
    """Records steps. Lines after `resumed_step` are of a run that was lost with them, and are dropped."""

    def __init__(self, stage: Location, resumed_step: int, name: str) -> None:
        from tensorboardX import SummaryWriter  # imports torch, which readers of metrics do without

        self.stage = stage
        self.name = name
        self.records = [record for record in read_metrics(stage) if record.step <= resumed_step]
        self._tensorboard_folder = stage.path + "/tensorboard" if stage.is_local else tempfile.mkdtemp()
        self._tensorboard = SummaryWriter(self._tensorboard_folder, purge_step=resumed_step + 1)
        breakdowns = sum(event["event"] == "breakdown" for event in read_events(stage))
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
        for field in DRAWN:
            value = getattr(metrics, field)
            if value is not None:
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
