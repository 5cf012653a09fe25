"""What benchmarks of one engine's answers share: the arguments that name it, and cells on the clock.

In go a model folder and the cells of an evaluation; out come seconds, answers and scores by cell, by the evaluation's
own code. Written for one process: CPU or one GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from ultralong_ray.benchmark.setups import at_least, model_folder
from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.cells import Cell, run_cell
from ultralong_ray.eval.generate import Engine
from ultralong_ray.eval.making import Maker
from ultralong_ray.eval.tasks.prompt import Prompts


def add_engine(add: Any, *, prefill_chunk: int) -> None:
    """The arguments that `engine_of` reads, and where the result goes."""
    add("--model", required=True, help="Hugging Face folder; beyond its window answers are wrong, and timed alike")
    add("--prefill-chunk", type=at_least(1), default=prefill_chunk, help="tokens; reuse is in whole chunks")
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", required=True, help="JSON file")


def engine_of(options: argparse.Namespace, *, batch_tokens: int = 1) -> Engine:
    """Raises: UserError for no model."""
    return Engine(
        model_folder(options.model),
        precision=options.precision,
        prefill_chunk_tokens=options.prefill_chunk,
        device=options.device,
        batch_tokens=batch_tokens,
    )


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
