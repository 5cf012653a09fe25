"""`python jobs/benchmark.py prefix ...`: a passkey grid with and without reuse of shared beginnings, on the clock.

Flows in: a model folder and a grid. Flows out: a JSON with the seconds of both runs, by cell, and whether all answers
are the same. Cells are those of an evaluation, in its order and by its code; the unshared run frees the keys and values
before every prompt. Written for one process: CPU or one GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from ultralong_ray.benchmark.answers import add_engine, engine_of, timed_cells
from ultralong_ray.benchmark.record import environment
from ultralong_ray.benchmark.setups import at_least
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.cells import grid
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
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
    add_engine(add, prefill_chunk=512)
    add("--lengths", type=at_least(1), nargs="+", default=[4096], help="tokens")
    add("--depths", type=at_least(1), default=10, help="even steps from 0 to 100 %%")
    add("--samples", type=at_least(1), default=5, help="prompts of a cell")


def run_prefix(options: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Measure, write `options.out`, and return what was written. Raises: UserError for no model, lengths too short."""
    engine = engine_of(options)
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


def prefix_table(result: dict[str, Any]) -> str:
    """The result as a line for a terminal."""
    seconds = result["seconds"]
    same = "the same answers" if result["same_answers"] else "DIFFERENT ANSWERS"
    return (
        f"{len(result['cells'])} cells: {seconds['shared']:.1f} s with reuse, {seconds['unshared']:.1f} s without: "
        f"{result['speedup']:.2f} times faster, {same}"
    )
