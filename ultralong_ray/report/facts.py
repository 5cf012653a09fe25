"""Files of finished stages -> one JSON-ready dict that holds every number of the page and names the file of each.

The dict is report.json. Sections whose stage is absent, unfinished or without its file are None; `notes` says why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.report.evaluation import evaluation_facts, verdict
from ultralong_ray.report.reading import StageReader, finite, guarded, json_safe
from ultralong_ray.report.tuning import tuning_facts
from ultralong_ray.stages import inputs
from ultralong_ray.storage import SUCCESS_FILE, StageDirectory

STAGES_READ = ("prepare", "prepare_sft", "pretrain", "sft", "export", "evaluate")
PACKAGES = ("ultralong_ray", "torch", "ray", "transformers", "deepspeed", "tokenizers", "pyarrow", "numpy")
# What the page asks of the two data reports; a key that a report lacks is shown as not known.
DATA_KEYS = (
    *("sequence_length", "num_sequences", "tokens", "separator", "domains", "buckets", "samples"),
    *("quarantine", "holdout_documents", "decontamination"),
)
SFT_DATA_KEYS = (
    *("samples", "dropped_too_long", "supervised_share", "domains", "quarantine", "sample"),
    *("sources", "decontamination"),
)
CURVES = ("step", "loss", "learning_rate", "grad_norm", "tokens_per_second")


def run_facts(recipe: Recipe, directories: dict[str, StageDirectory]) -> dict[str, Any]:
    """Everything that the page shows. `directories` by stage name; any of them may be absent or unfinished."""
    notes: list[str] = []
    readers = _finished_readers(recipe, directories, notes)
    evaluation: dict[str, Any] = {"passkey": None, "perplexity": None, "benchmarks": None}
    if (reader := readers.get("evaluate")) is not None and recipe.evaluate is not None:
        evaluation = evaluation_facts(recipe, reader)
    facts = {
        "name": recipe.name,
        "model": _model_facts(recipe),
        "verdict": verdict(evaluation["passkey"], evaluation["benchmarks"]),
        **evaluation,
        "training": {
            name: guarded(notes, f"Training of {name}", training_facts, readers.get(name))
            for name in ("pretrain", "sft")
        },
        "tuning": guarded(notes, "Trials", tuning_facts, recipe, notes),
        "data": guarded(notes, "Data", _data_facts, readers.get("prepare")),
        "sft_data": guarded(notes, "Data of the fine-tuning", _sft_data_facts, readers.get("prepare_sft")),
        "export": _export_facts(readers.get("export")),
        "stages": [_stage_facts(reader) for reader in readers.values()],
        "recipe": recipe.model_dump(mode="json"),
        "environment": environment(),
        "notes": notes,
    }
    return json_safe(facts)


def _finished_readers(
    recipe: Recipe, directories: dict[str, StageDirectory], notes: list[str]
) -> dict[str, StageReader]:
    """Readers of the finished stages; a stage of this recipe that is not finished gets a note."""
    readers = {}
    wanted = {*inputs(recipe, "report"), *(["prepare_sft"] if recipe.sft is not None else []), *directories}
    for name in STAGES_READ:
        directory = directories.get(name)
        if directory is not None and directory.done:
            readers[name] = StageReader(directory, notes)
        elif name in wanted:
            where = f" ({directory.location.name} has no {SUCCESS_FILE})" if directory is not None else ""
            notes.append(f"Stage {name} has not been run to its end{where}, so its part of this report is empty.")
    return readers


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    return {
        "base": model.base,
        "base_context_length_tokens": model.base_context_length,
        "target_context_length_tokens": model.target_context_length,
        "times_longer": model.target_context_length / model.base_context_length,
        "rope_scheme": model.rope.scheme,
        "rope_factor": model.rope.factor,
        "rope_original_context_length_tokens": model.original_context_length,
    }


def _stage_facts(reader: StageReader) -> dict[str, Any]:
    directory = reader.directory
    return {
        "stage": directory.stage,
        "fingerprint": directory.fingerprint,
        "location": directory.location.uri,
        "summary": reader.read_json(SUCCESS_FILE) or {},
        "file": reader.name(SUCCESS_FILE),
    }


def training_facts(reader: StageReader | None) -> dict[str, Any] | None:
    """Curves and totals of `metrics.jsonl`; a step logged twice (a resumed run) counts as logged last."""
    rows = [] if reader is None else reader.read_json_lines("metrics.jsonl")
    by_step = {int(step): row for row in rows if (step := finite(row.get("step"))) is not None}
    if reader is None or not by_step:
        return None
    ordered = [by_step[step] for step in sorted(by_step)]

    def column(name: str) -> list[float | None]:
        return [finite(row.get(name)) for row in ordered]

    def known(name: str) -> list[float]:
        return [value for value in column(name) if value is not None]

    loss = column("loss")
    return {
        "file": reader.name("metrics.jsonl"),
        "num_steps": len(ordered),
        "num_steps_planned": finite(ordered[-1].get("num_steps")),
        "tokens": finite(ordered[-1].get("tokens")),
        "loss_first": loss[0],
        "loss_last": loss[-1],
        "num_losses_not_finite": loss.count(None),
        "seconds": sum(known("step_seconds")) or None,
        "tokens_per_second_median": _median(known("tokens_per_second")),
        "step_seconds_median": _median(known("step_seconds")),
        "mfu_median": _median(known("mfu")),
        "memory_gib_max": max(known("memory_gib"), default=None),
        "grad_norm_max": max(known("grad_norm"), default=None),
        "curves": {name: column(name) for name in CURVES},
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _data_facts(reader: StageReader | None) -> dict[str, Any] | None:
    """The prepare stage's own report, with the shares of tokens per length bucket that the charts show."""
    value = None if reader is None else reader.read_json("report.json")
    if reader is None or value is None:
        return None
    before, after = value.get("histogram_before") or {}, value.get("histogram_after") or {}
    edges = [int(edge) for edge in value.get("length_edges_tokens") or []]
    domains = list(dict.fromkeys([*before, *after]))
    both = bool(before and after)
    charts = [{"domain": None, **_bucket_shares(_total(before), _total(after))}] if both else []
    if both and len(domains) > 1:
        charts += [{"domain": d, **_bucket_shares(before.get(d) or [], after.get(d) or [])} for d in domains]
    num_buckets = max((len(chart["before"]) for chart in charts), default=0)
    return {
        **dict.fromkeys(DATA_KEYS),
        **value,
        "file": reader.name("report.json"),
        "bucket_bounds_tokens": _bucket_bounds(edges, num_buckets),
        "bucket_shares": charts,
    }


def _total(histogram: dict[str, list[float]]) -> list[float]:
    """Tokens per bucket over all domains."""
    return [sum(column) for column in zip(*histogram.values(), strict=False)]


def _bucket_shares(before: list[float], after: list[float]) -> dict[str, list[float]]:
    """Tokens per bucket as shares of all tokens of that histogram."""
    return {
        name: [count / total if (total := sum(counts)) else 0.0 for count in counts]
        for name, counts in (("before", before), ("after", after))
    }


def _bucket_bounds(edges: list[int], num_buckets: int) -> list[list[int | None]]:
    """[lower, upper) of each bucket in tokens. One bucket more than edges means that both ends are open."""
    bounds: list[int | None] = [*edges]
    if num_buckets > len(edges) - 1:
        bounds.append(None)
    if num_buckets > len(edges):
        bounds.insert(0, None)
    return [list(pair) for pair in pairwise(bounds)][:num_buckets]


def _sft_data_facts(reader: StageReader | None) -> dict[str, Any] | None:
    value = None if reader is None else reader.read_json("report.json")
    if reader is None or value is None:
        return None
    return {**dict.fromkeys(SFT_DATA_KEYS), **value, "file": reader.name("report.json")}


def _export_facts(reader: StageReader | None) -> dict[str, Any] | None:
    """Where the final Hugging Face folder is, and what the export recorded about it."""
    summary = None if reader is None else reader.read_json(SUCCESS_FILE)
    if reader is None or summary is None:
        return None
    named = summary.get("model")
    folder = named if isinstance(named, str) else (reader.directory.location / "model").uri
    return {"model": folder, "file": reader.name(SUCCESS_FILE)}


def environment() -> dict[str, Any]:
    """The machine and the versions that wrote the report."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """GIT_COMMIT where it is set (a Ray job's working directory carries no .git), else the checkout's HEAD, else None.

    "-dirty" marks tracked files that differ from the commit.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    checkout = Path(__file__).resolve().parents[2]
    # Only the project's own checkout counts: an installed package may lie inside somebody else's repository.
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
