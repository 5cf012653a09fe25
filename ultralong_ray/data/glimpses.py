"""Packed sequences in, decoded places out that a person can look at; and the documents held out of them.

holdout.parquet     id, domain, input_ids list<int32> [sequence_length]: one row group per document
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultralong_ray.data.pack import DocumentPlaces
from ultralong_ray.data.token_shards import DocumentTable, TokenReader
from ultralong_ray.packed import PackedReader
from ultralong_ray.storage import Location

SAMPLE_TOKENS = 75  # decoded on either side of a separator: about 600 characters of English
NUM_SAMPLES = 3


def decoded_meetings(tokenizer: Any, folder: Location, places: DocumentPlaces) -> list[dict[str, Any]]:
    """Text around places where two documents meet, spread over the data; its beginning where none meet."""
    meetings = np.flatnonzero((places.start > 0) & (places.document_start == 0))
    chosen: Sequence[tuple[int, int]] = [(0, 0)]
    if len(meetings):
        count = min(NUM_SAMPLES, len(meetings))
        which = meetings[[len(meetings) * (2 * i + 1) // (2 * count) for i in range(count)]]
        chosen = list(zip(places.sequence[which].tolist(), places.start[which].tolist(), strict=True))
    reader = PackedReader(folder)
    samples = []
    for sequence, position in chosen:
        ids, _ = reader.read(sequence, max(0, position - SAMPLE_TOKENS), position + SAMPLE_TOKENS)
        samples.append({"sequence": sequence, "position": position, "text": tokenizer.decode(ids.tolist())})
    return samples


def decoded_sample(tokenizer: Any, folder: Location, places: DocumentPlaces, table: DocumentTable) -> dict[str, Any]:
    """One packed SFT sample as text, and the part of it that is a target."""
    place = len(places) // 2
    sequence = int(places.sequence[place])
    ids, weight = PackedReader(folder).read(sequence, int(places.start[place]), int(places.end[place]))
    assert weight is not None
    return {
        "sequence": sequence,
        "id": table.ids(places.row[[place]])[0],
        "text": tokenizer.decode(ids.tolist()),
        "targets": tokenizer.decode(ids[weight > 0].tolist()),
    }


def write_holdout(folder: Location, table: DocumentTable, rows: NDArray[np.int64], sequence_length: int) -> None:
    """holdout.parquet: the first `sequence_length` tokens of each document, one row group each."""
    schema = pa.schema([("id", pa.string()), ("domain", pa.string()), ("input_ids", pa.list_(pa.int32()))])
    reader = TokenReader(table.folder)
    names = table.ids(rows)
    shards = table.shard_of(rows).tolist()
    with (
        (folder / "holdout.parquet").open_for_write() as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        for row, name, shard in zip(rows.tolist(), names, shards, strict=True):
            ids = reader.ids(table.shards[shard], int(table.offset[row]), sequence_length)
            content = {"id": [name], "domain": [table.domains[table.domain[row]]], "input_ids": [ids]}
            writer.write_table(pa.table(content, schema=schema))
    reader.close()
