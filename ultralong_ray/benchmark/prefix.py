"""`python jobs/benchmark.py prefix ...`: a passkey grid with and without reuse of shared beginnings, on the clock.

Flows in: a model folder and a grid. Flows out: a JSON with the seconds of both runs, by cell, and whether all answers
are the same. Cells are those of an evaluation, in its order and by its code; the unshared run frees the keys and values
before every prompt. Written for one process: CPU or one GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from typing import Any

from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least, model_folder
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.cells import Cell, grid, run_cell
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.storage import Location


class _Unshared:
    """The same engine, which forgets each prompt before the next."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.tokenizer = engine, engine.tokenizer

    def answers(self, requests: Iterable[Request]) -> list[str]:
        found = []
        for request in requests:
            self._engine.forget()
            found += self._engine.answers([request])
        return found


def add_prefix(add: Any) -> None:
    """The verb's arguments."""
    add("--model", required=True, help="Hugging Face folder; beyond its window answers are wrong, and timed alike")
    add("--lengths", type=at_least(1), nargs="+", default=[4096], help="tokens")
    add("--depths", type=at_least(1), default=10, help="even steps from 0 to 100 %%")
    add("--samples", type=at_least(1), default=5, help="prompts of a cell")
    add("--prefill-chunk", type=at_least(1), default=512, help="tokens; reuse is in whole chunks")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", required=True, help="JSON file")


def run_prefix(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Measure, write `options.out`, and return what was written. Raises: UserError for no model, lengths too short."""
    engine = Engine(
        model_folder(options.model),
        precision=options.precision,
        prefill_chunk_tokens=options.prefill_chunk,
        device=options.device,
    )
    step = 100 / max(1, options.depths - 1)
    config = EvaluateConfig(
        models=("final",),
        context_lengths=tuple(options.lengths),
        depths_percent=tuple(round(step * i, 1) for i in range(options.depths)),
        samples_per_cell=options.samples,
        precision=options.precision,
        prefill_chunk_tokens=options.prefill_chunk,
    )
    cells = grid(config, ["final"], None)
    timed_cells(engine, config, cells[-1:], Maker({}))  # warm
    engine.forget()
    run = [0]  # tokens that passed through the model
    engine.model.register_forward_pre_hook(lambda module, args: run.__setitem__(0, run[0] + args[0].shape[1]))
    shared, unshared = (timed_cells(each, config, cells, Maker({}), run) for each in (engine, _Unshared(engine)))
    same = [one["answers"] == other["answers"] for one, other in zip(shared, unshared, strict=True)]
    totals = {
        what: {name: sum(cell[what] for cell in cells) for name, cells in (("shared", shared), ("unshared", unshared))}
        for what in ("seconds", "cpu_seconds", "tokens_run")
    }
    result = {
        "command": command,
        "environment": environment(engine.device.type),
        "grid": {name: getattr(options, name) for name in ("lengths", "depths", "samples", "prefill_chunk")},
        "precision": options.precision,
        **totals,
        "speedup": totals["seconds"]["unshared"] / totals["seconds"]["shared"],
        "speedup_cpu_seconds": totals["cpu_seconds"]["unshared"] / totals["cpu_seconds"]["shared"],
        "same_answers": all(same),
        "cells": [
            {"length": cell.context_length_tokens, "depth": cell.depth_percent, "score": one["score"], "same": equal}
            | {f"{what}_shared": one[what] for what in totals}
            | {f"{what}_unshared": other[what] for what in totals}
            for cell, one, other, equal in zip(cells, shared, unshared, same, strict=True)
        ],
    }
    Location.of(options.out).write_json(result)
    return result


def timed_cells(
    engine: Any,
    config: EvaluateConfig,
    cells: list[Cell],
    maker: Maker,
    run: Sequence[int] = (0,),
    *,
    forget: bool = False,
) -> list[dict[str, Any]]:
    """Score, answers, seconds and tokens of every cell. An answer is text: the device has finished when a cell has.

    `run`: the tokens that passed so far, as a hook counts them. `forget`: free the keys and values before each cell.
    CPU seconds of this process are kept too: on a machine that others use they say more than the clock.
    """
    found = []
    for cell in cells:
        if forget:
            engine.forget()
        began, cpu_began, tokens_began = time.perf_counter(), time.process_time(), run[0]
        result = run_cell(engine, config, cell, maker, lambda chat: Prompts(engine.tokenizer, chat_template=chat))
        answers = [sample["answer"] for sample in result.samples]
        found.append(
            {
                "score": result.score,
                "answers": answers,
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - cpu_began,
                "tokens_run": run[0] - tokens_began,
            }
        )
    return found


def prefix_table(result: dict[str, Any]) -> str:
    """The result as a line for a terminal."""
    seconds = result["seconds"]
    same = "the same answers" if result["same_answers"] else "DIFFERENT ANSWERS"
    return (
        f"{len(result['cells'])} cells: {seconds['shared']:.1f} s with reuse, {seconds['unshared']:.1f} s without: "
        f"{result['speedup']:.2f} times faster, {same}"
    )
