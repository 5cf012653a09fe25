"""The chat samples that a [refine] section asks to rewrite, in the order of its sources, and what is left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultralong_ray.config import Recipe, RefineConfig, SourceConfig
from ultralong_ray.data.chat import parse_messages
from ultralong_ray.data.corpus import BadShard, ShardPart, list_parts, list_shards
from ultralong_ray.data.rows import DocumentColumns, Quarantine, read_checked, row_domain, row_id
from ultralong_ray.data.sample import unit_hash
from ultralong_ray.data.sources import materialise
from ultralong_ray.data.token_shards import id_hash
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatSample:
    """One conversation of a source."""

    id: str
    domain: str
    messages: list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is no sample ("bad_row"), or a shard that cannot be read ("bad_shard")."""

    reason: str
    detail: str


class Samples(Collection[ChatSample]):
    """The samples of all sources in their order, read again at each iteration; `num_samples` of them by hash.

    Everything is read once before anything is asked. Raises UserError for bad shards, unless their source asks to leave
    them out, for more bad rows than it allows, and for ids used more than once.
    """

    def __init__(self, recipe: Recipe, config: RefineConfig) -> None:
        self.left_out: list[LeftOut] = []
        self._parts: list[tuple[ShardPart, DocumentColumns]] = []
        ids = [i for source in materialise(config.sources, recipe, chat=True) for i in self._admit(source)]
        if not ids:
            reason = self.left_out[0].detail if self.left_out else "no rows"
            raise UserError(f"refine.sources hold no sample. The first that was left out: {reason}")
        self._chosen = set(ids)
        if len(self._chosen) < len(ids):
            repeated = [i for i, count in Counter(ids).items() if count > 1]
            raise UserError(
                f"refine.sources: {len(repeated)} ids are used more than once, the first is {repeated[0]!r}. Ids must "
                f"be unique over all sources: set id_column, or rename them"
            )
        if config.num_samples is not None:
            order = np.argsort(unit_hash("refine", 0, np.array([id_hash(i) for i in ids], np.uint64)), kind="stable")
            self._chosen = {ids[i] for i in order[: config.num_samples].tolist()}

    def __len__(self) -> int:
        return len(self._chosen)

    def __contains__(self, sample: object) -> bool:
        return isinstance(sample, ChatSample) and sample.id in self._chosen

    def __iter__(self) -> Iterator[ChatSample]:
        samples = (s for part, columns in self._parts for s in _read(part, columns, Quarantine(part)))
        return (sample for sample in samples if sample.id in self._chosen)

    def _admit(self, source: SourceConfig) -> list[str]:
        """The ids of a source. Its good parts join those to read, the rest `left_out`."""
        columns, skip = DocumentColumns.of(source, source.messages_column), source.on_bad_shard == "skip"
        parts, skipped = list_parts(list_shards(source), columns.names, skip)
        shards = [LeftOut("bad_shard", shard.reason) for shard in skipped]
        ids: list[str] = []
        rows: list[LeftOut] = []
        num_rows = 0
        for part in parts:
            quarantine = Quarantine(part)
            try:
                found = [sample.id for sample in _read(part, columns, quarantine)]
            except BadShard as error:
                if not skip:
                    raise
                shards.append(LeftOut("bad_shard", str(error)))
                continue
            self._parts.append((part, columns))
            ids += found
            num_rows += quarantine.rows
            rows += [LeftOut("bad_row", f"{part.shard.location}: {b.reason} in {b.excerpt}") for b in quarantine.bad]
        _check_share(source, rows, num_rows)
        self.left_out += shards + rows
        for left in shards + rows[:1]:
            log.warning("refine source %s: left out %s, %s", source.uri, left.reason, left.detail)
        return ids


def _read(part: ShardPart, named: DocumentColumns, quarantine: Quarantine) -> Iterator[ChatSample]:
    columns = named.for_part(part)

    def sample(row: dict[str, Any]) -> ChatSample:
        return ChatSample(row_id(row, columns), row_domain(row, columns), parse_messages(row[columns.text]))

    return read_checked(part, columns, sample, quarantine)


def _check_share(source: SourceConfig, bad: list[LeftOut], num_rows: int) -> None:
    if len(bad) > source.max_bad_rows_share * num_rows:
        raise UserError(
            f"refine source {source.uri}: {len(bad):,} bad rows of {num_rows:,} read, max_bad_rows_share "
            f"{source.max_bad_rows_share:g} allows {int(source.max_bad_rows_share * num_rows):,}. The first: "
            f"{bad[0].detail}. Mend or drop these rows, or raise max_bad_rows_share, before paying for the others"
        )
