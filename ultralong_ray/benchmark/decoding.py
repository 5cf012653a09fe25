"""`python jobs/benchmark.py decoding ...`: RULER and the short skills, answers decoded one by one and together.

Flows in: a model folder, lengths and samples. Flows out: a JSON with the seconds of both runs, by task and length, and
how many answers are the same. Cells are those of an evaluation, by its code, their prompts made from what is built in;
keys and values are freed before each cell. Written for one process: CPU or one GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

from ultralong_ray.benchmark.answers import add_engine, engine_of, timed_cells
from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import InProcessEngine
from ultralong_ray.config.made_tasks import RulerTask, ShortSkillsTask
from ultralong_ray.eval.cells import grid
from ultralong_ray.eval.making import Maker
from ultralong_ray.storage import Location

RUNS = ("alone", "together")


def add_decoding(add: Any) -> None:
    """The verb's arguments."""
    add_engine(add, prefill_chunk=8192)
    add("--lengths", type=at_least(1), nargs="+", default=[4096], help="of RULER, tokens")
    add("--samples", type=at_least(1), default=25, help="prompts of a task and length")
    add("--batch-tokens", type=at_least(1), default=InProcessEngine().batch_tokens, help="as evaluate.engine's")


def run_decoding(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Measure, write `options.out`, and return what was written. Raises: UserError for no model, lengths too short."""
    engine = engine_of(options, batch_tokens=options.batch_tokens)
    together = engine.batch_tokens  # 1 for a model that cannot
    config, maker = _asked(options), Maker({})
    cells = grid(config, ["final"], None, maker)
    timed_cells(engine, config, cells[-1:], maker)  # warm
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, tokens in zip(RUNS, (1, together), strict=True):
        engine.batch_tokens = tokens
        runs[name] = timed_cells(engine, config, cells, maker, forget=True)
    alone, others = ([answer for one in runs[name] for answer in one["answers"]] for name in RUNS)
    seconds = {name: sum(one["seconds"] for one in found) for name, found in runs.items()}
    result = {
        "command": command,
        "environment": environment(engine.device.type),
        "precision": options.precision,
        "batch_tokens": together,
        "seconds": seconds,
        "speedup": seconds["alone"] / seconds["together"],
        "answers": len(alone),
        "same_answers": sum(one == other for one, other in zip(alone, others, strict=True)),
        "mean_score": {name: sum(one["score"] for one in found) / len(found) for name, found in runs.items()},
        "seconds_by_task": {
            f"{cell.task} at {cell.context_length_tokens}": {name: runs[name][place]["seconds"] for name in RUNS}
            for place, cell in enumerate(cells)
        },
    }
    Location.of(options.out).write_json(result)
    return result


def _asked(options: argparse.Namespace) -> EvaluateConfig:
    """One cell a task and length."""
    ruler = RulerTask(
        kind="ruler", context_lengths=tuple(options.lengths), samples_per_cell=options.samples, words="built in"
    )
    return EvaluateConfig(
        models=("final",),
        passkey=False,
        tasks=(ruler, ShortSkillsTask(kind="short_skills", samples_per_cell=options.samples)),
        samples_per_shard=options.samples,
    )


def decoding_table(result: dict[str, Any]) -> str:
    """The result as a line for a terminal."""
    seconds = result["seconds"]
    return (
        f"{result['answers']} answers: {seconds['together']:.1f} s together, {seconds['alone']:.1f} s one by one: "
        f"{result['speedup']:.2f} times faster, {result['same_answers']} of {result['answers']} the same"
    )
