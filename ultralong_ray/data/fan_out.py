"""Work items in, results out: one Ray Data task of one CPU per item. The only Ray file of `data`.

Read against Ray 2.60: tasks return what the user did wrong as a value, so that no wrapping by Ray Data lies around it.
A task whose worker is killed is run again by Ray; what it had written is whole or absent.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ultralong_ray.object_store import explained, is_refusal, retried
from ultralong_ray.types import UserError
from ultralong_ray.watch.metrics import show

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
TASK_ATTEMPTS = 3  # while the store does not answer; each request has been tried storage.max_attempts times by then

Item = TypeVar("Item")


def start_ray() -> None:
    """A local Ray with all cores, for a driver that is no job."""
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)


def run_tasks(
    items: Sequence[Item],
    work: Callable[[Item], dict[str, Any]],
    num_workers: int | None,
    verb: str,
    unit: str,
    node_label: dict[str, str],
) -> list[dict[str, Any]]:
    """`work` on every item as Ray Data tasks of one CPU each; results in the order in which they end.

    `node_label`: Ray labels that a task's node must carry; empty: any node.

    Raises UserError as soon as a task reports one; the tasks still running are then dropped.
    """
    import ray.data

    if not items:
        return []

    def task(row: dict[str, Any]) -> dict[str, Any]:
        try:
            item = pickle.loads(row["item"])
            return {"result": pickle.dumps(retried(lambda: work(item), TASK_ATTEMPTS)), "error": ""}
        except UserError as error:
            return {"result": b"", "error": str(error)}
        except OSError as error:
            if not is_refusal(error):
                raise
            return {"result": b"", "error": str(explained(error, "the object store"))}

    workers = None if num_workers is None else min(num_workers, len(items))
    # The executor's own account of each dataset goes to its log files; here our progress lines stand for it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, sys.stderr.isatty()
    # Of the whole dataset, not of its map alone: Ray Data then asks an autoscaler for such nodes and counts only them.
    options = context.execution_options
    where, options.label_selector = options.label_selector, node_label or None
    try:
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        pool = ray.data.TaskPoolStrategy(size=workers)
        dataset = dataset.map(task, num_cpus=1, compute=pool)
        return list(_collect(dataset.iter_rows(), len(items), verb, unit))
    finally:
        context.enable_progress_bars, options.label_selector = shown, where


def _collect(rows: Any, total: int, verb: str, unit: str) -> Iterator[dict[str, Any]]:
    """Results as they come, with a log line now and then: share done, rate, time left."""
    started = reported = time.monotonic()
    counts: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    _show(verb, counts, total, 0.0)
    for row in rows:
        if row["error"]:
            raise UserError(row["error"])
        result = pickle.loads(row["result"])
        counts.update(done=1, tokens=result["tokens"], rows=result.get("rows", result.get("sequences", 0)))
        spent.update(result["seconds"])
        now = time.monotonic()
        _show(verb, counts, total, now - started)
        if now - reported >= PROGRESS_SECONDS or counts["done"] == total:
            reported, seconds = now, max(now - started, 1e-9)
            left = seconds / counts["done"] * (total - counts["done"])
            rate = counts["tokens"] / seconds
            line = "%s %d of %d %s, %.1fM tokens, %.2fM tokens/s, %.0f s left"
            log.info(line, verb, counts["done"], total, unit, counts["tokens"] / 1e6, rate / 1e6, left)
        yield result
    wall = time.monotonic() - started
    shares = ", ".join(f"{phase} {part / max(spent.total(), 1e-9):.1%}" for phase, part in sorted(spent.items()))
    line, extra = (
        "%s in %.1f s; of the tasks' time: %s",
        {"verb": verb, "wall_seconds": wall, "task_seconds": dict(spent)},
    )
    log.info(line, verb, wall, shares or "nothing to do", extra=extra)


def _show(verb: str, counts: Counter[str], total: int, seconds: float) -> None:
    """The pass so far as metrics; `seconds` since it began."""
    show("ultralong_data_items", counts["done"], work=verb)
    show("ultralong_data_planned_items", total, work=verb)
    show("ultralong_data_rows", counts["rows"], work=verb)
    show("ultralong_data_tokens", counts["tokens"], work=verb)
    if counts["done"]:
        show("ultralong_data_tokens_per_second", counts["tokens"] / max(seconds, 1e-9), work=verb)
        show("ultralong_data_time_left_seconds", seconds / counts["done"] * (total - counts["done"]), work=verb)
