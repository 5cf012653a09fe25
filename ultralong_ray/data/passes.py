"""The work of one task of either pass: pure functions of a work item, free of Ray.

Pass 1 turns a part of the corpus into a token shard; pass 2 turns the plan of one output file into that file. Both
write the same bytes wherever and however often they run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ultralong_ray.config import DeduplicateConfig, SourceConfig
from ultralong_ray.data.chat import check_template, parse_messages, tokenize_chat
from ultralong_ray.data.corpus import BadShard, ShardPart, SkippedShard, list_parts, list_shards
from ultralong_ray.data.fill import FilePlan, fill
from ultralong_ray.data.pieces import cuts_are_exact, pieces
from ultralong_ray.data.rows import (
    DocumentColumns,
    Quarantine,
    read_checked,
    read_documents,
    read_tokenized,
    row_domain,
    row_id,
)
from ultralong_ray.data.screening import PartScreen, Screening
from ultralong_ray.data.token_shards import TokenReader, read_counts, write_token_shard
from ultralong_ray.data.tokenize import encode_batch, load_tokenizer
from ultralong_ray.packed import file_name, write_sequences
from ultralong_ray.storage import Location
from ultralong_ray.types import Document, IntArray, PackedSequence, TokenizedDocument, UserError

TASK_TOKENS_PER_PART = 2**21  # at most: of synthetic documents
BATCH_CHARACTERS = 2**20  # texts tokenised in one call

Kind = Literal["text", "input_ids", "chat", "tasks"]

# Of the content of a token shard and of what lies beside it. Raised where a kind changes, so that kept shards of the
# others stay of use.
TOKENS_VERSION: dict[Kind, int] = {"text": 2, "input_ids": 2, "chat": 3, "tasks": 2}


@dataclass(frozen=True, slots=True)
class TokenizeItem:
    """One part of a source: a range of a shard, or synthetic documents [first_task, first_task + num_tasks)."""

    name: str
    source: int  # which source of the recipe this is
    kind: Kind
    base: str
    revision: str | None
    folder: Location
    columns: DocumentColumns | None = None
    part: ShardPart | None = None
    skip_bad_shard: bool = False
    max_tokens: int = 0
    first_task: int = 0
    num_tasks: int = 0
    task_mix: tuple[tuple[str, float], ...] = ()  # share of each kind of task; empty: the default
    conversations: bool = False  # tasks as chat samples
    seed: int = 0
    screening: Screening | None = None  # text and chat
    deduplicate: DeduplicateConfig | None = None  # chat


@dataclass(frozen=True, slots=True)
class PackItem:
    """One output file: what stands in it and where its tokens lie."""

    index: int
    plan: FilePlan
    weights: bool
    separator_weight: int
    tokens: Location
    target: Location


@dataclass(slots=True)
class Stopwatch:
    """Seconds of a task by what it was doing."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, since: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since

    def iterate(self, phase: str, values: Iterable[Any]) -> Iterator[Any]:
        """The same values; the time that it takes to get each is counted."""
        iterator = iter(values)
        while True:
            began = time.perf_counter()
            try:
                value = next(iterator)
            except StopIteration:
                self.add(phase, began)
                return
            self.add(phase, began)
            yield value


def tokenize_items(
    sources: Iterable[tuple[SourceConfig, Kind]],
    tokenizer_name: tuple[str, str | None],
    folder: Location,
    max_tokens: int,
    seed: int,
    screening: Screening | None = None,
    deduplicate: DeduplicateConfig | None = None,
) -> tuple[list[TokenizeItem], list[SkippedShard]]:
    """Cut sources, each with how it is read ("text" or "chat"), into work items.

    An item is named by what it reads: never by workers, nor by what lies beside it. Also returns the shards that a
    source asks to leave out. Raises UserError for shards that are missing, empty, truncated or without the columns.
    """
    items: list[TokenizeItem] = []
    skipped: list[SkippedShard] = []
    base, revision = tokenizer_name
    tasks_before = 0  # a second source of tasks goes on where the first one ends: no two documents are the same
    for number, (source, reading) in enumerate(sources):
        if source.kind == "tasks":
            assert source.num_documents and source.max_tokens_per_document
            mix = tuple((source.task_mix or {}).items())
            blank = TokenizeItem("", number, "tasks", base, revision, folder, task_mix=mix, seed=seed)
            blank = dataclasses.replace(blank, conversations=reading == "chat")
            longest = source.max_tokens_per_document
            per_part = max(1, TASK_TOKENS_PER_PART // longest)
            for first in range(0, source.num_documents, per_part):
                count = min(per_part, source.num_documents - first)
                items.append(_named(blank, max_tokens=longest, first_task=tasks_before + first, num_tasks=count))
            tasks_before += source.num_documents
            continue
        columns = DocumentColumns.of(source, source.messages_column if reading == "chat" else None)
        kind = "input_ids" if source.input_ids_column and reading == "text" else reading
        if kind == "input_ids" and screening is not None:
            raise UserError(
                f"corpus source {source.uri}: [decontaminate] compares texts, and this source gives token ids "
                f"(input_ids_column). Give its texts, or leave out [decontaminate]"
            )
        skip = source.on_bad_shard == "skip"
        parts, bad = list_parts(list_shards(source), columns.names, skip)
        skipped += bad
        blank = TokenizeItem("", number, kind, base, revision, folder, columns, None, skip, max_tokens)
        items += [_named(blank, part=part, screening=screening, deduplicate=deduplicate) for part in parts]
    return items, skipped


def _named(item: TokenizeItem, **fields: Any) -> TokenizeItem:
    """The item with these fields and, as its name, a hash of everything that decides its documents."""
    item = dataclasses.replace(item, **fields)
    content = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    for name in ("name", "source", "folder", "skip_bad_shard"):
        del content[name]
    if item.part is not None:
        part = item.part
        content["part"] = (part.shard.location.uri, part.shard.format, part.version, part.start, part.end)
    digest = hashlib.sha256(repr((TOKENS_VERSION[item.kind], sorted(content.items()))).encode()).hexdigest()[:24]
    return dataclasses.replace(item, name=digest)


def tokenize_part(item: TokenizeItem) -> dict[str, Any]:
    """Pass 1: write the token shard of a work item, unless it is there, and return its counts and times.

    A bad shard comes back as {name, bad_shard: reason} where its source asks for that. Raises UserError for bad
    shards otherwise, for a store that does not answer, and for a full disk.
    """
    done = read_counts(item.folder, item.name)
    if done is not None:
        return {**done, "name": item.name, "seconds": {}}
    # One Ray task is one core; left alone, every task's tokenizer would start a thread per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(item.base, item.revision, item.folder.options)
    watch, began = Stopwatch(), time.perf_counter()
    quarantine = Quarantine(item.part) if item.part is not None else None
    try:
        documents = _documents(item, tokenizer, quarantine, watch)
        weights = item.kind in ("chat", "tasks")
        counts = write_token_shard(item.folder, item.name, documents, weights, quarantine)
    except BadShard as error:
        if not item.skip_bad_shard:
            raise
        return {"name": item.name, "bad_shard": str(error), "tokens": 0, "seconds": watch.seconds}
    total = time.perf_counter() - began
    watch.seconds["write"] = total - sum(watch.seconds.values())
    return {**counts, "name": item.name, "seconds": watch.seconds}


def _documents(
    item: TokenizeItem, tokenizer: Any, quarantine: Quarantine | None, watch: Stopwatch
) -> Iterator[TokenizedDocument | None]:
    """The tokenised documents of an item; None for each that is left out."""
    if item.kind == "tasks":
        from ultralong_ray.data.tasks import task_documents

        made = (item.first_task, item.num_tasks, item.max_tokens, item.seed, dict(item.task_mix))
        return watch.iterate("make", task_documents(tokenizer, *made, conversations=item.conversations))
    assert item.part is not None and item.columns is not None and quarantine is not None
    if item.kind == "chat":
        screen = PartScreen(item.folder, item.name, item.screening, item.deduplicate)
        samples = _tokenize_chats(tokenizer, item.part, item.columns, item.max_tokens, quarantine, screen)
        return watch.iterate("read and tokenise", samples)
    if item.kind == "input_ids":
        return watch.iterate("read", read_tokenized(item.part, item.columns, len(tokenizer), quarantine))
    texts: Iterable[Document] = read_documents(item.part, item.columns, quarantine)
    if item.screening is not None:
        texts = PartScreen(item.folder, item.name, item.screening).documents(texts)
    documents = watch.iterate("read" if item.screening is None else "read and screen", texts)
    return _tokenize_texts(tokenizer, documents, watch)


def _tokenize_texts(tokenizer: Any, documents: Iterable[Document], watch: Stopwatch) -> Iterator[TokenizedDocument]:
    """Documents in their order, in calls of about `BATCH_CHARACTERS`; a longer text goes in pieces."""
    exact = cuts_are_exact(tokenizer)
    batch: list[tuple[str, Document | None]] = []  # a piece, and the document that ends with it
    parts: list[IntArray] = []  # of the document that has not come to its end
    characters = 0

    def encoded() -> Iterator[TokenizedDocument]:
        nonlocal parts
        began = time.perf_counter()
        ids = encode_batch(tokenizer, [text for text, _ in batch])
        watch.add("tokenise", began)
        for (_, document), piece in zip(batch, ids, strict=True):
            parts.append(piece)
            if document is not None:
                whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
                parts = []
                yield TokenizedDocument(document.id, document.domain, whole)

    for document in documents:
        left = len(document.text)
        for piece in pieces(document.text, exact=exact):
            left -= len(piece)
            characters += len(piece)
            batch.append((piece, document if left == 0 else None))
            if characters >= BATCH_CHARACTERS:
                yield from encoded()
                batch, characters = [], 0
    if batch:
        yield from encoded()


def _tokenize_chats(
    tokenizer: Any,
    part: ShardPart,
    columns: DocumentColumns,
    max_tokens: int,
    quarantine: Quarantine,
    screen: PartScreen,
) -> Iterator[TokenizedDocument | None]:
    """Samples of a part; None for each that is longer than `max_tokens` or overlaps an evaluation set."""
    check_template(tokenizer)
    columns = columns.for_part(part)

    def sample(row: dict[str, Any]) -> tuple[list[dict[str, str]], TokenizedDocument]:
        messages = parse_messages(row[columns.text])
        return messages, tokenize_chat(tokenizer, row_id(row, columns), row_domain(row, columns), messages)

    for messages, document in read_checked(part, columns, sample, quarantine):
        too_long = len(document.input_ids) > max_tokens
        yield document if screen.admits(document.id, document.domain, messages, too_long=too_long) else None
    screen.write()


def pack_file(item: PackItem) -> dict[str, Any]:
    """Pass 2: write one packed file and return {file, sequences, tokens, supervised_tokens, footer_bytes, seconds}."""
    watch, began = Stopwatch(), time.perf_counter()
    reader = TokenReader(item.tokens)
    try:
        ids, weights = fill(item.plan, reader, weights=item.weights, separator_weight=item.separator_weight)
    finally:
        reader.close()
    watch.add("fill", began)
    began = time.perf_counter()
    sequences = (PackedSequence(i, row, None if weights is None else weights[i]) for i, row in enumerate(ids))
    target = item.target / file_name(item.index)
    footer = write_sequences(target, sequences, ids.shape[1], weights is not None)
    watch.add("write", began)
    return {
        "file": item.index,
        "sequences": len(ids),
        "tokens": ids.size,
        "supervised_tokens": 0 if weights is None else int(np.count_nonzero(weights)),
        "footer_bytes": footer,
        "seconds": watch.seconds,
    }
