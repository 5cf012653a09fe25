"""A small made-up run on disk: what the stages write, with numbers chosen by the test."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.stages import stage_directory, stages
from ultralong_ray.storage import StageDirectory

LENGTHS = [256, 512, 1024, 4096]
DEPTHS = [0.0, 50.0, 100.0]


def made_recipe(workdir: Path, **evaluate: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "made-run",
            "workdir": str(workdir),
            "model": {
                "base": "models/tiny",
                "original_context_length": 512,
                "base_context_length": 512,
                "target_context_length": 4096,
                "rope": {"scheme": "llama3", "factor": 8.0},
            },
            "corpus": {"sources": [{"kind": "installed"}, {"uri": 'shards/"quoted"/*.jsonl', "domain": "prose"}]},
            "prepare": {
                "sequence_length": 4096,
                "token_budget": 40960,
                "domain_mix": {"code": 0.7, "long prose": 0.3},
            },
            "pretrain": {"global_batch_sequences": 2, "learning_rate": 5e-4},
            "sft": {
                "global_batch_sequences": 1,
                "learning_rate": 3e-5,
                "sources": [{"uri": "sft.jsonl"}],
                "sequence_length": 2048,
                "max_sample_tokens": 1024,
            },
            "evaluate": {
                "models": ["base", "final"],
                "context_lengths": LENGTHS,
                "depths_percent": DEPTHS,
                "samples_per_cell": 5,
                **evaluate,
            },
        }
    )


def made_cell(model: str, length: int, depth: float, num_right: int, answer: str = "12345") -> dict[str, Any]:
    samples = [
        {"prompt_end": "What is the pass key?", "expected": "12345", "answer": answer, "right": index < num_right}
        for index in range(5)
    ]
    return {
        "model": model,
        "context_length_tokens": length,
        "depth_percent": depth,
        "score": num_right / 5,
        "samples": samples,
        "seconds": 0.5,
    }


def made_data_report(text: str = "one document<s>another document") -> dict[str, Any]:
    domain = {
        "documents_before": 100,
        "tokens_before": 50_000,
        "share_before": 0.6,
        "share_asked": 0.7,
        "documents_after": 20,
        "tokens_after": 28_672,
        "share_after": 0.7,
        "long_share_before": 0.2,
        "long_share_after": 0.55,
    }
    return {
        "sequence_length": 4096,
        "num_sequences": 10,
        "tokens": 40_960,
        "separator": {"mode": "<s>", "ids": [28, 83, 30], "pieces": ["<", "s", ">"]},
        "domains": {"code": domain, "<i>prose</i>": {**domain, "share_asked": 0.3, "share_after": 0.3}},
        "length_edges_tokens": [1024, 2048, 4096],
        "histogram_before": {"code": [30_000, 10_000, 5_000, 5_000], "<i>prose</i>": [10_000, 0, 0, 0]},
        "histogram_after": {"code": [5_000, 5_000, 8_000, 10_672], "<i>prose</i>": [12_288, 0, 0, 0]},
        "buckets": [
            {
                "domain": "code",
                "from_tokens": 4096,
                "below_tokens": None,
                "documents_before": 12,
                "tokens_before": 5_000,
                "documents_after": 7,
                "repeats": 2.0,
                "tokens_after": 10_672,
            }
        ],
        "quarantine": {
            "rows": 220,
            "bad_rows": 3,
            "reasons": {"text is <null>": 3},
            "skipped_shards": [{"shard": "a.parquet", "reason": "truncated"}],
        },
        "samples": [{"sequence": 3, "text": text}],
        "holdout_documents": 4,
    }


def made_metrics(num_steps: int, start: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "num_steps": num_steps,
            "loss": start * math.exp(-step / 10),
            "grad_norm": 1.0 / step,
            "learning_rate": 5e-4,
            "tokens": step * 8192,
            "tokens_per_second": 1000.0 + step,
            "step_seconds": 8.0,
            "model_flops_causal": 1e12,
            "hardware_flops": 1.2e12,
            "alst_flops": 2e12,
            "mfu": None,
            "memory_gib": 1.5,
            "epoch": 0,
            "sequence": 2 * step,
        }
        for step in range(1, num_steps + 1)
    ]


def write_json(directory: StageDirectory, relative: str, value: Any) -> None:
    (directory.location / relative).write_json(value)


def write_lines(directory: StageDirectory, relative: str, rows: list[dict[str, Any]]) -> None:
    (directory.location / relative).write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def write_cell(directory: StageDirectory, cell: dict[str, Any]) -> None:
    name = f"cells/{cell['model']}/{cell['context_length_tokens']}-{cell['depth_percent']:g}.json"
    write_json(directory, name, cell)


def directories_of(recipe: Recipe) -> dict[str, StageDirectory]:
    return {name: stage_directory(recipe, name) for name in stages(recipe)}


def write_run(recipe: Recipe) -> dict[str, StageDirectory]:
    """All stages finished: base right to 512 tokens only, final right everywhere but 4 of 5 at (4096, 50 %)."""
    directories = directories_of(recipe)
    write_json(directories["prepare"], "report.json", made_data_report())
    sft = {"samples": 12, "dropped_too_long": 1, "supervised_share": 0.25, "domains": {"general": {"samples": 12}}}
    write_json(directories["prepare_sft"], "report.json", sft)
    write_lines(directories["pretrain"], "metrics.jsonl", made_metrics(5, 4.0))
    write_lines(directories["sft"], "metrics.jsonl", made_metrics(3, 2.0))
    for model in ("base", "final"):
        for length in LENGTHS:
            for depth in DEPTHS:
                right = (5 if length <= 512 else 0) if model == "base" else 4 if (length, depth) == (4096, 50.0) else 5
                write_cell(directories["evaluate"], made_cell(model, length, depth, right))
        loss = [2.0, 2.0, 5.0, 7.0] if model == "base" else [2.0, 1.9, 1.8, 1.7]
        curve = {"model": model, "bucket_end_tokens": [512, 1024, 2048, 4096], "loss": loss, "num_sequences": 4}
        write_json(directories["evaluate"], f"perplexity/{model}.json", curve)
    for name in ("prepare", "prepare_sft", "pretrain", "sft", "export", "evaluate"):
        directories[name].mark_done({"seconds": 1.0})
    return directories


RULER_SECTION = {"kind": "ruler", "names": ["vt", "qa_1"], "context_lengths": [512, 4096], "samples_per_cell": 4}


def made_sample(points: float, answer: str = "an answer") -> dict[str, Any]:
    sample = {"index": 0, "prompt_end": "the end", "prompt_tokens": 500, "expected": ["x"], "metric": "m", "facts": {}}
    return {**sample, "answer": answer, "score": points, "right": points >= 1}


def write_tasks(directory: StageDirectory, points: dict[tuple[str, str, int], list[float] | str | None]) -> None:
    """plan.json, cells and failed.json of {(model, task, length): sample scores, why it failed, or None: missing}."""
    plan, failed = [], {}
    for (model, task, length), scores in points.items():
        file = f"cells/{model}/{task}/{length}-shard0.json"
        place = {"model": model, "task": task, "context_length_tokens": length, "depth_percent": None, "shard": 0}
        plan.append({**place, "section": 0, "first_sample": 0, "num_samples": 4, "tokens": 1, "file": file})
        if isinstance(scores, str):
            failed[file] = scores
        elif scores is not None:
            samples = [made_sample(score) for score in scores]
            mean = sum(scores) / len(scores)
            write_json(
                directory, file, {**place, "score": mean, "samples": samples, "seconds": 1, "settings": {"a": 1}}
            )
    write_json(directory, "plan.json", {"cells": plan})
    write_json(directory, "failed.json", failed)
