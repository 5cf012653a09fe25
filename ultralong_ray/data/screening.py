"""Screening of a part while it is tokenised, and the account of all parts afterwards.

A task writes, beside the token shard of its part and before that counts as whole:

    <name>.screened.json     {"read", "too_long", "findings": [...]}
    <name>.prompts.parquet   chat samples that were admitted: id, digest, signature (uint32, little-endian)

The driver reads them back in the order of the parts, so the account is the same for any number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.config import DecontaminateConfig, DeduplicateConfig
from ultralong_ray.data.benchmarks import index_name, read_index, write_index
from ultralong_ray.data.decontaminate import screen_document, screen_sample, summarise
from ultralong_ray.data.deduplicate import Prompt, describe_prompt, prompt_text
from ultralong_ray.data.token_shards import DocumentTable
from ultralong_ray.storage import Location
from ultralong_ray.types import Document

FINDINGS_FILE = "contamination.jsonl"
_SIGNATURE = np.dtype("<u4")


@dataclass(frozen=True, slots=True)
class Screening:
    """What a task needs to screen its part: the rules, and where the index of the benchmarks lies."""

    config: DecontaminateConfig
    index: Location


def start_screening(config: DecontaminateConfig | None, root: Location) -> Screening | None:
    """Build the index below `root`, unless it is there; None when the recipe has no [decontaminate].

    Raises UserError as `write_index` does.
    """
    if config is None:
        return None
    folder = root / index_name(config, root.options)
    if not (folder / "index.npz").exists():  # written last
        write_index(config, folder)
    return Screening(config, folder)


class PartScreen:
    """Screens the texts of one part; `write` records what was found."""

    def __init__(
        self, folder: Location, name: str, screening: Screening | None, deduplicate: DeduplicateConfig | None = None
    ) -> None:
        self._target = (folder, name)
        self._screening = screening
        self._deduplicate = deduplicate
        self._index = read_index(screening.index) if screening is not None else None
        self._counts = {"read": 0, "too_long": 0}
        self._findings: list[dict[str, Any]] = []
        self._prompts: list[tuple[str, Prompt]] = []

    def documents(self, documents: Iterable[Document]) -> Iterator[Document]:
        """The documents without what overlaps a benchmark; the account is written when they end."""
        for document in documents:
            self._counts["read"] += 1
            kept: Document | None = document
            if self._screening is not None and self._index is not None:
                kept, findings = screen_document(self._index, self._screening.config, document)
                self._findings += map(asdict, findings)
            if kept is not None:
                yield kept
        self.write()

    def admits(self, sample_id: str, domain: str, messages: Sequence[Mapping[str, str]], *, too_long: bool) -> bool:
        """Whether a chat sample stays: it is short enough and overlaps no benchmark."""
        self._counts["read"] += 1
        if too_long:
            self._counts["too_long"] += 1
            return False
        if self._screening is not None and self._index is not None:
            turns = [message["content"] for message in messages]
            findings = screen_sample(self._index, self._screening.config, sample_id, domain, turns)
            self._findings += map(asdict, findings)
            if findings:
                return False
        if self._deduplicate is not None:
            self._prompts.append((sample_id, describe_prompt(prompt_text(messages), self._deduplicate)))
        return True

    def write(self) -> None:
        """Record the part's account."""
        folder, name = self._target
        if self._deduplicate is not None:
            columns = {
                "id": [sample_id for sample_id, _ in self._prompts],
                "digest": [prompt.digest for _, prompt in self._prompts],
                "signature": [prompt.signature.astype(_SIGNATURE).tobytes() for _, prompt in self._prompts],
            }
            schema = pa.schema([("id", pa.string()), ("digest", pa.binary()), ("signature", pa.binary())])
            with (folder / f"{name}.prompts.parquet").open_for_write() as sink:
                pq.write_table(pa.table(columns, schema=schema), sink)
        (folder / f"{name}.screened.json").write_json({**self._counts, "findings": self._findings})


@dataclass(frozen=True, slots=True)
class PartAccount:
    """What `PartScreen.write` recorded of a part."""

    source: int  # position in the recipe of the source that the part is of
    read: int
    too_long: int
    findings: list[dict[str, Any]]

    @property
    def contaminated(self) -> int:
        """Texts of the part that were dropped for what they overlap."""
        return len({finding["id"] for finding in self.findings if finding["action"] == "dropped"})


def read_accounts(table: DocumentTable) -> list[PartAccount]:
    """The accounts of the parts that have one, in their order; synthetic documents have none."""
    accounts = []
    for name, source in zip(table.shards, table.sources, strict=True):
        place = table.folder / f"{name}.screened.json"
        if place.exists():
            accounts.append(PartAccount(source, **place.read_json()))
    return accounts


def read_prompts(table: DocumentTable) -> dict[str, Prompt]:
    """The prompts of the admitted samples, by id."""
    prompts: dict[str, Prompt] = {}
    for name in table.shards:
        location = table.folder / f"{name}.prompts.parquet"
        if not location.exists():  # synthetic samples never repeat each other
            continue
        with location.filesystem.open_input_file(location.path) as source:
            rows = pq.read_table(source).to_pydict()
        for sample_id, digest, signature in zip(rows["id"], rows["digest"], rows["signature"], strict=True):
            prompts[sample_id] = Prompt(digest, np.frombuffer(signature, _SIGNATURE).astype(np.uint32))
    return prompts


def report_screening(screening: Screening | None, accounts: Sequence[PartAccount], folder: Location) -> dict[str, Any]:
    """Write `FINDINGS_FILE`, one finding a line, and return {"decontamination": counts}; {} without [decontaminate]."""
    if screening is None:
        return {}
    findings = [finding for account in accounts for finding in account.findings]
    lines = [json.dumps(finding, ensure_ascii=False, sort_keys=True) + "\n" for finding in findings]
    (folder / FINDINGS_FILE).write_bytes("".join(lines).encode())
    counts = read_index(screening.index).counts
    return {"decontamination": {"file": FINDINGS_FILE, **summarise(findings, counts)}}
