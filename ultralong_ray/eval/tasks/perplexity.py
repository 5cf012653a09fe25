"""Perplexity by position on long documents: does a model still gain from what it read far back?

In go text files and a tokenizer, then the loss of every token (an engine's `token_losses`); out come the mean losses of
position buckets that double in size. One document a row, cut to the length and never packed, so that every token has
its whole past before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.eval.tasks.reading import read_texts
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

FIRST_BUCKET_TOKENS = 256
CHARACTERS_PER_TOKEN = 16  # more than any tokenizer packs on average: the rest of a huge document is not tokenised


def long_documents(
    files: Sequence[Location], tokenizer: Any, *, length_tokens: int, count: int
) -> Iterator[NDArray[np.int32]]:
    """The first `length_tokens` ids, BOS included, of the first `count` documents that have as many or more. Each:
    int32 [length_tokens].

    Raises: UserError when there are fewer documents of that length.
    """
    found, longest = 0, 0
    for text in (text for file in files for text in read_texts(file)):
        ids = tokenizer(text[: length_tokens * CHARACTERS_PER_TOKEN], verbose=False)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) >= length_tokens:
            found += 1
            yield np.asarray(ids[:length_tokens], dtype=np.int32)
        if found == count:
            return
    raise UserError(
        f"perplexity at {length_tokens} tokens: samples_per_cell is {count}, and {', '.join(map(str, files))} hold "
        f"{found} documents as long, the longest of {longest} tokens; name longer documents, a shorter length or fewer "
        f"samples"
    )


def bucket_edges(length_tokens: int) -> list[int]:
    """[1, 256, 512, 1024, ... length]: bucket k holds the targets at positions edges[k] to edges[k + 1] - 1."""
    edges = [1]
    edge = FIRST_BUCKET_TOKENS
    while edge < length_tokens:
        edges.append(edge)
        edge *= 2
    return [*edges, length_tokens]


def losses_by_position(losses: NDArray[np.float32]) -> dict[str, Any]:
    """Mean loss in nats of a document, and of each bucket. losses: [tokens - 1], losses[t] that of token t + 1."""
    edges = bucket_edges(len(losses) + 1)
    buckets = [losses[first - 1 : end - 1].mean(dtype=np.float64) for first, end in itertools.pairwise(edges)]
    return {
        "loss": float(losses.mean(dtype=np.float64)),
        "bucket_end_tokens": edges[1:],
        "bucket_loss": list(map(float, buckets)),
    }
