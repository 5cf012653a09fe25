"""Perplexity by position, of the held-out sequences of `prepare` or of documents of a benchmark section. No Ray.

Token ids go in, mean losses by position come out. Held-out sequences have even buckets, and one curve for all of them;
documents have buckets that double, and a row each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.eval.tasks.perplexity import losses_by_position
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

PROMPT_END_TOKENS = 100  # of every document, kept for a reader


def holdout_tokens(holdout: Location) -> int:
    """Tokens of all held-out sequences."""
    with holdout.filesystem.open_input_file(holdout.path) as file:
        return sum(len(ids) for ids in _sequences(file))


def run_perplexity(engine: Any, config: EvaluateConfig, model: str, holdout: Location) -> dict[str, Any]:
    """Mean loss by position over the held-out sequences. `engine` is an `engine.Engine`.

    Raises: UserError when a sequence is too short to have a loss in every bucket.
    """
    with holdout.filesystem.open_input_file(holdout.path) as file:
        losses = [engine.token_losses(ids) for ids in _sequences(file)]
    ends, means = bucket_means(losses, config.perplexity_buckets)
    return {"model": model, "bucket_end_tokens": ends, "loss": means, "num_sequences": len(losses)}


def document_rows(engine: Any, documents: Iterable[NDArray[np.int32]], first: int) -> list[dict[str, Any]]:
    """A row of every document as cells store it: its losses under `facts`; the score is 1 / perplexity.

    documents: int32 [seq] each. `first` is the number of the first one.
    """
    rows = []
    for index, ids in enumerate(documents, start=first):
        losses = losses_by_position(engine.token_losses(ids))
        rows.append(
            {
                "index": index,
                "prompt_end": engine.tokenizer.decode(ids[-PROMPT_END_TOKENS:]),
                "prompt_tokens": len(ids),
                "expected": [],
                "metric": "inverse_perplexity",
                "facts": losses,
                "answer": f"{losses['loss']:.4f} nats a token",
                "score": math.exp(-losses["loss"]),
                "right": False,
            }
        )
    return rows


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
