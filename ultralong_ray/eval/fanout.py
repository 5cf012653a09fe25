"""Stage `evaluate`: spread cells of all models and tasks over a Ray cluster. The only file of this room with Ray.

In go the recipe, the model folders and the held-out sequences; out come the files of `eval/cells.py`, `plan.json`
(every cell that was asked for), `failed.json` (why a cell has no result) and a summary. Each worker is an actor that
keeps the model it used last. It stores a result the moment it has it, so neither a lost worker nor a stopped job costs
more than the cells under way. Written against Ray 2.60.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ultralong_ray.config import EvaluateConfig, ModelConfig, Recipe
from ultralong_ray.config.engines import EndpointEngine, InProcessEngine, ShardedEngine, VllmEngine
from ultralong_ray.config.made_tasks import NAMED_WORDS
from ultralong_ray.eval.cells import Cell, grid, points_of, run_cell, store_cell, stored_points
from ultralong_ray.eval.making import Maker, check_sections
from ultralong_ray.eval.open_engine import open_engine
from ultralong_ray.eval.order import next_cell
from ultralong_ray.eval.perplexity import run_perplexity
from ultralong_ray.eval.progress import PROGRESS_SECONDS, Progress, work_of
from ultralong_ray.eval.summaries import summarise, summarise_tasks
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.model.folder import base_folder
from ultralong_ray.parallel.allocator import allocator_environment
from ultralong_ray.storage import Location, StageDirectory, local_folder
from ultralong_ray.types import UserError, stand_ins

logger = logging.getLogger(__name__)

PLAN_FILE, FAILED_FILE = "plan.json", "failed.json"
HAVE_OWN_TEXTS = ("ruler", "lveval", "infinitebench")
MAX_ATTEMPTS = 3  # of one cell, when its worker is lost


@dataclass(frozen=True)
class _Inputs:
    """What every worker is sent."""

    config: EvaluateConfig
    models: Mapping[str, Location | ModelConfig]
    holdout: Location | None
    stage: Location
    files: dict[str, Location]  # of every path that evaluate.tasks names


class EvaluationWorker:
    """One process with one model in it at a time."""

    def __init__(self, inputs: _Inputs, room: Any = None) -> None:
        """`room`: the placement group of a sharded engine."""
        import torch

        torch.set_num_threads(max(1, int(inputs.config.cpus_per_task)))
        self._inputs, self._room = inputs, room
        self._maker = Maker(inputs.files)
        self._loaded: tuple[str, Any] | None = None
        self._prompts: dict[bool, Prompts] = {}  # of the loaded model, by whether its chat template is used

    def run(self, cell: Cell) -> list[float]:
        """Compute and store one work item; returns the score of every sample (none for a perplexity curve)."""
        try:
            return self._computed(cell)
        except UserError:
            raise
        except Exception:
            self._close()  # its cache may be half written, its ranks may wait for one another
            raise

    def _computed(self, cell: Cell) -> list[float]:
        inputs, engine = self._inputs, self._engine(cell.model)
        if cell.context_length_tokens is not None:
            result = run_cell(engine, inputs.config, cell, self._maker, self._prompts_of)
            store_cell(result, cell, inputs.stage)
            return points_of(result)
        assert inputs.holdout is not None
        curve = run_perplexity(engine, inputs.config, cell.model, inputs.holdout)
        cell.result_file(inputs.stage).write_json(curve)
        return []

    def check(self, model: str) -> dict[str, set[str]]:
        """What each task is made from. Raises: UserError for a section of evaluate.tasks that could not be asked, and
        for a server that is away."""
        engine = self._engine(model)
        if hasattr(engine, "check"):
            engine.check()
        return check_sections(self._inputs.config, self._maker, self._prompts_of)

    def _engine(self, model: str) -> Any:
        if self._loaded is None or self._loaded[0] != model:
            self._close()  # frees the former model before the next one is read
            found = self._inputs.models[model]
            at_base = isinstance(found, ModelConfig)
            folder = base_folder(found, self._inputs.stage.options) if at_base else local_folder(found)
            self._loaded = (model, open_engine(self._inputs.config, model, folder, self._room))
        return self._loaded[1]

    def _close(self) -> None:
        if self._loaded is not None and hasattr(self._loaded[1], "close"):
            self._loaded[1].close()
        self._loaded, self._prompts = None, {}

    def _prompts_of(self, chat_template: bool) -> Prompts:
        assert self._loaded is not None
        if chat_template not in self._prompts:
            self._prompts[chat_template] = Prompts(self._loaded[1].tokenizer, chat_template=chat_template)
        return self._prompts[chat_template]


_REMOTE_WORKER: Any = ray.remote(EvaluationWorker)


def evaluate(
    recipe: Recipe, models: Mapping[str, Location | ModelConfig], holdout: Location | None, stage: StageDirectory
) -> dict[str, Any]:
    """Compute every cell that is not stored yet and return the scores per model.

    `models`: name to the folder of a model, or to [model], whose base may be on the hub.

    A cell that fails is named in the log, in `failed.json` and in the summary, counts 0 in every mean, and is tried
    again by the next submission. Raises: UserError when none could be computed, when a benchmark's file is absent,
    when a task does not fit into its shortest length, or when the cluster cannot hold one worker.
    """
    config = recipe.evaluate
    assert config is not None
    if holdout is not None and not config.gives_losses:
        logger.info("evaluate: an engine of kind %s gives no losses: no perplexity by position", config.engine.kind)
        holdout = None
    started = time.monotonic()
    inputs = _Inputs(config, models, holdout, stage.location, benchmark_files(recipe))
    cells = grid(config, list(models), holdout, Maker(inputs.files))
    (stage.location / PLAN_FILE).write_json({"cells": [{**asdict(cell), "file": cell.file} for cell in cells]})
    points = {cell: found for cell in cells if (found := stored_points(config, cell, stage.location)) is not None}
    todo = [cell for cell in cells if cell not in points]
    logger.info("evaluate: %d work items, %d of them already stored", len(cells), len(points))
    failures: dict[Cell, str] = {}
    (stage.location / FAILED_FILE).write_json({})  # they are tried again, and this run may be cut short
    if todo:
        pool = _Pool(inputs, deque(todo), recipe.cluster.node_label("eval"), len(points))
        limit = recipe.cluster.evaluation_workers
        points |= pool.run(min(limit, len(todo)) if limit else _num_workers(config, len(todo)))
        failures = pool.failures
    _report_failures(failures, len(cells), bool(points), stage.location)
    counted = points | {cell: [0.0] * cell.num_samples for cell in failures}
    base_window = recipe.model.base_context_length
    return {
        "models": {name: summarise(counted, name, base_window) for name in models},
        "tasks": {name: summarise_tasks(counted, name) for name in models},
        "base_context_length": base_window,
        "num_cells": sum(cell.context_length_tokens is not None for cell in cells),
        "num_computed": len(todo) - len(failures),
        "num_failed": len(failures),
        "seconds": time.monotonic() - started,
    }


def benchmark_files(recipe: Recipe) -> dict[str, Location]:
    """The place of every path that evaluate.tasks names, made absolute here: workers may run in another folder.

    Raises: UserError naming the field of a path where there is nothing.
    """
    assert recipe.evaluate is not None
    files: dict[str, Location] = {}
    for number, section in enumerate(recipe.evaluate.tasks):
        for name, path in section.paths():
            place = Location.of(path, recipe.storage.options)
            if path not in files and not place.exists():
                named = f", name {' or '.join(map(repr, NAMED_WORDS))}" if name == "words" else ""
                raise UserError(
                    f"evaluate.tasks.{number}.{name}: there is no {place}; correct the path{named}, or leave out the "
                    f"task of kind {section.kind!r} that reads it"
                )
            files[path] = place
    return files


def _report_failures(failures: dict[Cell, str], num_cells: int, any_result: bool, stage: Location) -> None:
    """Say what failed, and keep it for the report. Raises: UserError when there is no result at all."""
    (stage / FAILED_FILE).write_json({cell.file: reason for cell, reason in failures.items()})
    if not failures:
        return
    named: dict[str, list[str]] = {}
    for cell, reason in failures.items():
        named.setdefault(reason, []).append(cell.name)
    reasons = "\n".join(
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in named.items()
    )
    if not any_result:
        raise UserError(f"evaluate: all {num_cells} work items failed:\n{reasons}")
    logger.error(
        "evaluate: %d of %d work items failed and count 0. Submit again to try them, and only them, once more:\n%s",
        len(failures),
        num_cells,
        reasons,
    )


def _num_workers(config: EvaluateConfig, num_cells: int) -> int:
    """As many workers as the cluster holds, never more than there are cells."""
    if isinstance(config.engine, VllmEngine):
        return 1  # whose replicas are Ray Data's
    resources = ray.cluster_resources()
    group = config.engine.degree if isinstance(config.engine, ShardedEngine) else 1
    asked = {"CPU": ("cpus_per_task", config.cpus_per_task), "GPU": ("gpus_per_task", config.gpus_per_task)}
    fitting = [num_cells]
    for resource, (name, amount) in asked.items():
        if amount == 0:
            continue
        available = resources.get(resource, 0.0)
        if available < group * amount:
            times = f" times evaluate.engine.degree {group}" if group > 1 else ""
            raise UserError(
                f"evaluate.{name} {amount:g}{times}: the Ray cluster has {available:g} {resource} in all; "
                f"lower it or add nodes"
            )
        fitting.append(int(available / (group * amount)))
    return min(fitting)


def _say_stand_ins(made_from: Mapping[str, set[str]]) -> None:
    """Of each benchmark that is not made from its own texts, in the log. `made_from`: sources by task."""
    sources: dict[str, set[str]] = defaultdict(set)
    for task, found in made_from.items():
        sources[task.split("/", 1)[0]].update(found)
    for suite, found in sources.items():
        if suite in HAVE_OWN_TEXTS and (instead := stand_ins(found)):
            logger.info(
                "evaluate: %s is not made from the benchmark's own texts (%s): name them in its section, or do not "
                "compare it with published scores",
                suite,
                "; ".join(instead),
            )


@dataclass(frozen=True, eq=False)
class _Worker:
    """An `EvaluationWorker` actor, and the placement group that its engine's own actors stand in."""

    actor: Any
    room: Any = None


@dataclass
class _Pool:
    """Hands cells to actors until all are done; a lost actor is replaced and its cell tried again."""

    inputs: _Inputs
    todo: deque[Cell]
    node_label: dict[str, str] = field(default_factory=dict)  # of the workers' nodes; empty: any
    num_stored: int = 0  # cells of earlier runs
    failures: dict[Cell, str] = field(default_factory=dict)
    _attempts: dict[Cell, int] = field(default_factory=dict)
    _workers: list[_Worker] = field(default_factory=list)
    _running: dict[Any, tuple[_Worker, Cell]] = field(default_factory=dict)
    _progress: Progress = field(init=False)

    def run(self, num_workers: int) -> dict[Cell, list[float]]:
        """Sample scores of the cells that could be computed; the rest is in `failures`."""
        points: dict[Cell, list[float]] = {}
        engine = self.inputs.config.engine
        together = engine.batch_tokens if isinstance(engine, InProcessEngine) else 1
        work = sum(work_of(cell, together) for cell in self.todo)
        progress = Progress(work, len(self.todo), num_workers, self.num_stored, together)
        self._progress = progress
        progress.show(0)
        try:
            first, *others = [self._new_worker() for _ in range(num_workers)]
            checked = self._begin_check(first)
            for worker in others:  # they need not wait for it: what they store is asked of a run that is not refused
                self._assign(worker, None)
            self._end_check(checked)
            self._assign(first, None)
            while self._running:
                ready, _ = ray.wait(list(self._running), timeout=PROGRESS_SECONDS)
                for reference in ready:
                    worker, cell = self._running.pop(reference)
                    self._collect(reference, worker, cell, points)
                    if cell in points or cell in self.failures:
                        progress.finished(cell, answered=cell in points)
                progress.show(len(self.failures))
        finally:
            for worker in list(self._workers):
                self._end(worker)
        return points

    def _begin_check(self, worker: _Worker) -> Any:
        """The check of what no worker could do, under way; None where there is nothing to check."""
        if not self.inputs.config.tasks and not isinstance(self.inputs.config.engine, EndpointEngine):
            return None
        return worker.actor.check.remote(self.todo[0].model)

    def _end_check(self, checked: Any) -> None:
        """Raises: UserError of the check. Whatever else goes wrong in it is met again, and reported, cell by cell."""
        try:
            if checked is not None:
                _say_stand_ins(ray.get(checked))
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
        except RayActorError:
            logger.warning("evaluate: the worker that checked the tasks was lost")

    def _collect(self, reference: Any, worker: _Worker, cell: Cell, points: dict[Cell, list[float]]) -> None:
        held: Cell | None = cell  # by the worker's cache
        try:
            points[cell] = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            reason = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {cause}"
            likewise = reason in self.failures.values()
            self.failures[cell] = reason
            logger.error("evaluate: %s failed%s", cell.name, " for the same reason" if likewise else f": {reason}")
        except RayActorError as error:
            self._end(worker)
            worker, held = self._new_worker(), None
            self._attempts[cell] = self._attempts.get(cell, 0) + 1
            stored = stored_points(self.inputs.config, cell, self.inputs.stage)
            if stored is not None:  # lost after it had stored the result, before it could say so
                points[cell] = stored
            elif self._attempts[cell] < MAX_ATTEMPTS:
                logger.warning("evaluate: the worker of %s was lost; the cell is tried again", cell.name)
                self.todo.appendleft(cell)
            else:
                self.failures[cell] = f"its worker was lost {MAX_ATTEMPTS} times ({error})"
        self._assign(worker, held)

    def _assign(self, worker: _Worker, last: Cell | None) -> None:
        """Give a worker its next cell; `last` is the one that it has done."""
        if not self.todo:
            self._end(worker)
            return
        cell = next_cell(self.todo, last)
        self.todo.remove(cell)
        self._progress.begun(cell, first=last is None)
        self._running[worker.actor.run.remote(cell)] = (worker, cell)

    def _new_worker(self) -> _Worker:
        config = self.inputs.config
        needs: dict[str, Any] = {"num_cpus": config.cpus_per_task, "num_gpus": config.gpus_per_task}
        if config.gpus_per_task:
            needs["runtime_env"] = {"env_vars": allocator_environment()}
        if isinstance(config.engine, ShardedEngine | VllmEngine):
            needs = {"num_cpus": 0}  # the work is done by the actors that it starts, which ask for the resources
        needs["scheduling_strategy"] = "DEFAULT"  # not inside the placement group of a trial of Ray Tune
        if self.node_label:
            needs["label_selector"] = self.node_label
        room = None
        if isinstance(config.engine, ShardedEngine):
            from ultralong_ray.eval.sharded_group import reserve_group

            room = reserve_group(config)
        self._workers.append(_Worker(_REMOTE_WORKER.options(**needs).remote(self.inputs, room), room))
        return self._workers[-1]

    def _end(self, worker: _Worker) -> None:
        """Stop a worker, if it is not gone already, and give back what was held for it."""
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if worker.room is not None:
            ray.util.remove_placement_group(worker.room)
