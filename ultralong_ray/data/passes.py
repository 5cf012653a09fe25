"""The work of one task of either pass: pure functions of a work item, free of Ray.

Pass 1 turns a part of the corpus into a token shard; pass 2 turns the plan of one output file into that file. Both
write the same bytes wherever and however often they run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from ultralong_ray.config import DeduplicateConfig, SourceConfig
from ultralong_ray.data.chat import check_template, parse_messages, tokenize_chat
from ultralong_ray.data.corpus import (
    DocumentColumns,
    ShardPart,
    list_parts,
    list_shards,
    read_checked,
    read_documents,
    row_domain,
    row_id,
)
from ultralong_ray.data.pack import PackPlan, Separators, fill
from ultralong_ray.data.screening import PartScreen, Screening
from ultralong_ray.data.token_shards import StoredDocument, TokenReader, read_counts, write_token_shard
from ultralong_ray.data.tokenize import encode_batch, load_tokenizer
from ultralong_ray.packed import file_name, write_sequences
from ultralong_ray.storage import Location
from ultralong_ray.types import Document, Placement, TokenizedDocument

TASK_DOCUMENTS_PER_PART = 4096
BATCH_CHARACTERS = 2**20  # texts tokenised in one call; a longer text goes alone
MESSAGES_COLUMN = "messages"


@dataclass(frozen=True, slots=True)
class TokenizeItem:
    """One part of a source: a range of a shard, or synthetic documents [first_task, first_task + num_tasks)."""

    name: str
    kind: Literal["text", "chat", "tasks"]
    base: str
    revision: str | None
    folder: Location
    columns: DocumentColumns | None = None
    part: ShardPart | None = None
    max_tokens: int = 0
    first_task: int = 0
    num_tasks: int = 0
    seed: int = 0
    screening: Screening | None = None  # text and chat
    deduplicate: DeduplicateConfig | None = None  # chat


@dataclass(frozen=True, slots=True)
class PackItem:
    """One output file: the part of the plan that falls into it, its sequences counted from 0, and its documents."""

    index: int
    plan: PackPlan
    documents: dict[str, StoredDocument]
    separators: Separators
    weights: bool
    separator_weight: int
    tokens: Location
    target: Location


def tokenize_items(
    sources: Iterable[tuple[SourceConfig, Literal["text", "chat"]]],
    tokenizer_name: tuple[str, str | None],
    folder: Location,
    max_tokens: int,
    seed: int,
    screening: Screening | None = None,
    deduplicate: DeduplicateConfig | None = None,
) -> list[TokenizeItem]:
    """Cut sources into work items, named by what they read: never by workers, nor by what lies beside it.

    Raises UserError for shards that are missing, empty, truncated or without the columns.
    """
    items: list[TokenizeItem] = []
    base, revision = tokenizer_name
    for s, (source, kind) in enumerate(sources):
        if source.kind == "tasks":
            assert source.num_documents and source.max_tokens_per_document
            for i, first in enumerate(range(0, source.num_documents, TASK_DOCUMENTS_PER_PART)):
                count = min(TASK_DOCUMENTS_PER_PART, source.num_documents - first)
                name = f"source{s:02d}-tasks{i:06d}"
                item = TokenizeItem(
                    name,
                    "tasks",
                    base,
                    revision,
                    folder,
                    None,
                    None,
                    source.max_tokens_per_document,
                    first,
                    count,
                    seed,
                )
                items.append(item)
            continue
        columns = DocumentColumns.of(source, MESSAGES_COLUMN if kind == "chat" else None)
        for part in list_parts(list_shards(source), columns.names):
            name = f"source{s:02d}-{_part_name(part)}"
            item = TokenizeItem(name, kind, base, revision, folder, columns, part, max_tokens)
            items.append(replace(item, screening=screening, deduplicate=deduplicate))
    return items


def source_number(name: str) -> int:
    """The position in the recipe of the source that a work item of this name is a part of."""
    return int(name.split("-")[0].removeprefix("source"))


def _part_name(part: ShardPart) -> str:
    content = (part.shard.location.uri, part.version, part.first_group, part.end_group)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:20]


def tokenize_part(item: TokenizeItem) -> dict[str, Any]:
    """Pass 1: write the token shard of a work item, unless it is there, and return its counts.

    Raises UserError for bad rows and shards, and for a full disk.
    """
    done = read_counts(item.folder, item.name)
    if done is not None:
        return done
    # One Ray task is one core; left alone, every task's tokenizer would start a thread per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(item.base, item.revision)
    if item.kind == "tasks":
        from ultralong_ray.data.tasks import task_documents

        documents = task_documents(tokenizer, item.first_task, item.num_tasks, item.max_tokens, item.seed)
        return write_token_shard(item.folder, item.name, documents, weights=True)
    assert item.part is not None and item.columns is not None
    if item.kind == "chat":
        screen = PartScreen(item.folder, item.name, item.screening, item.deduplicate)
        chats = _tokenize_chats(tokenizer, item.part, item.columns, item.max_tokens, screen)
        return write_token_shard(item.folder, item.name, chats, weights=True)
    documents = read_documents(item.part, item.columns)
    if item.screening is not None:
        documents = PartScreen(item.folder, item.name, item.screening).documents(documents)
    texts = _tokenize_texts(tokenizer, documents)
    return write_token_shard(item.folder, item.name, texts, weights=False)


def _tokenize_texts(tokenizer: Any, documents: Iterable[Document]) -> Iterator[TokenizedDocument]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield from _tokenize_batch(tokenizer, batch)
            batch, characters = [], 0
    yield from _tokenize_batch(tokenizer, batch)


def _tokenize_batch(tokenizer: Any, batch: list[Document]) -> Iterator[TokenizedDocument]:
    if batch:
        for document, ids in zip(batch, encode_batch(tokenizer, [d.text for d in batch]), strict=True):
            yield TokenizedDocument(document.id, document.domain, ids)


def _tokenize_chats(
    tokenizer: Any, part: ShardPart, columns: DocumentColumns, max_tokens: int, screen: PartScreen
) -> Iterator[TokenizedDocument | None]:
    """Samples of a part; None for each that is longer than `max_tokens` or overlaps an evaluation set."""
    check_template(tokenizer)

    def sample(row: dict[str, Any]) -> tuple[list[dict[str, str]], TokenizedDocument]:
        messages = parse_messages(row[columns.text])
        return messages, tokenize_chat(tokenizer, row_id(row, columns), row_domain(row, columns), messages)

    for messages, document in read_checked(part, columns, sample):
        too_long = len(document.input_ids) > max_tokens
        yield document if screen.admits(document.id, document.domain, messages, too_long=too_long) else None
    screen.write()


def pack_file(item: PackItem) -> dict[str, Any]:
    """Pass 2: write one packed file and return {file, sequences, tokens, supervised_tokens}."""
    reader = TokenReader(item.tokens)
    supervised = 0

    def tokens(placement: Placement) -> tuple[Any, Any]:
        return reader.read(item.documents[placement.id], placement.document_start, placement.document_end)

    def counted() -> Iterator[Any]:
        nonlocal supervised
        sequences = fill(
            item.plan, tokens, item.separators, weights=item.weights, separator_weight=item.separator_weight
        )
        for sequence in sequences:
            if sequence.loss_weight is not None:
                supervised += int((sequence.loss_weight > 0).sum())
            yield sequence

    length = item.plan.sequence_length
    try:
        count = write_sequences(item.target / file_name(item.index), counted(), length, item.weights)
    finally:
        reader.close()
    return {"file": item.index, "sequences": count, "tokens": count * length, "supervised_tokens": supervised}
