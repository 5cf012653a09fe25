"""Prompts in, the samples that repeat another one's prompt out: exactly, or nearly by MinHash. Pure.

A prompt is what the user says in all turns of a conversation; an empty one repeats nothing. Exact: equal after
lower-casing and collapsing white space, as in AceMath (arXiv 2412.15084). Near: an estimated Jaccard similarity of word
n-grams at or above a threshold; signatures are cut into bands so that only samples which share a band are compared
(Broder 1997; Leskovec et al., "Mining of Massive Datasets", section 3.4).

Samples are taken in the order of their ids, and one is dropped when it repeats one that was kept: so what survives is a
function of the set of samples, never of their order in the files, and everything dropped has a survivor like it.

Read against datasketch 2.0, whose permutation scheme is named here because its default has changed before.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import DeduplicateConfig
from ultralong_ray.data.ngrams import words

# Of two prompts just at the threshold, the share that meet in some band.
FOUND_AT_THRESHOLD = 0.99
SEED = 1

SignatureArray = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is kept of a prompt to compare it with others: a digest, and a signature [permutations] where asked for."""

    digest: bytes
    signature: SignatureArray


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Dropped id -> the id that survives for it."""

    exact: dict[str, str]
    near: dict[str, str]


def prompt_text(messages: Sequence[Mapping[str, str]]) -> str:
    """What the user says, turn after turn, whatever a source calls the user ("human").

    A system prompt is shared by many samples and says nothing here, unless nobody else speaks to the assistant.
    """
    speakers = {message["role"] for message in messages} - {"assistant"}
    asking = speakers & {"user"} or speakers - {"system"} or speakers
    return "\n".join(message["content"] for message in messages if message["role"] in asking)


def describe_prompt(text: str, config: DeduplicateConfig) -> Prompt:
    """Digest and MinHash signature of a prompt; the signature is empty when near duplicates are not asked for."""
    digest = _digest(text)
    if config.near_threshold is None:
        return Prompt(digest, np.empty(0, np.uint32))
    found = words(text)
    size = config.ngram_words
    shingles = {b" ".join(found[i : i + size]) for i in range(max(1, len(found) - size + 1))} if found else {digest}
    minhash = _empty_minhash(config.permutations).copy()
    minhash.update_batch(sorted(shingles))
    return Prompt(digest, minhash.hashvalues)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "replace"), digest_size=16).digest()


@lru_cache(maxsize=2)
def _empty_minhash(permutations: int) -> Any:
    from datasketch import MinHash

    return MinHash(permutations, seed=SEED, scheme="affine32")


def find_duplicates(prompts: Mapping[str, Prompt], config: DeduplicateConfig) -> Duplicates:
    """Which samples to drop. Near duplicates are looked for among the survivors of the exact ones.

    Samples with an empty prompt all stay: that nothing was asked does not make their answers alike.
    """
    exact: dict[str, str] = {}
    first: dict[bytes, str] = {}
    empty = _digest("")
    for sample_id in sorted(name for name, prompt in prompts.items() if prompt.digest != empty):
        survivor = first.setdefault(prompts[sample_id].digest, sample_id)
        if survivor != sample_id:
            exact[sample_id] = survivor
    if config.near_threshold is None or not first:
        return Duplicates(exact, {})
    ids = sorted(first.values())
    signatures = np.stack([prompts[sample_id].signature for sample_id in ids])
    repeats = near_duplicates(signatures, config.near_threshold)
    return Duplicates(exact, {ids[row]: ids[survivor] for row, survivor in repeats.items()})


def near_duplicates(signatures: SignatureArray, threshold: float) -> dict[int, int]:
    """Dropped row -> the first kept row that is like it, for signatures [samples, permutations], rows in order."""
    groups = _shared_bands(signatures, rows_per_band(signatures.shape[1], threshold))
    kept_in: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    dropped: dict[int, int] = {}
    for row in np.flatnonzero((groups >= 0).any(axis=1)).tolist():
        keys = [(band, group) for band, group in enumerate(groups[row].tolist()) if group >= 0]
        near = np.array(sorted({kept for key in keys for kept in kept_in[key]}), np.int64)
        alike = near[(signatures[near] == signatures[row]).mean(axis=1) >= threshold] if len(near) else near
        if len(alike):
            dropped[row] = int(alike[0])
        else:
            for key in keys:
                kept_in[key].append(row)
    return dropped


def rows_per_band(permutations: int, threshold: float) -> int:
    """The most rows per band for which two prompts at the threshold share a band with `FOUND_AT_THRESHOLD`."""
    fitting = [
        rows
        for rows in range(1, permutations + 1)
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= FOUND_AT_THRESHOLD
    ]
    return max(fitting, default=1)


def _shared_bands(signatures: SignatureArray, rows: int) -> NDArray[np.int64]:
    """[samples, bands]: the number of the group that has the same band, -1 where no other sample has it."""
    num_bands = signatures.shape[1] // rows
    groups = np.full((len(signatures), num_bands), -1, np.int64)
    for band in range(num_bands):
        values = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = values.view(np.dtype((np.void, values.itemsize * rows))).ravel()
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        groups[:, band] = np.where(counts[group] > 1, group, -1)
    return groups
