"""`python jobs/benchmark.py decoding ...`: RULER and the short skills, answers decoded one by one and together.

Flows in: a model folder, lengths and samples. Flows out: a JSON with the seconds of both runs, by task and length, and
how many answers are the same. Cells are those of an evaluation, by its code, their prompts made from what is built in;
keys and values are freed before each cell. Written for one process: CPU or one GPU.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

from ultralong_ray.benchmark.prefix import timed_cells
from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least, model_folder
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.engines import InProcessEngine
from ultralong_ray.config.made_tasks import RulerTask, ShortSkillsTask
from ultralong_ray.eval.cells import grid
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
from ultralong_ray.storage import Location


def add_decoding(add: Any) -> None:
    """The verb's arguments."""
    add("--model", required=True, help="Hugging Face folder; beyond its window answers are wrong, and timed alike")
    add("--lengths", type=at_least(1), nargs="+", default=[4096], help="of RULER, tokens")
    add("--samples", type=at_least(1), default=25, help="prompts of a task and length")
    add("--batch-tokens", type=at_least(1), default=InProcessEngine().batch_tokens, help="as evaluate.engine's")
    add("--prefill-chunk", type=at_least(1), default=8192, help="tokens")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", required=True, help="JSON file")


def run_decoding(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Measure, write `options.out`, and return what was written. Raises: UserError for no model, lengths too short."""
    engine = Engine(
        model_folder(options.model),
        precision=options.precision,
        prefill_chunk_tokens=options.prefill_chunk,
        device=options.device,
    )
    ruler = RulerTask(
        kind="ruler", context_lengths=tuple(options.lengths), samples_per_cell=options.samples, words="built in"
    )
    config = EvaluateConfig(
        models=("final",),
        passkey=False,
        tasks=(ruler, ShortSkillsTask(kind="short_skills", samples_per_cell=options.samples)),
        samples_per_shard=options.samples,
    )
    maker = Maker({})
    cells = grid(config, ["final"], None, maker)
    timed_cells(engine, config, cells[-1:], maker)  # warm
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, tokens in (("alone", 1), ("together", options.batch_tokens)):
        engine.batch_tokens = tokens
        runs[name] = timed_cells(engine, config, cells, maker, forget=True)
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(runs, 0.0))
    for name, found in runs.items():
        for cell, one in zip(cells, found, strict=True):
            seconds[f"{cell.task} at {cell.context_length_tokens}"][name] += one["seconds"]
    pairs = [
        (one, other)
        for alone, together in zip(runs["alone"], runs["together"], strict=True)
        for one, other in zip(alone["answers"], together["answers"], strict=True)
    ]
    totals = {name: sum(one["seconds"] for one in found) for name, found in runs.items()}
    result = {
        "command": command,
        "environment": environment(engine.device.type),
        "precision": options.precision,
        "batch_tokens": options.batch_tokens,
        "seconds": totals,
        "speedup": totals["alone"] / totals["together"],
        "answers": len(pairs),
        "same_answers": sum(one == other for one, other in pairs),
        "mean_score": {name: sum(one["score"] for one in found) / len(found) for name, found in runs.items()},
        "seconds_by_task": seconds,
    }
    Location.of(options.out).write_json(result)
    return result


def decoding_table(result: dict[str, Any]) -> str:
    """The result as a line for a terminal."""
    seconds = result["seconds"]
    return (
        f"{result['answers']} answers: {seconds['together']:.1f} s together, {seconds['alone']:.1f} s one by one: "
        f"{result['speedup']:.2f} times faster, {result['same_answers']} of {result['answers']} the same"
    )
