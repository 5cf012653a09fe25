"""The prepare stages: corpus shards or chat samples in, a folder of packed sequences out.

Two passes over Ray Data, nothing tokenised twice: parts of the corpus become token shards below `<workdir>/tokens/`
(found again by a run that was cut short, and by any recipe over the same corpus); the driver plans from document
lengths alone; then every packed file is written on its own. What a task writes depends on its item only, so the output
is byte-identical for any number of workers and for a run that was cut short.

    plan.json, plan.txt                            see ultralong_ray/data/plan_file.py
    quarantine.jsonl                               see ultralong_ray/data/quarantine.py; only where needed
    manifest.json, documents.parquet, sequences/   see ultralong_ray/packed.py
    report.json                                    plan.json and decoded samples
    holdout.parquet                                see ultralong_ray/data/glimpses.py
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import PrepareConfig, Recipe, SourceConfig
from ultralong_ray.data.fan_out import run_tasks
from ultralong_ray.data.fill import FilePlan
from ultralong_ray.data.glimpses import decoded_meetings, decoded_sample, write_holdout
from ultralong_ray.data.pack import PackPlan, Separators, long_first, plan_concatenated, plan_whole, shuffled, split
from ultralong_ray.data.passes import Kind, PackItem, TokenizeItem, pack_file, tokenize_items, tokenize_part
from ultralong_ray.data.plan_file import plan_text
from ultralong_ray.data.quarantine import write_quarantine
from ultralong_ray.data.sample import (
    Lengths,
    choose_holdout,
    draw,
    sample,
    target_shares,
    whole_copies,
)
from ultralong_ray.data.screening import Screening, read_accounts, report_screening, start_screening
from ultralong_ray.data.sft_mix import select_samples
from ultralong_ray.data.sources import materialise
from ultralong_ray.data.summary import prepare_report, sft_report
from ultralong_ray.data.token_shards import DocumentTable, delete_token_shards, read_document_table
from ultralong_ray.data.tokenize import load_tokenizer, pad_token_id, separator_ids
from ultralong_ray.packed import PackedFile, PackedManifest, chunking, file_name, write_placement_columns
from ultralong_ray.stages import workdir
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import Placement, UserError

log = logging.getLogger(__name__)

TOKENS_PER_FILE = 2**22  # one 4M sequence, or as many shorter ones
# Documents that are not cut do not fill a budget to the last sequence: this share of it is enough.
WHOLE_FILL = 0.95


@dataclass(frozen=True, slots=True)
class Measured:
    """A corpus after the first pass."""

    table: DocumentTable
    quarantine: dict[str, Any]
    shards: tuple[str, ...]  # names of its token shards


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything that is decided before the second pass."""

    measured: Measured
    separators: Separators
    plan: PackPlan
    holdout: NDArray[np.int64]  # rows
    counts: dict[str, Any]  # content of plan.json


def prepare(recipe: Recipe, stage: StageDirectory) -> dict[str, Any]:
    """Run the prepare stage into `stage.location` and return its summary; the caller marks it done.

    Raises UserError for bad shards, too many bad rows, duplicate ids, a corpus too small for the budget, a domain mix
    that names unknown domains, a tokenizer without the separator asked for, a store that does not answer and a full
    disk.
    """
    config, folder = recipe.prepare, stage.location
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision, recipe.storage.options)
    planned = _measure_and_plan(recipe, tokenizer, folder)
    table, plan = planned.measured.table, planned.plan
    weights = config.packing == "whole" or any(table.weighted)
    write_holdout(folder, table, planned.holdout, config.sequence_length)
    where = recipe.cluster.node_label("data")
    _pack(plan, table, planned.separators, folder, weights, 1, len(tokenizer), config.num_workers, where)
    report = {**planned.counts, "samples": decoded_meetings(tokenizer, folder, plan.documents)}
    return _finish(recipe, folder, planned.measured, plan, report)


def plan_only(recipe: Recipe, stage: StageDirectory) -> str:
    """Measure and plan, write plan.json and plan.txt into `stage.location`, and return the text. Nothing is packed.

    The token shards stay, so that the stage itself only packs. Raises UserError as `prepare` does.
    """
    if stage.done:
        return (stage.location / "plan.txt").read_bytes().decode()
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision, recipe.storage.options)
    return plan_text(_measure_and_plan(recipe, tokenizer, stage.location).counts)


def _measure_and_plan(recipe: Recipe, tokenizer: Any, folder: Location) -> Planned:
    config = recipe.prepare
    before, after = separator_ids(tokenizer, config.separator, config.separator_encoding)
    separators = Separators(tuple(before), tuple(after), pad_token_id(tokenizer))
    _clear_output(folder)
    screening = start_screening(recipe.decontaminate, workdir(recipe))
    measured = _tokenize(
        recipe, folder, recipe.corpus.sources, chat=False, max_tokens=0, config=config, screening=screening
    )
    lengths = Lengths.of(measured.table, [source.weight for source in recipe.corpus.sources])
    holdout = choose_holdout(lengths, config)
    plan = _plan(lengths, config, separators, holdout)
    shares = Counter[str]()
    for group, share in zip(lengths.groups, target_shares(lengths, config).tolist(), strict=True):
        shares[group.domain] += share
    ids = [*separators.after, *separators.before]  # as they stand between two documents
    counts = {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        "packing": config.packing,
        "separator": {"mode": config.separator, "ids": ids, "pieces": tokenizer.convert_ids_to_tokens(ids)},
        **prepare_report(measured.table, plan.documents, shares, config.long_above_tokens),
        "quarantine": measured.quarantine,
        **report_screening(screening, read_accounts(measured.table), folder),
        "holdout_documents": len(holdout),
    }
    (folder / "plan.json").write_json(counts)
    (folder / "plan.txt").write_bytes(plan_text(counts).encode())
    return Planned(measured, separators, plan, holdout, counts)


def prepare_sft(recipe: Recipe, stage: StageDirectory) -> dict[str, Any]:
    """Run the SFT prepare stage: render, weigh, draw and pack chat samples whole; returns its summary.

    Raises UserError for bad shards, too many bad rows, duplicate ids, too few samples, and a chat template that is
    missing or cannot be aligned.
    """
    assert recipe.sft is not None
    config, folder = recipe.sft, stage.location
    _clear_output(folder)
    tokenizer = load_tokenizer(recipe.model.base, recipe.model.revision, recipe.storage.options)
    separators = Separators(pad=pad_token_id(tokenizer))
    screening = start_screening(recipe.decontaminate, workdir(recipe))
    measured = _tokenize(
        recipe,
        folder,
        config.sources,
        chat=True,
        max_tokens=config.max_sample_tokens,
        config=recipe.prepare,
        screening=screening,
    )
    selection = select_samples(config, measured.table)
    copies = long_first(selection.copies, config.sequence_length) if config.long_samples_first else selection.copies
    plan = plan_whole(copies, separators, config.sequence_length)
    table, workers, where = measured.table, recipe.prepare.num_workers, recipe.cluster.node_label("data")
    results = _pack(plan, table, separators, folder, True, 0, len(tokenizer), workers, where)
    report = {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        **sft_report(table, plan.documents, selection.too_long, sum(r["supervised_tokens"] for r in results)),
        "sources": selection.sources,
        "quarantine": measured.quarantine,
        **report_screening(screening, selection.accounts, folder),
        "sample": decoded_sample(tokenizer, folder, plan.documents, table),
    }
    return _finish(recipe, folder, measured, plan, report)


def _clear_output(folder: Location) -> None:
    """Remove what a run that was cut short has left, plan included."""
    (folder / "sequences").delete_dir()
    for file in folder.files():
        file.delete_file()


def _tokenize(
    recipe: Recipe,
    folder: Location,
    sources: Sequence[SourceConfig],
    *,
    chat: bool,
    max_tokens: int,
    config: PrepareConfig,
    screening: Screening | None,
) -> Measured:
    """Pass 1: the documents in the order of the sources and their shards, and what was set aside."""
    files = materialise(sources, recipe, chat=chat)
    name = (recipe.model.base, recipe.model.revision)
    shards_folder = workdir(recipe) / "tokens"
    readings: list[tuple[SourceConfig, Kind]] = [(source, "chat" if chat else "text") for source in files]
    deduplicate = recipe.sft.deduplicate if chat and recipe.sft is not None else None
    items, skipped = tokenize_items(readings, name, shards_folder, max_tokens, config.seed, screening, deduplicate)
    log.info("tokenising %d parts of %d sources", len(items), len(sources))
    where = recipe.cluster.node_label("data")
    done = run_tasks(items, tokenize_part, config.num_workers, "tokenised", "parts", where)
    results = {r["name"]: r for r in done}
    quarantine = write_quarantine(folder, files, items, skipped, results)
    if quarantine["bad_rows"] or quarantine["skipped_shards"]:
        line = "set aside %d bad rows of %d, left out %d shards: %s"
        shards = len(quarantine["skipped_shards"])
        log.warning(line, quarantine["bad_rows"], quarantine["rows"], shards, folder / "quarantine.jsonl")
    kept = [item for item in items if "bad_shard" not in results[item.name]]
    shards = [(item.name, results[item.name]["weights"], item.source) for item in kept]
    table = read_document_table(workdir(recipe) / "tokens", shards)
    _check_ids(table, kept)
    return Measured(table, quarantine, tuple(item.name for item in items))


def _check_ids(table: DocumentTable, items: Sequence[TokenizeItem]) -> None:
    """Raises UserError when two documents have one id."""
    repeated = table.repeated()
    if len(repeated):
        parts = [items[s].part for s in table.shard_of(repeated[:5]).tolist()]
        origins = [str(part.shard.location) if part is not None else "the synthetic tasks" for part in parts]
        shown = [f"{name!r} in {origin}" for name, origin in zip(table.ids(repeated[:5]), origins, strict=True)]
        raise UserError(
            f"corpus: {len(repeated)} documents have an id that another one has: {', '.join(shown)}"
            f"{' ...' if len(repeated) > 5 else ''}. Ids must be unique over all sources: set id_column, or rename them"
        )


def _plan(lengths: Lengths, config: PrepareConfig, separators: Separators, held_out: NDArray[np.int64]) -> PackPlan:
    length, count = config.sequence_length, config.num_sequences
    if config.packing == "concatenate":
        copies = sample(lengths, config, len(separators.before), len(separators.after), held_out)
        return plan_concatenated(copies, separators, length, count)
    drawn = draw(lengths, config, separators.tokens, held_out)
    plan = plan_whole(whole_copies(lengths, drawn, count * length), separators, length, count)
    plan = shuffled(plan, config.seed)
    if plan.num_sequences < WHOLE_FILL * count:
        sample(lengths, config, len(separators.before), len(separators.after), held_out)
        raise UserError(
            f"corpus: its documents fill {plan.num_sequences} of the {count} sequences of prepare.token_budget "
            f"{config.token_budget}; lower token_budget or raise prepare.short_keep or prepare.max_repeats"
        )
    return plan


def _pack(
    plan: PackPlan,
    table: DocumentTable,
    separators: Separators,
    folder: Location,
    weights: bool,
    separator_weight: int,
    vocab_size: int,
    num_workers: int | None,
    node_label: dict[str, str],
) -> list[dict[str, Any]]:
    """Pass 2: the packed files, then the manifest and the placements."""
    per_file = max(1, TOKENS_PER_FILE // plan.sequence_length)
    items = [
        PackItem(index, FilePlan.of(part, separators, table), weights, separator_weight, table.folder, folder)
        for index, part in enumerate(split(plan, per_file))
    ]
    log.info("packing %d sequences of %d tokens into %d files", plan.num_sequences, plan.sequence_length, len(items))
    results = run_tasks(items, pack_file, num_workers, "packed", "files", node_label)
    footers = {result["file"]: result["footer_bytes"] for result in results}
    chunk_tokens, rows_per_group = chunking(plan.sequence_length)
    files = tuple(
        PackedFile(file_name(i.index), i.index * per_file, i.plan.plan.num_sequences, footers[i.index]) for i in items
    )
    _write_documents(folder, plan, table)
    manifest = PackedManifest(
        plan.sequence_length, plan.num_sequences, chunk_tokens, rows_per_group, weights, vocab_size, files
    )
    manifest.write(folder)
    return results


def _write_documents(folder: Location, plan: PackPlan, table: DocumentTable) -> None:
    """documents.parquet: the columns of the plan, with ids and domains for row numbers."""
    places = plan.documents
    names = {"id": table.ids(places.row), "domain": [table.domains[d] for d in table.domain[places.row].tolist()]}
    columns = {f.name: getattr(places, f.name) for f in fields(Placement) if f.name not in names}
    write_placement_columns(folder, {**columns, **names})


def _finish(
    recipe: Recipe, folder: Location, measured: Measured, plan: PackPlan, report: dict[str, Any]
) -> dict[str, Any]:
    (folder / "report.json").write_json(report)
    if not recipe.prepare.keep_tokens:
        delete_token_shards(measured.table.folder, measured.shards)
    copies = np.unique(np.stack([plan.documents.row, plan.documents.copy.astype(np.int64)]), axis=1)
    return {
        "sequence_length": plan.sequence_length,
        "num_sequences": plan.num_sequences,
        "tokens": plan.sequence_length * plan.num_sequences,
        "documents": copies.shape[1],
        "bad_rows": measured.quarantine["bad_rows"],
        "skipped_shards": len(measured.quarantine["skipped_shards"]),
    }
