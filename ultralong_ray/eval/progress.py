"""How far an evaluation is: cells begun and finished in; log lines with the time left, and metrics, out."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from ultralong_ray.eval.cells import PASSKEY, Cell
from ultralong_ray.watch.metrics import show

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 5.0  # between lines
EVEN_TOKENS = 53_000  # where attention takes as long as the rest: parameters / (layers x width) of Llama-3.1-8B
TOKENS_PER_STEP = 200  # of a prompt, read while one token is decoded: peak FLOP/s / bytes/s of an H200, bfloat16
PASSKEY_STEPS, TASK_STEPS = 8, 50  # about, of an answer


def work_of(cell: Cell, batch_tokens: int = 1) -> float:
    """What a cell takes, in tokens of a short prompt: of each sample its tokens, their square, and its answer.

    A worker that goes through passkey prompts deepest first holds what stands before the needle. Answers to prompts of
    `batch_tokens` are decoded together, by as many steps as one.
    """
    samples = max(1, cell.num_samples)
    tokens = cell.tokens / samples
    is_passkey = cell.task == PASSKEY and cell.num_samples > 0
    held = tokens * (cell.depth_percent or 0.0) / 100 if is_passkey and cell.depth_percent != 100 else 0.0
    steps = (PASSKEY_STEPS if is_passkey else TASK_STEPS) / min(samples, max(1, batch_tokens // max(1, tokens)))
    return samples * (tokens - held + (tokens**2 - held**2) / EVEN_TOKENS + TOKENS_PER_STEP * steps)


@dataclass
class Pace:
    """Seconds that workers were at cells, and the work that these are."""

    seconds: float = 0.0
    work: float = 0.0

    def add(self, seconds: float, work: float) -> None:
        self.seconds += seconds
        self.work += work

    @property
    def seconds_per_work(self) -> float:
        return self.seconds / self.work if self.work else 0.0


@dataclass
class Progress:
    """Log lines with the time left, judged by the pace of workers.

    A worker is slow at its first cell, since it loads the model: these count only as long as there are no others.
    """

    total_work: float
    total_cells: int
    num_workers: int
    stored_cells: int = 0
    batch_tokens: int = 1
    done_cells: int = 0
    last_line: float = 0.0
    _done_work: float = 0.0
    _running: dict[Cell, tuple[float, Pace]] = field(default_factory=dict)  # since when, and what it will count for
    _first: Pace = field(default_factory=Pace)
    _further: Pace = field(default_factory=Pace)

    def begun(self, cell: Cell, first: bool, now: float | None = None) -> None:
        """A worker is at `cell`, the first since it started or not."""
        self._running[cell] = (_time(now), self._first if first else self._further)

    def finished(self, cell: Cell, answered: bool = True, now: float | None = None) -> None:
        """A cell is through. One that failed says nothing of the pace."""
        now = _time(now)
        since, pace = self._running.pop(cell)
        if answered:
            pace.add(now - since, self._work(cell))
        self._done_work += self._work(cell)
        self.done_cells += 1
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
        """What is left at the pace so far, by all workers."""
        seconds_per_work = self._further.seconds_per_work or self._first.seconds_per_work
        begun = sum(min(now - since, seconds_per_work * self._work(cell)) for cell, (since, _) in self._running.items())
        left = seconds_per_work * (self.total_work - self._done_work) - begun
        return max(0.0, left) / self.num_workers

    def _work(self, cell: Cell) -> float:
        return work_of(cell, self.batch_tokens)

    def show(self, failed: int) -> None:
        """The evaluation so far as metrics."""
        show("ultralong_eval_cells", self.stored_cells + self.done_cells - failed)
        show("ultralong_eval_planned_cells", self.stored_cells + self.total_cells)
        show("ultralong_eval_failed_cells", failed)
        show("ultralong_eval_workers", len(self._running))
        if self.done_cells:
            show("ultralong_eval_time_left_seconds", self.seconds_left(time.monotonic()))


def _time(now: float | None) -> float:
    return time.monotonic() if now is None else now
