"""Counts of token shards in, `quarantine.jsonl` and its summary out: what was set aside, where and why.

    {"shard": "s3://bucket/a.jsonl", "row": 17, "unit": "line", "reason": "text is empty", "excerpt": "{'id': ..."}
    {"shard": "s3://bucket/b.parquet", "row": null, "unit": null, "reason": "... truncated ...", "excerpt": ""}

Rows of Parquet and Arrow shards count from 0, lines of JSONL from 1. A shard that was left out has no row. The order is
that of the shards, whatever order they were read in.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ultralong_ray.config import SourceConfig
from ultralong_ray.data.corpus import SkippedShard
from ultralong_ray.data.passes import TokenizeItem
from ultralong_ray.data.token_shards import read_bad_rows
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

FILE_NAME = "quarantine.jsonl"
SHOWN = 3  # bad rows that a message quotes

Results = Mapping[str, Mapping[str, Any]]  # token shard -> what tokenize_part returned


def write_quarantine(
    folder: Location,
    sources: Sequence[SourceConfig],
    items: Sequence[TokenizeItem],
    skipped: Sequence[SkippedShard],
    results: Results,
) -> dict[str, Any]:
    """Write the file, if there is anything to say, and return {rows, bad_rows, reasons, skipped_shards}.

    Raises UserError when the bad rows of a source exceed its `max_bad_rows_share`.
    """
    skipped = [*skipped, *_skipped_in_work(items, results)]
    rows = [sum(results[i.name].get("rows", 0) for i in items if i.source == s) for s in range(len(sources))]
    bad = [sum(results[i.name].get("bad_rows", 0) for i in items if i.source == s) for s in range(len(sources))]
    reasons: Counter[str] = Counter()
    shown: list[list[str]] = [[] for _ in sources]
    if skipped or any(bad):
        with (folder / FILE_NAME).open_for_write() as sink:
            for shard in skipped:
                line = {"shard": shard.address, "row": None, "unit": None, "reason": shard.reason, "excerpt": ""}
                sink.write((json.dumps(line) + "\n").encode())
            for source, line in _bad_rows(items, results):
                sink.write((json.dumps(line) + "\n").encode())
                reasons[line["reason"].split(" (")[0]] += 1
                if len(shown[source]) < SHOWN:
                    shown[source].append(f"{line['shard']}, {line['unit']} {line['row']}: {line['reason']}")
    for source, num_rows, num_bad, examples in zip(sources, rows, bad, shown, strict=True):
        if num_bad > source.max_bad_rows_share * num_rows:
            raise UserError(
                f"corpus source {source.uri}: {num_bad:,} bad rows of {num_rows:,} read, max_bad_rows_share "
                f"{source.max_bad_rows_share:g} allows {int(source.max_bad_rows_share * num_rows):,}. The first:\n  "
                + "\n  ".join(examples)
                + f"\nAll of them: {folder / FILE_NAME}. Mend or drop these rows, or raise max_bad_rows_share, and "
                f"submit again (shards already tokenised are kept)"
            )
    return {
        "rows": sum(rows),
        "bad_rows": sum(bad),
        "reasons": dict(reasons.most_common(20)),
        "skipped_shards": [{"shard": s.address, "reason": s.reason} for s in skipped],
    }


def _skipped_in_work(items: Sequence[TokenizeItem], results: Results) -> Iterator[SkippedShard]:
    """Parts that turned out to be unreadable while they were read."""
    for item in items:
        reason = results[item.name].get("bad_shard")
        if reason:
            assert item.part is not None
            yield SkippedShard(str(item.part.shard.location), reason)


def _bad_rows(items: Sequence[TokenizeItem], results: Results) -> Iterator[tuple[int, dict[str, Any]]]:
    """(source, line of the file) of every row set aside. Parts of a shard come one after the other in `items`."""
    address, passed = "", 0  # rows or lines of the shard in the parts before this one
    for item in items:
        if item.part is None:
            continue
        unit, location = item.part.row_unit, str(item.part.shard.location)
        if location != address:
            address, passed = location, 0
        result = results[item.name]
        first = passed if item.part.first_row is None else item.part.first_row
        if result.get("bad_rows"):
            for row in read_bad_rows(item.folder, item.name):
                number = first + row["row"] + item.part.first_number
                yield item.source, {"shard": address, **row, "row": number, "unit": unit}
        passed += result.get("lines" if unit == "line" else "rows", 0)
