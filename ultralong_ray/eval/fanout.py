"""Stage `evaluate`: spread passkey cells and perplexity curves over a Ray cluster. The only file of this room with Ray.

In go the recipe, the model folders and the held-out sequences; out come the files of `eval/cells.py` and a summary.
Each worker is an actor that keeps the model it used last. It stores a result the moment it has it, so neither a lost
worker nor a stopped job costs more than the cells under way. Written against Ray 2.60.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ultralong_ray.config import EvaluateConfig, Recipe
from ultralong_ray.eval.cells import Cell, grid, run_passkey, run_perplexity, store_cell, stored_score
from ultralong_ray.model.folder import cached_folder
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # of one cell, when its worker is lost
PROGRESS_SECONDS = 5.0


class EvaluationWorker:
    """One process with one model in it at a time."""

    def __init__(self, config: EvaluateConfig, models: dict[str, Location], stage: Location) -> None:
        import torch

        torch.set_num_threads(max(1, int(config.cpus_per_task)))
        self._config, self._models, self._stage = config, models, stage
        self._loaded: tuple[str, Any] | None = None

    def run(self, cell: Cell, holdout: Location | None) -> float:
        """Compute and store one work item; returns its score (0 for a perplexity curve)."""
        engine = self._engine(cell.model)
        if cell.context_length_tokens is not None:
            result = run_passkey(engine, self._config, cell)
            store_cell(result, cell, self._stage)
            return result.score
        assert holdout is not None
        curve = run_perplexity(engine, self._config, cell.model, holdout)
        cell.result_file(self._stage).write_json(curve)
        return 0.0

    def _engine(self, model: str) -> Any:
        from ultralong_ray.eval.generate import Engine

        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # frees the former model before the next one is read
            folder = cached_folder(self._models[model])
            engine = Engine(
                folder, precision=self._config.precision, prefill_chunk_tokens=self._config.prefill_chunk_tokens
            )
            self._loaded = (model, engine)
        return self._loaded[1]


_REMOTE_WORKER: Any = ray.remote(EvaluationWorker)


def evaluate(
    recipe: Recipe, models: dict[str, Location], holdout: Location | None, stage: StageDirectory
) -> dict[str, Any]:
    """Compute every cell that is not stored yet and return the scores per model.

    Raises: UserError naming the cells that failed, after all others were computed and stored; or when the cluster
    cannot hold one worker.
    """
    config = recipe.evaluate
    assert config is not None
    started = time.monotonic()
    cells = grid(config, list(models), holdout)
    scores = {cell: score for cell in cells if (score := stored_score(config, cell, stage.location)) is not None}
    todo = [cell for cell in cells if cell not in scores]
    logger.info("evaluate: %d work items, %d of them already stored", len(cells), len(scores))
    if todo:
        pool = _Pool(config, models, holdout, stage.location, deque(todo), recipe.cluster.node_label("eval"))
        limit = recipe.cluster.evaluation_workers
        scores |= pool.run(min(limit, len(todo)) if limit else _num_workers(config, len(todo)))
        if pool.failures:
            reasons = "\n".join(f"  {cell.name}: {reason}" for cell, reason in pool.failures.items())
            raise UserError(
                f"evaluate: {len(pool.failures)} of {len(cells)} work items failed; the others are stored and will "
                f"not be computed again:\n{reasons}"
            )
    base_window = recipe.model.base_context_length
    return {
        "models": {name: summarise(scores, name, base_window) for name in models},
        "base_context_length": base_window,
        "num_cells": sum(cell.context_length_tokens is not None for cell in cells),
        "num_computed": len(todo),
        "seconds": time.monotonic() - started,
    }


def summarise(scores: dict[Cell, float], model: str, base_window: int) -> dict[str, float | None]:
    """Mean and worst passkey score of a model, and the means on either side of the base window (None: no cells)."""
    cells = {c: s for c, s in scores.items() if c.model == model and c.context_length_tokens is not None}
    within = [s for c, s in cells.items() if (c.context_length_tokens or 0) <= base_window]
    beyond = [s for c, s in cells.items() if (c.context_length_tokens or 0) > base_window]
    return {
        "mean": _mean(list(cells.values())),
        "min_cell": min(cells.values(), default=None),
        "mean_within_base_window": _mean(within),
        "mean_beyond_base_window": _mean(beyond),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _num_workers(config: EvaluateConfig, num_cells: int) -> int:
    """As many workers as the cluster holds, never more than there are cells."""
    resources = ray.cluster_resources()
    asked = {"CPU": ("cpus_per_task", config.cpus_per_task), "GPU": ("gpus_per_task", config.gpus_per_task)}
    fitting = [num_cells]
    for resource, (name, amount) in asked.items():
        if amount == 0:
            continue
        available = resources.get(resource, 0.0)
        if available < amount:
            raise UserError(
                f"evaluate.{name} {amount:g}: the Ray cluster has {available:g} {resource} in all; "
                f"lower it or add nodes"
            )
        fitting.append(int(available / amount))
    return min(fitting)


@dataclass
class _Pool:
    """Hands cells to actors until all are done; a lost actor is replaced and its cell tried again."""

    config: EvaluateConfig
    models: dict[str, Location]
    holdout: Location | None
    stage: Location
    todo: deque[Cell]
    node_label: dict[str, str] = field(default_factory=dict)  # of the workers' nodes; empty: any
    failures: dict[Cell, str] = field(default_factory=dict)
    _attempts: dict[Cell, int] = field(default_factory=dict)
    _running: dict[Any, tuple[Any, Cell]] = field(default_factory=dict)

    def run(self, num_workers: int) -> dict[Cell, float]:
        """Scores of the cells that could be computed; the rest is in `failures`."""
        scores: dict[Cell, float] = {}
        progress = _Progress(sum(cell.tokens for cell in self.todo), len(self.todo))
        try:
            for _ in range(num_workers):
                self._assign(self._new_worker(), None)
            while self._running:
                ready, _ = ray.wait(list(self._running), timeout=PROGRESS_SECONDS)
                for reference in ready:
                    worker, cell = self._running.pop(reference)
                    self._collect(reference, worker, cell, scores)
                    if cell in scores or cell in self.failures:
                        progress.finished(cell)
        finally:
            for worker, _ in self._running.values():
                ray.kill(worker)
        return scores

    def _collect(self, reference: Any, worker: Any, cell: Cell, scores: dict[Cell, float]) -> None:
        try:
            scores[cell] = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            self.failures[cell] = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
            logger.error("evaluate: %s failed: %s", cell.name, self.failures[cell])
        except RayActorError as error:
            worker = self._new_worker()
            self._attempts[cell] = self._attempts.get(cell, 0) + 1
            if self._attempts[cell] < MAX_ATTEMPTS:
                logger.warning("evaluate: the worker of %s was lost; the cell is tried again", cell.name)
                self.todo.appendleft(cell)
            else:
                self.failures[cell] = f"its worker was lost {MAX_ATTEMPTS} times ({error})"
        self._assign(worker, cell.model)

    def _assign(self, worker: Any, loaded: str | None) -> None:
        """Give a worker its next cell: among the longest left, one for the model that it has loaded."""
        if not self.todo:
            ray.kill(worker)
            return
        longest = [cell for cell in self.todo if cell.tokens == self.todo[0].tokens]
        cell = next((cell for cell in longest if cell.model == loaded), longest[0])
        self.todo.remove(cell)
        self._running[worker.run.remote(cell, self.holdout)] = (worker, cell)

    def _new_worker(self) -> Any:
        needs: dict[str, Any] = {"num_cpus": self.config.cpus_per_task, "num_gpus": self.config.gpus_per_task}
        needs["scheduling_strategy"] = "DEFAULT"  # not inside the placement group of a trial of Ray Tune
        if self.node_label:
            needs["label_selector"] = self.node_label
        return _REMOTE_WORKER.options(**needs).remote(self.config, self.models, self.stage)


@dataclass
class _Progress:
    """Log lines with the time left, judged by tokens: a cell's time grows with its length."""

    total_tokens: int
    total_cells: int
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
        left = (now - self.started) * (self.total_tokens - self.done_tokens) / max(self.done_tokens, 1)
        logger.info(
            "evaluate: %d of %d work items, about %d:%02d left (last: %s)",
            self.done_cells,
            self.total_cells,
            int(left) // 60,
            int(left) % 60,
            cell.name,
        )
