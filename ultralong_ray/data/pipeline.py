"""The prepare stages: corpus shards or chat samples in, a folder of packed sequences out. The only Ray file of `data`.

Two passes over Ray Data, nothing tokenised twice: parts of the corpus become token shards below `<stage>/tokens/`;
the driver plans from document lengths alone; then every packed file is written on its own. What a task writes depends
on its item only, so the output is byte-identical for any number of workers and for a run that was cut short.

    manifest.json, documents.parquet, sequences/   see ultralong_ray/packed.py
    report.json                                    see ultralong_ray/data/summary.py
    holdout.parquet                                id, domain, input_ids list<int32> [sequence_length]

Read against Ray 2.60: tasks return what the user did wrong as a value, so that no wrapping by Ray Data lies around it.
"""

from __future__ import annotations

import logging
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.config import PrepareConfig, Recipe, SourceConfig
from ultralong_ray.data.pack import PackPlan, Separators, plan_concatenated, plan_whole
from ultralong_ray.data.passes import PackItem, TokenizeItem, pack_file, tokenize_items, tokenize_part
from ultralong_ray.data.sample import choose_holdout, draw, sample, target_shares, whole_copies
from ultralong_ray.data.screening import Screening, read_accounts, report_screening, start_screening
from ultralong_ray.data.sft_mix import select_samples
from ultralong_ray.data.sources import materialise
from ultralong_ray.data.summary import prepare_report, sft_report
from ultralong_ray.data.token_shards import StoredDocument, TokenReader, read_counts, read_index
from ultralong_ray.data.tokenize import load_tokenizer, pad_token_id, separator_ids
from ultralong_ray.packed import PackedFile, PackedManifest, PackedReader, chunking, file_name, write_placements
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import DocumentLength, UserError

log = logging.getLogger(__name__)

TOKENS_PER_FILE = 2**22  # one 4M sequence, or as many shorter ones
PROGRESS_SECONDS = 10.0
# Documents that are not cut do not fill a budget to the last sequence: this share of it is enough.
WHOLE_FILL = 0.95
SAMPLE_TOKENS = 75  # decoded on either side of a separator: about 600 characters of English

Item = TypeVar("Item")


def prepare(recipe: Recipe, stage: StageDirectory) -> dict[str, Any]:
    """Run the prepare stage into `stage.location` and return its summary; the caller marks it done.

    Raises UserError for bad shards and rows, duplicate ids, a corpus too small for the budget, a domain mix that
    names unknown domains, a tokenizer without the separator asked for, and a full disk.
    """
    config, folder = recipe.prepare, stage.location
    _clear_output(folder)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    before, after = separator_ids(tokenizer, config.separator, config.separator_encoding)
    separators = Separators(tuple(before), tuple(after), pad_token_id(tokenizer))
    sources = recipe.corpus.sources
    screening = start_screening(recipe.decontaminate, folder / "tokens" / "benchmarks")
    stored, names = _tokenize(recipe, folder, sources, chat=False, max_tokens=0, config=config, screening=screening)
    lengths = [DocumentLength(d.id, d.domain, d.num_tokens) for d in stored.values()]
    holdout = choose_holdout(lengths, config)
    plan = _plan(lengths, config, separators, {d.id for d in holdout})
    weights = config.packing == "whole" or any(stored[p.id].weighted for p in plan.placements)
    _write_holdout(folder, [stored[d.id] for d in holdout], config.sequence_length)
    _pack(plan, stored, separators, folder, weights, 1, len(tokenizer), config.num_workers)
    report = {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        "separator": _describe_separator(tokenizer, config, separators),
        **prepare_report(lengths, plan.placements, target_shares(lengths, config), config.long_above_tokens),
        "sample": _decoded_sample(tokenizer, folder, plan),
        "holdout_documents": len(holdout),
        **report_screening(screening, read_accounts(folder / "tokens", names), folder),
    }
    return _finish(folder, plan, report)


def prepare_sft(recipe: Recipe, stage: StageDirectory) -> dict[str, Any]:
    """Run the SFT prepare stage: render, weigh, draw and pack chat samples whole; returns its summary.

    Raises UserError for bad shards and rows, duplicate ids, too few samples, and a chat template that is missing or
    cannot be aligned.
    """
    assert recipe.sft is not None
    config, folder = recipe.sft, stage.location
    _clear_output(folder)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision)
    separators = Separators(pad=pad_token_id(tokenizer))
    screening = start_screening(recipe.decontaminate, folder / "tokens" / "benchmarks")
    stored, names = _tokenize(
        recipe,
        folder,
        config.sources,
        chat=True,
        max_tokens=config.max_sample_tokens,
        config=recipe.prepare,
        screening=screening,
    )
    selection = select_samples(config, folder / "tokens", names, stored)
    plan = plan_whole(selection.chosen, separators, config.sequence_length)
    results = _pack(plan, stored, separators, folder, True, 0, len(tokenizer), recipe.prepare.num_workers)
    supervised = sum(r["supervised_tokens"] for r in results)
    report = {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        **sft_report(selection.available, plan.placements, selection.too_long, supervised),
        "sources": selection.sources,
        **report_screening(screening, selection.accounts, folder),
        "sample": _decoded_document(tokenizer, folder, plan),
    }
    return _finish(folder, plan, report)


def _clear_output(folder: Location) -> None:
    """Remove what a run that was cut short has left, but for its token shards, each of which is whole or absent."""
    (folder / "sequences").delete_dir()
    for file in folder.files():
        file.filesystem.delete_file(file.path)


def _tokenize(
    recipe: Recipe,
    folder: Location,
    sources: Sequence[SourceConfig],
    *,
    chat: bool,
    max_tokens: int,
    config: PrepareConfig,
    screening: Screening | None,
) -> tuple[dict[str, StoredDocument], list[str]]:
    """Pass 1. Returns the documents by id, in the order of their names, and the names of all parts."""
    files = materialise(sources, Location.of(recipe.workdir), chat=chat)
    kind = "chat" if chat else "text"
    name = (recipe.model.base, recipe.model.revision)
    items = tokenize_items(
        [(s, kind) for s in files],
        name,
        folder / "tokens",
        max_tokens,
        config.seed,
        screening,
        recipe.sft.deduplicate if chat and recipe.sft is not None else None,
    )
    log.info("tokenising %d parts of %d sources", len(items), len(sources))
    _run(items, tokenize_part, config.num_workers, "tokenised", "parts")
    stored: dict[str, StoredDocument] = {}
    repeated: list[str] = []
    for item in items:
        counts = read_counts(item.folder, item.name)
        assert counts is not None
        for document in read_index(item.folder, item.name, counts["weights"]):
            if document.id in stored:
                repeated.append(f"{document.id!r} in {_origin(item)}")
            stored[document.id] = document
    if repeated:
        raise UserError(
            f"corpus: {len(repeated)} documents have an id that another one has: {', '.join(repeated[:5])}"
            f"{' ...' if len(repeated) > 5 else ''}. Ids must be unique over all sources: set id_column, or rename them"
        )
    return stored, [item.name for item in items]


def _origin(item: TokenizeItem) -> str:
    return str(item.part.shard.location) if item.part is not None else "the synthetic tasks"


def _plan(
    lengths: Sequence[DocumentLength], config: PrepareConfig, separators: Separators, held_out: set[str]
) -> PackPlan:
    length, count = config.sequence_length, config.num_sequences
    if config.packing == "concatenate":
        copies = sample(lengths, config, len(separators.before), len(separators.after), held_out)
        return plan_concatenated(copies, separators, length, count)
    drawn = draw(lengths, config, separators.tokens, held_out)
    plan = plan_whole(whole_copies(drawn, count * length), separators, length, count)
    if plan.num_sequences < WHOLE_FILL * count:
        sample(lengths, config, len(separators.before), len(separators.after), held_out)
        raise UserError(
            f"corpus: its documents fill {plan.num_sequences} of the {count} sequences of prepare.token_budget "
            f"{config.token_budget}; lower token_budget or raise prepare.short_keep or prepare.max_repeats"
        )
    return plan


def _pack(
    plan: PackPlan,
    stored: dict[str, StoredDocument],
    separators: Separators,
    folder: Location,
    weights: bool,
    separator_weight: int,
    vocab_size: int,
    num_workers: int | None,
) -> list[dict[str, Any]]:
    """Pass 2: the packed files, then the manifest and the placements."""
    per_file = max(1, TOKENS_PER_FILE // plan.sequence_length)
    items = []
    for index, part in enumerate(plan.split(per_file)):
        documents = {p.id: stored[p.id] for p in part.placements}
        items.append(PackItem(index, part, documents, separators, weights, separator_weight, folder / "tokens", folder))
    log.info("packing %d sequences of %d tokens into %d files", plan.num_sequences, plan.sequence_length, len(items))
    results = _run(items, pack_file, num_workers, "packed", "files")
    chunk_tokens, rows_per_group = chunking(plan.sequence_length)
    files = tuple(PackedFile(file_name(i.index), i.index * per_file, i.plan.num_sequences) for i in items)
    write_placements(folder, plan.placements)
    manifest = PackedManifest(
        plan.sequence_length, plan.num_sequences, chunk_tokens, rows_per_group, weights, vocab_size, files
    )
    manifest.write(folder)
    return results


def _finish(folder: Location, plan: PackPlan, report: dict[str, Any]) -> dict[str, Any]:
    (folder / "report.json").write_json(report)
    (folder / "tokens").delete_dir()
    documents = len({(p.id, p.copy) for p in plan.placements})
    return {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        "documents": documents,
    }


def _write_holdout(folder: Location, documents: Sequence[StoredDocument], sequence_length: int) -> None:
    """holdout.parquet: the first `sequence_length` tokens of each document, one row group each."""
    schema = pa.schema([("id", pa.string()), ("domain", pa.string()), ("input_ids", pa.list_(pa.int32()))])
    reader = TokenReader(folder / "tokens")
    with (
        (folder / "holdout.parquet").open_for_write() as sink,
        pq.ParquetWriter(sink, schema, compression="zstd") as writer,
    ):
        for document in documents:
            ids, _ = reader.read(document, 0, sequence_length)
            row = {"id": [document.id], "domain": [document.domain], "input_ids": [ids]}
            writer.write_table(pa.table(row, schema=schema))
    reader.close()


def _describe_separator(tokenizer: Any, config: PrepareConfig, separators: Separators) -> dict[str, Any]:
    ids = [*separators.after, *separators.before]  # as they stand between two documents
    return {"mode": config.separator, "ids": ids, "pieces": tokenizer.convert_ids_to_tokens(ids)}


def _decoded_sample(tokenizer: Any, folder: Location, plan: PackPlan) -> dict[str, Any]:
    """Text around a place in the middle of the data where two documents meet."""
    meetings = [p for p in plan.placements if p.start > 0 and p.document_start == 0]
    sequence, position = (
        (meetings[len(meetings) // 2].sequence, meetings[len(meetings) // 2].start) if meetings else (0, 0)
    )
    first = max(0, position - SAMPLE_TOKENS)
    ids, _ = PackedReader(folder).read(sequence, first, position + SAMPLE_TOKENS)
    return {"sequence": sequence, "position": position, "text": tokenizer.decode(ids.tolist())}


def _decoded_document(tokenizer: Any, folder: Location, plan: PackPlan) -> dict[str, Any]:
    """One packed SFT sample as text, and the part of it that is a target."""
    place = plan.placements[len(plan.placements) // 2]
    ids, weight = PackedReader(folder).read(place.sequence, place.start, place.end)
    assert weight is not None
    return {
        "sequence": place.sequence,
        "id": place.id,
        "text": tokenizer.decode(ids.tolist()),
        "targets": tokenizer.decode(ids[weight > 0].tolist()),
    }


def _run(
    items: Sequence[Item],
    work: Callable[[Item], dict[str, Any]],
    num_workers: int | None,
    verb: str,
    unit: str,
) -> list[dict[str, Any]]:
    """`work` on every item as Ray Data tasks of one CPU each; results in the order in which they end.

    Raises UserError as soon as a task reports one; the tasks still running are then dropped.
    """
    import ray.data

    if not items:
        return []

    def task(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": pickle.dumps(work(pickle.loads(row["item"]))), "error": ""}
        except UserError as error:
            return {"result": b"", "error": str(error)}

    workers = None if num_workers is None else min(num_workers, len(items))
    # The executor's own account of each dataset goes to its log files; here our progress lines stand for it.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    shown, context.enable_progress_bars = context.enable_progress_bars, sys.stderr.isatty()
    try:
        rows = [{"item": pickle.dumps(item)} for item in items]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        dataset = dataset.map(task, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=workers))
        return list(_collect(dataset.iter_rows(), len(items), verb, unit))
    finally:
        context.enable_progress_bars = shown


def _collect(rows: Any, total: int, verb: str, unit: str) -> Iterator[dict[str, Any]]:
    """Results as they come, with a log line now and then: share done, rate, time left."""
    started = reported = time.monotonic()
    counts: Counter[str] = Counter()
    for row in rows:
        if row["error"]:
            raise UserError(row["error"])
        result = pickle.loads(row["result"])
        counts.update(done=1, tokens=result["tokens"])
        now = time.monotonic()
        if now - reported >= PROGRESS_SECONDS or counts["done"] == total:
            reported, seconds = now, max(now - started, 1e-9)
            left = seconds / counts["done"] * (total - counts["done"])
            rate = counts["tokens"] / seconds
            line = "%s %d of %d %s, %.1fM tokens, %.2fM tokens/s, %.0f s left"
            log.info(line, verb, counts["done"], total, unit, counts["tokens"] / 1e6, rate / 1e6, left)
        yield result
