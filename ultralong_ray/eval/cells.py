"""What one worker computes and where it is stored: passkey cells and perplexity curves. No Ray here.

In go the recipe's `[evaluate]`, a model folder and a cell; out come `<stage>/cells/<model>/<length>-<depth>.json`
(a `CellResult`) and `<stage>/perplexity/<model>.json`. A stored result is used again only if it is whole and is the
one asked for.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.passkey import build_prompt, encode_prompt, is_right
from ultralong_ray.storage import Location
from ultralong_ray.types import CellResult, PasskeyPrompt, UserError

logger = logging.getLogger(__name__)

PROMPT_END_CHARACTERS = 400  # of every prompt, kept for a reader


@dataclass(frozen=True, slots=True)
class Cell:
    """One work item: a passkey cell, or with `context_length_tokens` None the perplexity curve of a model."""

    model: str
    context_length_tokens: int | None
    depth_percent: float
    tokens: int  # to run through the model; what is left of them gives the time left

    @property
    def name(self) -> str:
        if self.context_length_tokens is None:
            return f"perplexity of {self.model}"
        return f"{self.model} at {self.context_length_tokens} tokens, depth {self.depth_percent:g} %"

    def result_file(self, stage: Location) -> Location:
        if self.context_length_tokens is None:
            return stage / "perplexity" / f"{self.model}.json"
        return stage / "cells" / self.model / f"{self.context_length_tokens}-{self.depth_percent:g}.json"


def grid(config: EvaluateConfig, models: list[str], holdout: Location | None) -> list[Cell]:
    """Every work item, longest first, so that the last ones to finish are short."""
    cells = [
        Cell(model, length, depth, length * config.samples_per_cell)
        for length in sorted(set(config.context_lengths), reverse=True)
        for model in models
        for depth in config.depths_percent
    ]
    if holdout is not None:
        tokens = holdout_tokens(holdout)
        cells += [Cell(model, None, 0.0, tokens) for model in models if tokens]
    return sorted(cells, key=lambda cell: -cell.tokens)


def run_passkey(engine: Any, config: EvaluateConfig, cell: Cell) -> CellResult:
    """Ask every sample of a cell. `engine` is a `generate.Engine`."""
    assert cell.context_length_tokens is not None
    started = time.monotonic()
    prompts = [
        build_prompt(
            engine.tokenizer,
            context_length_tokens=cell.context_length_tokens,
            depth_percent=cell.depth_percent,
            sample=sample,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            chat_template=config.chat_template,
            digits=config.passkey_digits,
        )
        for sample in range(config.samples_per_cell)
    ]
    samples = [_ask(engine, config, prompt) for prompt in prompts]
    score = sum(sample["right"] for sample in samples) / len(samples)
    seconds = time.monotonic() - started
    return CellResult(cell.model, cell.context_length_tokens, cell.depth_percent, score, samples, seconds)


def _ask(engine: Any, config: EvaluateConfig, prompt: PasskeyPrompt) -> dict[str, Any]:
    """One sample as it is stored: enough of the prompt for a reader, the answer, and whether it is right."""
    ids = encode_prompt(engine.tokenizer, prompt.prompt, chat_template=config.chat_template)
    answer = engine.answer(ids, config.max_new_tokens)
    return {
        "prompt_end": prompt.prompt[-PROMPT_END_CHARACTERS:],
        "prompt_tokens": prompt.prompt_tokens,
        "answer": answer,
        "expected": prompt.expected,
        "right": is_right(answer, prompt.expected),
    }


def stored_score(config: EvaluateConfig, cell: Cell, stage: Location) -> float | None:
    """The score of a finished cell (0 for a finished curve), or None where it must be computed."""
    file = cell.result_file(stage)
    if not file.exists():
        return None
    try:
        stored = file.read_json()
        if cell.context_length_tokens is None:
            whole = stored["model"] == cell.model and len(stored["loss"]) == len(stored["bucket_end_tokens"])
            return 0.0 if whole else None
        result = CellResult(**stored)
        found = (result.model, result.context_length_tokens, result.depth_percent, len(result.samples))
        asked = (cell.model, cell.context_length_tokens, cell.depth_percent, config.samples_per_cell)
        if found == asked:
            return result.score
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s) and will be computed again", file, error)
        return None
    logger.warning("%s is of another cell and will be computed again", file)
    return None


def store_cell(result: CellResult, cell: Cell, stage: Location) -> None:
    cell.result_file(stage).write_json(asdict(result))


def holdout_tokens(holdout: Location) -> int:
    """Tokens of all held-out sequences."""
    with holdout.filesystem.open_input_file(holdout.path) as file:
        return sum(len(ids) for ids in _sequences(file))


def run_perplexity(engine: Any, config: EvaluateConfig, model: str, holdout: Location) -> dict[str, Any]:
    """Mean loss by position over the held-out sequences. `engine` is a `generate.Engine`.

    Raises: UserError when a sequence is too short to have a loss in every bucket.
    """
    with holdout.filesystem.open_input_file(holdout.path) as file:
        losses = [engine.token_losses(ids) for ids in _sequences(file)]
    ends, means = bucket_means(losses, config.perplexity_buckets)
    return {"model": model, "bucket_end_tokens": ends, "loss": means, "num_sequences": len(losses)}


def bucket_means(losses: list[NDArray[np.float32]], buckets: int) -> tuple[list[int], list[float]]:
    """Bucket ends in tokens and the mean loss in nats of the targets in each; losses[k][t] is that of token t + 1."""
    length = max(len(loss) for loss in losses) + 1
    if length - 1 < buckets:
        raise UserError(f"evaluate.perplexity_buckets {buckets} exceed the {length - 1} targets of a held-out sequence")
    # token 0 is no target; rounding up keeps every bucket filled
    edges = [1, *(-(-bucket * length // buckets) for bucket in range(1, buckets + 1))]
    means = [
        float(np.concatenate([loss[first - 1 : end - 1] for loss in losses]).mean(dtype=np.float64))
        for first, end in itertools.pairwise(edges)
    ]
    return edges[1:], means


def _sequences(file: Any) -> list[NDArray[np.int32]]:
    column = pq.read_table(file, columns=["input_ids"]).column("input_ids")
    return [np.asarray(row.values, dtype=np.int32) for row in column]
