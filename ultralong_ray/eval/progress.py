"""How far an evaluation is: finished cells in; log lines with the time left, and metrics, out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from ultralong_ray.eval.cells import Cell
from ultralong_ray.watch.metrics import show

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0  # between lines


@dataclass
class Progress:
    """Log lines with the time left, judged by tokens: a cell's time grows with its length."""

    total_tokens: int
    total_cells: int
    stored_cells: int = 0
    done_tokens: int = 0
    done_cells: int = 0
    started: float = field(default_factory=time.monotonic)
    last_line: float = 0.0

    def finished(self, cell: Cell) -> None:
        self.done_tokens += cell.tokens
        self.done_cells += 1
        now = time.monotonic()
        if now - self.last_line < PROGRESS_SECONDS and self.done_cells < self.total_cells:
            return
        self.last_line = now
        left = self.seconds_left(now)
        logger.info(
            "evaluate: %d of %d work items, about %d:%02d left (last: %s)",
            self.done_cells,
            self.total_cells,
            int(left) // 60,
            int(left) % 60,
            cell.name,
        )

    def seconds_left(self, now: float) -> float:
        return (now - self.started) * (self.total_tokens - self.done_tokens) / max(self.done_tokens, 1)

    def show(self, failed: int, workers: int) -> None:
        """The evaluation so far as metrics."""
        show("ultralong_eval_cells", self.stored_cells + self.done_cells - failed)
        show("ultralong_eval_planned_cells", self.stored_cells + self.total_cells)
        show("ultralong_eval_failed_cells", failed)
        show("ultralong_eval_workers", workers)
        if self.done_cells:
            show("ultralong_eval_time_left_seconds", self.seconds_left(time.monotonic()))
