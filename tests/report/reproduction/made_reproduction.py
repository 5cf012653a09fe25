"""A made-up reproduction on disk: run folders and trial records as the jobs leave them, with numbers of no meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.report.made_run import made_metrics, made_recipe, made_sample, write_cell, write_json, write_lines
from ultralong_ray.config import Recipe
from ultralong_ray.stages import stage_directory, stages
from ultralong_ray.storage import StageDirectory

WINDOW = 4096
# model -> share of right answers at a length
SKILL: dict[str, Callable[[int], float]] = {
    "base": lambda length: 1.0 if length <= WINDOW else 0.0,
    "pretrained": lambda length: 1.0 if length <= 65536 else 0.5,
    "final": lambda length: 1.0 if length <= 98304 else 0.8,
}
VARIANTS = (
    *("recipe", "separator_none", "separator_bos_eos", "document_mask", "rope_ntk", "rope_linear"),
    *("rope_yarn_with_temperature", "ramp_1_32", "ramp_half_2", "factor_16", "factor_64", "two_steps", "no_upsampling"),
    *("no_short_documents", "tokens_2m", "tokens_4m", "tokens_16m", "tokens_31m", "sft_short", "sft_with_long"),
)


def extension_recipe(
    workdir: Path,
    target: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    models: Sequence[str],
    learning_rate: float = 5e-4,
) -> Recipe:
    made = made_recipe(workdir).model_dump(mode="json", exclude_unset=True)
    made["model"] |= {"original_context_length": WINDOW, "base_context_length": WINDOW}
    made["model"] |= {"target_context_length": target, "rope": {"scheme": "llama3", "factor": target / WINDOW}}
    made["prepare"] |= {"sequence_length": target, "token_budget": 10 * target}
    asked = {"context_lengths": list(lengths), "depths_percent": list(depths), "models": list(models)}
    made["evaluate"] |= asked | {"samples_per_cell": 5, "gpus_per_task": 0.5}
    made["pretrain"] |= {"global_batch_sequences": 2, "learning_rate": learning_rate}
    made["sft"] |= {"global_batch_sequences": 2}
    made["cluster"] = {"num_workers": 2, "gpus_per_worker": 1}
    return Recipe.model_validate(made)


def write_extension(
    folder: Path,
    target: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    tasks: Mapping[str, Sequence[int]],
    models: Sequence[str] = ("base", "pretrained", "final"),
    learning_rate: float = 5e-4,
    words: str = "built in",
) -> Recipe:
    """A finished run: trainings of 5 and 3 steps of 8 s, passkey grid, `tasks` at their lengths, perplexity.

    `words`: what its questions are made from.
    """
    recipe = extension_recipe(folder, target, lengths, depths, models, learning_rate)
    directories = {name: stage_directory(recipe, name) for name in stages(recipe)}
    write_lines(directories["pretrain"], "metrics.jsonl", made_metrics(5, 4.0))
    write_lines(directories["sft"], "metrics.jsonl", made_metrics(3, 2.0))
    write_json(directories["pretrain"], "plan.json", {"prediction": {"cluster": "2 x H200"}})
    environment = {"python": "3.12.3", "packages": {"torch": "2.11.0"}, "git_commit": "abc", "platform": "left out"}
    write_json(directories["report"], "report.json", {"environment": environment})
    write_evaluation(directories["evaluate"], target, lengths, depths, tasks, models, words)
    for name in ("prepare", "prepare_sft", "extend", "pretrain", "sft", "export", "evaluate", "report"):
        write_json(directories[name], "recipe.json", recipe.model_dump(mode="json"))
        directories[name].mark_done({"seconds": 100.0, "num_parameters": 25_698_816})
    return recipe


def write_evaluation(
    stage: StageDirectory,
    target: int,
    lengths: Sequence[int],
    depths: Sequence[float],
    tasks: Mapping[str, Sequence[int]],
    models: Sequence[str],
    words: str = "built in",
) -> None:
    plan: list[dict[str, Any]] = []
    for model in models:
        for length in lengths:
            for depth in depths:
                write_cell(stage, passkey_cell(model, length, depth, round(5 * SKILL[model](length))))
        for number, (task, asked) in enumerate(tasks.items()):
            for length in asked:
                right = round(8 * SKILL[model](length)) - (number + len(model)) % 3
                points = [1.0] * max(right, 0) + [0.0] * (8 - max(right, 0))
                plan.append(write_task(stage, model, task, length, points, words))
        ends = [target * step // 32 for step in range(1, 33)]
        beyond = {"base": 3.0, "pretrained": 0.1, "final": 0.0}[model]
        loss = [2.4 - 0.05 * math.log2(end) + (beyond if end > WINDOW else 0.0) for end in ends]
        curve = {"model": model, "bucket_end_tokens": ends, "loss": loss, "num_sequences": 3}
        write_json(stage, f"perplexity/{model}.json", curve)
    write_json(stage, "plan.json", {"cells": plan})
    write_json(stage, "failed.json", {})


def passkey_cell(model: str, length: int, depth: float, num_right: int) -> dict[str, Any]:
    samples = [{"right": index < num_right} for index in range(5)]
    place = {"model": model, "task": "passkey", "context_length_tokens": length, "depth_percent": depth}
    return {**place, "score": num_right / 5, "samples": samples, "seconds": 1.0}


def write_task(
    stage: StageDirectory, model: str, task: str, length: int, points: list[float], words: str = "built in"
) -> dict[str, Any]:
    """A cell of a benchmark; returns its line of plan.json."""
    file = f"cells/{model}/{task}/{length}-shard0.json"
    place = {"model": model, "task": task, "context_length_tokens": length, "depth_percent": None, "shard": 0}
    made_from = {"words": words} if task.startswith("ruler/") else {}
    samples = [{**made_sample(point), "facts": made_from} for point in points]
    if task.startswith("perplexity/"):
        losses = [{"loss": -math.log(max(point, 1e-6)), "bucket_end_tokens": [length]} for point in points]
        facts = [{**loss, "bucket_loss": [loss["loss"]]} for loss in losses]
        samples = [{**sample, "facts": found} for sample, found in zip(samples, facts, strict=True)]
    write_json(stage, file, {**place, "score": sum(points) / len(points), "samples": samples, "settings": {}})
    return {**place, "section": 0, "first_sample": 0, "num_samples": len(points), "tokens": 1, "file": file}


def trial_record(variant: str, seed: int, beyond: float, *, final: bool = False, shared: str = "") -> dict[str, Any]:
    """As ultralong_ray/tune/results.py writes it. `shared`: the fingerprint of a pretraining that others have too."""
    models = ["pretrained", "final"] if final else ["pretrained"]
    scores = {f"{model}/passkey/{n}": 1.0 if n <= WINDOW else beyond for model in models for n in (WINDOW, 131072)}
    if final:
        scores["pretrained/passkey/131072"] = 0.0
    curve = {"bucket_end_tokens": [WINDOW, 131072], "loss": [2.0, 2.0 - beyond], "num_sequences": 3}
    pretrain = {"fingerprint": shared or f"{variant}-{seed}", "seconds": 50.0, "steps": 30, "tokens": 7_864_320}
    training = {
        "pretrain": pretrain,
        **({"sft": {"fingerprint": f"sft-{variant}-{seed}", "seconds": 20.0}} if final else {}),
    }
    return {
        "trial": f"{variant}-{seed}",
        "status": "done",
        "cause": None,
        "changes": [{"prepare.seed": seed}],
        "values": {"variant": variant, "seed": seed},
        "steps": 30,
        "num_steps": 30,
        "tokens": 7_864_320,
        "loss": 1.5,
        "seconds": 30.0,
        "curve": {"step": [1], "loss": [2.0]},
        "passkey_within_base_window": 1.0,
        "passkey_beyond_base_window": beyond,
        "training": [training],
        "stage_seconds": [{"prepare": 9.0, "pretrain": 50.0, "evaluate": 10.0}],
        "scores": scores,
        "perplexity": [{**curve, "model": model} for model in models],
    }


def write_trials(folder: Path, records: Sequence[dict[str, Any]], search: str = "tune-0123456789ab") -> None:
    trials = folder / search / "trials"
    trials.mkdir(parents=True, exist_ok=True)
    for record in records:
        (trials / f"{record['trial']}.json").write_text(json.dumps(record))
