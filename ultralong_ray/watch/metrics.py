"""Every number that a run gives to Prometheus, and the one place that hands it to Ray. Read against Ray 2.60.

Flows in: a metric by name with its value and labels. Flows out: the sample `ray_<name>` at the metrics port of the node
(a counter's is `ray_<name>_total`), with Ray's own labels beside ours. Ray sends values every
RAY_metrics_report_interval_ms (10 s) and forgets a gauge that was not set for two intervals, so a thread sets each anew
as long as the process lives; counters stay as long as the node's agent. NaN never arrives. Without a cluster a call
does nothing. cluster/METRICS.md is this table as a page.
"""

from __future__ import annotations

import atexit
import functools
import threading
from dataclasses import dataclass
from typing import Literal

from ray.util.metrics import Counter, Gauge


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its unit; `labels` must all be given with every value."""

    name: str
    unit: str
    meaning: str
    labels: tuple[str, ...] = ()
    kind: Literal["gauge", "counter"] = "gauge"

    @property
    def exported(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")


STAGE = ("stage",)
METRICS = (
    Metric("ultralong_train_step", "steps", "Optimizer steps taken", STAGE),
    Metric("ultralong_train_planned_steps", "steps", "Optimizer steps of the whole stage", STAGE),
    Metric("ultralong_train_sequences", "sequences", "Packed sequences trained on", STAGE),
    Metric("ultralong_train_planned_sequences", "sequences", "Packed sequences of the whole stage", STAGE),
    Metric("ultralong_train_tokens", "tokens", "Tokens consumed over all ranks", STAGE),
    Metric("ultralong_train_tokens_per_second", "tokens/s", "Tokens per second over all ranks, last step", STAGE),
    Metric("ultralong_train_step_seconds", "s", "Wall-clock time of the last step, its wait for data included", STAGE),
    Metric(
        "ultralong_train_step_part_seconds",
        "s",
        "Where a step's time goes (part), measured in this run or predicted by the planner (source)",
        ("stage", "part", "source"),
    ),
    Metric("ultralong_train_time_left_seconds", "s", "Steps left times the median of recent steps", STAGE),
    Metric("ultralong_train_loss_nats", "nats/token", "Weighted mean loss over the global batch", STAGE),
    Metric("ultralong_train_grad_norm", "1", "Norm of the whole gradient before clipping", STAGE),
    Metric("ultralong_train_learning_rate", "1", "Learning rate of the step", STAGE),
    Metric(
        "ultralong_train_model_tflops_per_second",
        "TFLOP/s",
        "Causal model FLOPs per second and worker, last step",
        STAGE,
    ),
    Metric(
        "ultralong_train_mfu_ratio",
        "1",
        "Causal model FLOPs over the peak, 0 to 1: nominal, or that of matrix products timed here where it is unknown",
        ("stage", "peak"),
    ),
    Metric(
        "ultralong_train_memory_gib", "GiB", "Peak memory of a rank (place: device or host)", ("stage", "rank", "place")
    ),
    Metric(
        "ultralong_train_planned_memory_gib",
        "GiB",
        "What the plan gives a rank (place: device or host)",
        ("stage", "place"),
    ),
    Metric("ultralong_train_restarts", "attempts", "Attempts of the stage that followed one which did not end", STAGE),
    Metric(
        "ultralong_train_step_timestamp_seconds", "s since 1970", "When the last step ended, or training began", STAGE
    ),
    Metric("ultralong_train_checkpoint_timestamp_seconds", "s since 1970", "When the last checkpoint was whole", STAGE),
    Metric("ultralong_train_checkpoint_step", "steps", "Step of the last whole checkpoint", STAGE),
    Metric(
        "ultralong_train_failures",
        "failures",
        "Training given up, by the kind of error: NotFinite is a NaN or infinite loss or gradient",
        ("stage", "kind"),
        "counter",
    ),
    Metric("ultralong_data_items", "items", "Parts tokenised or files packed (work), of the pass under way", ("work",)),
    Metric("ultralong_data_planned_items", "items", "Parts or files of the pass under way", ("work",)),
    Metric("ultralong_data_rows", "rows", "Rows prepared: documents read, sequences packed", ("work",)),
    Metric("ultralong_data_tokens", "tokens", "Tokens prepared", ("work",)),
    Metric("ultralong_data_tokens_per_second", "tokens/s", "Mean rate of the pass", ("work",)),
    Metric("ultralong_data_time_left_seconds", "s", "Of the pass, at its mean rate", ("work",)),
    Metric("ultralong_eval_cells", "cells", "Cells evaluated, those of earlier runs included"),
    Metric("ultralong_eval_planned_cells", "cells", "Cells of the whole evaluation"),
    Metric("ultralong_eval_failed_cells", "cells", "Cells that failed"),
    Metric("ultralong_eval_workers", "workers", "Evaluation workers that compute"),
    Metric("ultralong_eval_time_left_seconds", "s", "At the pace so far, judged by lengths and answers"),
)
BY_NAME = {metric.name: metric for metric in METRICS}
REFRESH_SECONDS = 1.0

_shown: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}  # (name, labels) -> last value
_lock = threading.Lock()
_ended = threading.Event()


def show(name: str, value: float | None, **labels: str) -> None:
    """Set a gauge; None is nothing to show. Raises KeyError for a name that is not in METRICS."""
    if value is None:
        return
    _gauge(name).set(float(value), tags=labels)
    with _lock:
        if not _shown:
            thread = threading.Thread(target=_refresh, name="metrics", daemon=True)
            thread.start()
            atexit.register(_stop, thread)  # before Ray's own end, which came first
        _shown[name, tuple(sorted(labels.items()))] = float(value)


def count(name: str, **labels: str) -> None:
    """Add one to a counter."""
    _counter(name).inc(1, tags=labels)


def _refresh() -> None:
    """Set every gauge again, now and then: Ray forgets what is not."""
    while not _ended.wait(REFRESH_SECONDS):
        with _lock:
            shown = list(_shown.items())
        for (name, labels), value in shown:
            _gauge(name).set(value, tags=dict(labels))


def _stop(thread: threading.Thread) -> None:
    _ended.set()
    thread.join(timeout=5)


@functools.cache
def _gauge(name: str) -> Gauge:
    metric = BY_NAME[name]
    return Gauge(name, f"{metric.meaning} [{metric.unit}]", tag_keys=metric.labels)


@functools.cache
def _counter(name: str) -> Counter:
    metric = BY_NAME[name]
    return Counter(name, f"{metric.meaning} [{metric.unit}]", tag_keys=metric.labels)


def table() -> str:
    """METRICS as a Markdown table."""
    rows = [(f"`{m.exported}`", m.unit, ", ".join(m.labels) or "-", m.meaning) for m in METRICS]
    head = ["| Metric | Unit | Labels | Meaning |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
