"""Perplexity by position on long documents: does a model still gain from what it read far back?

In go text files and a tokenizer, then the loss of every token (an engine's `token_losses`); out come the mean loss and
perplexity of position buckets that double in size. One document a row, cut to the length and never packed, so that
every token has its whole past before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.eval.tasks.reading import read_texts
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

FIRST_BUCKET_TOKENS = 256
CHARACTERS_PER_TOKEN = 16  # more than any tokenizer packs on average: the rest of a huge document is not tokenised


def long_documents(
    files: Sequence[Location], tokenizer: Any, *, length_tokens: int, limit: int | None = None
) -> Iterator[NDArray[np.int32]]:
    """The first `length_tokens` ids, BOS included, of every document that has as many. Each: int32 [length_tokens].

    Raises: UserError when no document is as long.
    """
    found, longest = 0, 0
    for text in (text for file in files for text in read_texts(file)):
        if limit is not None and found >= limit:
            return
        ids = tokenizer(text[: length_tokens * CHARACTERS_PER_TOKEN], verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) >= length_tokens:
            found += 1
            yield np.asarray(ids[:length_tokens], dtype=np.int32)
    if not found:
        raise UserError(
            f"perplexity at {length_tokens} tokens: the longest document of {', '.join(map(str, files)) or 'no file'} "
            f"has {longest}; name longer documents or a shorter length"
        )


def bucket_edges(length_tokens: int) -> list[int]:
    """[1, 256, 512, 1024, ... length]: bucket k holds the targets at positions edges[k] to edges[k + 1] - 1."""
    edges = [1]
    edge = FIRST_BUCKET_TOKENS
    while edge < length_tokens:
        edges.append(edge)
        edge *= 2
    return [*edges, length_tokens]


def position_means(losses: Iterable[NDArray[np.float32]], length_tokens: int) -> dict[str, Any]:
    """Mean over documents by bucket. losses: each [length_tokens - 1] nats, losses[t] that of token t + 1.

    Returns: bucket_end_tokens, loss (nats), perplexity, and the standard error of the loss over documents (None for
    one). Raises: ValueError when a document has another number of losses, or there is none.
    """
    edges = bucket_edges(length_tokens)
    rows = []
    for loss in losses:
        if len(loss) != length_tokens - 1:
            raise ValueError(f"{len(loss)} losses of a document of {length_tokens} tokens; one per token but the first")
        rows.append([loss[first - 1 : end - 1].mean(dtype=np.float64) for first, end in itertools.pairwise(edges)])
    if not rows:
        raise ValueError("no document")
    table = np.array(rows)  # [documents, buckets]
    means = table.mean(axis=0)
    errors = table.std(axis=0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None
    return {
        "bucket_end_tokens": edges[1:],
        "loss": means.tolist(),
        "perplexity": np.exp(means).tolist(),
        "loss_standard_error": None if errors is None else errors.tolist(),
        "num_documents": len(rows),
    }
