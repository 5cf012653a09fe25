"""One part of the reproduction, a recipe's working directory, to one JSON-ready dict without prompts and answers.

A working directory may hold several trainings and several evaluations. The newest evaluation says which training is
meant; other evaluations count for those of their models that are the same, and what is left out is named. Where two of
them asked the same, the newer one counts. Newer is the one that ended later, as its `_SUCCESS.json` says.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.report.evaluation import Cell, grid_means, passkey_facts, perplexity_facts
from ultralong_ray.report.facts import training_facts
from ultralong_ray.report.intervals import interval
from ultralong_ray.report.reading import StageReader
from ultralong_ray.report.reproduction.subjects import SEPARATOR
from ultralong_ray.report.scores import DOCUMENTS, Score, mean_of, read_scores
from ultralong_ray.stages import stage_fingerprint, stage_of_model, stages
from ultralong_ray.storage import SUCCESS_FILE, Location, StageDirectory

STAGES = ("prepare", "prepare_sft", "extend", "pretrain", "sft", "export", "evaluate")
TRAININGS = ("pretrain", "sft")
ON_GPUS = (*TRAININGS, "evaluate")
SCORE_KEYS = (
    "task",
    "context_length_tokens",
    "percent",
    "low",
    "high",
    "interval",
    "num_samples",
    "num_failed_cells",
    "num_missing_samples",
)


@dataclass(frozen=True)
class Finished:
    """A finished stage with the recipe that it ran."""

    directory: StageDirectory
    recipe: Recipe
    ended: float

    @property
    def stage(self) -> str:
        return self.directory.stage

    @property
    def name(self) -> str:
        return self.directory.location.name


def read_part(folder: Path) -> dict[str, Any] | None:
    """Trainings, scores, seconds and GPUs of the run in `folder`; None where no training is finished there."""
    notes: list[str] = []
    finished = sorted(_finished(folder, notes), key=lambda found: found.ended)
    evaluations = [found for found in finished if found.stage == "evaluate"]
    lead = next(reversed(evaluations or [found for found in finished if found.stage in TRAININGS]), None)
    if lead is None:
        return None
    chosen = {found.stage: found for found in finished if _same(found.recipe, lead.recipe, found.stage)}
    chosen.pop("evaluate", None)
    asked = [(found, models) for found in evaluations if (models := _same_models(found.recipe, lead.recipe))]
    model = lead.recipe.model
    window, target = model.base_context_length, model.target_context_length
    readers = [(found, StageReader(found.directory, notes), models) for found, models in asked]
    trainings = {name: _training(StageReader(chosen[name].directory, notes)) for name in TRAININGS if name in chosen}
    counted = [*chosen.values(), *(found for found, _ in asked)]
    notes += _left_out(finished, counted, asked, lead)
    return {
        "recipe": lead.recipe.name,
        "base_window_tokens": window,
        "target_tokens": target,
        "rope": {"scheme": model.rope.scheme, "factor": model.rope.factor},
        "num_parameters": chosen["extend"].directory.summary().get("num_parameters") if "extend" in chosen else None,
        "machine": _machine(folder, chosen),
        "training": {name: training for name, training in trainings.items() if training},
        "stages": _times(counted),
        "gpu_seconds": sum(_seconds(found) * _gpus(found) for found in counted),
        "passkey": _passkey(readers, window),
        "benchmarks": _benchmarks(readers, sorted({window, target})),
        "perplexity": _perplexity(readers),
        "folders": sorted(found.name for found in counted),
        "notes": notes,
    }


def _finished(folder: Path, notes: list[str]) -> Iterable[Finished]:
    for success in sorted(folder.glob(f"*-*/{SUCCESS_FILE}")):
        stage, _, fingerprint = success.parent.name.rpartition("-")
        if stage not in STAGES:
            continue
        directory = StageDirectory(stage, fingerprint, Location.of(success.parent))
        written = StageReader(directory, notes).read_json("recipe.json")
        if written is None:
            continue
        try:
            # a copied file may be as old as its copy
            ended = directory.summary().get("ended") or success.stat().st_mtime
            yield Finished(directory, Recipe.model_validate(written), ended)
        except ValueError as error:  # pydantic's complaint is one
            where = f"{success.parent.name}/recipe.json"
            notes.append(f"{where} is no recipe of this version, its stage is left out ({str(error).splitlines()[0]}).")


def _same(first: Recipe, second: Recipe, stage: str) -> bool:
    """Whether both recipes make the same thing in a stage, by today's fingerprints of both."""
    if stage not in stages(first) or stage not in stages(second):
        return False
    return stage_fingerprint(first, stage) == stage_fingerprint(second, stage)


def _same_models(first: Recipe, second: Recipe) -> list[str]:
    """The models that `first` evaluates and that `second` makes, or takes as its base, as well."""
    assert first.evaluate is not None
    based = first.model.base == second.model.base
    return [
        name
        for name in first.evaluate.models
        if (based if name == "base" else _same(first, second, stage_of_model(first, name)))
    ]


def _training(reader: StageReader) -> dict[str, Any] | None:
    facts = training_facts(reader)
    if facts is None:
        return None
    return {
        "steps": facts["num_steps"],
        "tokens": facts["tokens"],
        "step_seconds": facts["seconds"],
        "step_seconds_median": facts["step_seconds_median"],
        "tokens_per_second_median": facts["tokens_per_second_median"],
        "first_loss": facts["loss_first"],
        "last_loss": facts["loss_last"],
        "mfu_median": facts["mfu_median"],
        "memory_gib_max": facts["memory_gib_max"],
    }


def _left_out(
    finished: list[Finished], counted: list[Finished], asked: list[tuple[Finished, list[str]]], lead: Finished
) -> list[str]:
    """One note of the trainings, and of the evaluated models, that are others than the newest evaluation's."""
    names = [found.name for found in finished if found.stage in TRAININGS and found not in counted]
    same = {found.name: models for found, models in asked}
    for found in finished:
        if found.stage == "evaluate" and found.recipe.evaluate is not None:
            others = [name for name in found.recipe.evaluate.models if name not in same.get(found.name, [])]
            names += [f"{' and '.join(others)} of {found.name}"] if others else []
    return [f"left out, since {lead.name} is newer and of another training: {', '.join(names)}."] if names else []


def _times(finished: Iterable[Finished]) -> dict[str, dict[str, Any]]:
    """Seconds of each stage, start included, and the GPUs that it had. Several evaluations are added up; of their GPUs
    it is the most that one had."""
    times: dict[str, dict[str, Any]] = {}
    for found in finished:
        before = times.get(found.stage, {"seconds": 0.0, "gpus": 0})
        seconds, gpus = before["seconds"] + _seconds(found), max(before["gpus"], _gpus(found))
        times[found.stage] = {"seconds": round(seconds, 1), "gpus": gpus}
    return times


def _gpus(found: Finished) -> int:
    """Whole GPUs. An evaluation that says no number of workers is on those of the training."""
    cluster = found.recipe.cluster
    if found.stage not in ON_GPUS:
        return 0
    if found.stage == "evaluate":
        assert found.recipe.evaluate is not None
        share = found.recipe.evaluate.gpus_per_task
        if share == 0:
            return 0
        if cluster.evaluation_workers is not None:
            return math.ceil(share * cluster.evaluation_workers)
    return math.ceil(cluster.num_workers * cluster.gpus_per_worker)


def _seconds(found: Finished) -> float:
    """A training that was resumed says how long its last submission took; the steps before that are added."""
    summary = found.directory.summary()
    return (summary.get("seconds") or 0.0) + _seconds_before(found, summary.get("resumed_from_step") or 0)


def _seconds_before(found: Finished, step: int) -> float:
    if not step:
        return 0.0
    rows = StageReader(found.directory).read_json_lines("metrics.jsonl")
    return sum(row["step_seconds"] for row in {row["step"]: row for row in rows}.values() if row["step"] <= step)


def _machine(folder: Path, chosen: dict[str, Finished]) -> dict[str, Any]:
    """What the run wrote down of hardware and versions."""
    notes: list[str] = []
    machine: dict[str, Any] = {}
    if "pretrain" in chosen:
        plan = StageReader(chosen["pretrain"].directory, notes).read_json("plan.json") or {}
        machine["cluster"] = (plan.get("prediction") or {}).get("cluster")
    reports = sorted(folder.glob("report-*/report.json"), key=lambda path: path.stat().st_mtime)
    if reports:
        location = Location.of(reports[-1].parent)
        report = StageReader(StageDirectory("report", "", location), notes).read_json("report.json") or {}
        found = report.get("environment") or {}
        machine |= {key: found[key] for key in ("python", "packages", "cpu_cores", "git_commit") if key in found}
    return machine


Readers = list[tuple[Finished, StageReader, list[str]]]


def _passkey(readers: Readers, window: int) -> list[dict[str, Any]]:
    """A grid for each model, set of depths and samples a cell; `scores[row][column]` at depth row, length column.

    Lengths may be of different evaluations. What a newer one did not compute, an older one fills in.
    """
    columns: dict[tuple[str, int, tuple[float, ...]], dict[int, list[Cell | None]]] = defaultdict(dict)
    for found, reader, models in readers:
        if not found.recipe.evaluate or not found.recipe.evaluate.passkey:
            continue
        passkey = passkey_facts(found.recipe, reader)
        for grid in passkey["models"]:
            if grid["model"] not in models or not grid["num_cells"]:
                continue
            known = columns[grid["model"], passkey["samples_per_cell"], tuple(passkey["depths_percent"])]
            for column, length in enumerate(passkey["context_lengths_tokens"]):
                newer = [row[column] for row in grid["cells"]]
                known[length] = [new or old for new, old in zip(newer, known.get(length, newer), strict=True)]
    return [_grid(*key, columns=known, window=window) for key, known in columns.items()]


def _grid(
    model: str, samples_per_cell: int, depths: Sequence[float], columns: dict[int, list[Cell | None]], window: int
) -> dict[str, Any]:
    lengths = sorted(columns)
    rows = [[columns[length][row] for length in lengths] for row in range(len(depths))]
    scores = [[cell and cell["score"] for cell in row] for row in rows]
    means = grid_means(rows, window)
    return {
        "model": model,
        "samples_per_cell": samples_per_cell,
        "num_cells": means["num_cells"],
        "num_cells_all_right": sum(row.count(1.0) for row in scores),
        **{key: means[key] for key in ("mean", "mean_within_base_window", "mean_beyond_base_window")},
        **{key: means[key] for key in ("num_failed", "num_missing")},
        "context_lengths_tokens": lengths,
        "depths_percent": list(depths),
        "scores": scores,
    }


def _perplexity(readers: Readers) -> list[dict[str, Any]]:
    """A curve for each model and each set of buckets; loss in nats per token."""
    curves: dict[tuple[Any, ...], dict[str, Any]] = {}
    for found, reader, models in readers:
        for curve in (perplexity_facts(found.recipe, reader) or {"models": []})["models"]:
            if curve["model"] in models:
                ends = [int(end) for end in curve["bucket_end_tokens"]]
                kept = {"model": curve["model"], "num_sequences": curve["num_sequences"]}
                curves[curve["model"], *ends] = {**kept, "bucket_end_tokens": ends, "loss": curve["loss"]}
    return list(curves.values())


def _benchmarks(readers: Readers, bounds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Scores by model, task and length; means over a suite's tasks by length; means over all lengths to each bound.

    Per cent with 95 % intervals. A mean over lengths says which lengths it is of; task None: over all tasks. What one
    evaluation asked a model of a suite is made from the same texts, `made_from`; no mean is over scores made from
    others.
    """
    scores: dict[tuple[str, str, int, str], Score] = {}
    for _, reader, models in readers:
        own = [score for score in read_scores(reader) if score.model in models]
        texts = _texts(own)
        for score in own:
            key = (score.model, score.task, score.context_length_tokens, texts[_asked_together(score)])
            if score.points or key not in scores:
                scores[key] = score
    found = [(score, made_from) for (*_, made_from), score in scores.items() if score.points]
    by_length: dict[tuple[str, str, int, str], list[Score]] = defaultdict(list)
    to_bound: dict[tuple[str, str, str | None, int, str], list[Score]] = defaultdict(list)
    for score, made_from in found:
        by_length[score.model, score.suite, score.context_length_tokens, made_from].append(score)
        for bound in bounds:
            if score.context_length_tokens <= bound:
                to_bound[score.model, score.suite, None, bound, made_from].append(score)
                to_bound[score.model, score.suite, score.task, bound, made_from].append(score)
    return {
        "scores": [
            {"model": s.model, **{key: facts[key] for key in SCORE_KEYS}, "made_from": made_from}
            for s, made_from in found
            for facts in [s.facts()]
        ],
        "means": [
            {
                "model": model,
                "suite": suite,
                "context_length_tokens": length,
                "made_from": texts,
                **(mean_of(group) or {}),
            }
            for (model, suite, length, texts), group in by_length.items()
        ],
        "means_to": [
            {"model": model, "suite": suite, "task": task, "to_tokens": to, "made_from": texts, **_over_lengths(group)}
            for (model, suite, task, to, texts), group in to_bound.items()
        ],
    }


def _texts(scores: Iterable[Score]) -> dict[tuple[str, str, int], str]:
    """What the samples of one evaluation are made from, as their facts say: "haystack: made up; words: built in"."""
    texts: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    for score in scores:
        texts[_asked_together(score)] |= score.sources
    return {together: SEPARATOR.join(sorted(sources)) for together, sources in texts.items()}


def _asked_together(score: Score) -> tuple[str, str, int]:
    """What a model is asked from the same texts: a suite at all lengths; documents are others at each length."""
    return (score.model, score.suite, score.context_length_tokens if score.suite == DOCUMENTS else 0)


def _over_lengths(group: list[Score]) -> dict[str, Any]:
    """The plain mean over tasks and lengths, each counting once."""
    lengths = sorted({score.context_length_tokens for score in group})
    mean = mean_of(group) or {}
    tasks = len({score.task for score in group})
    if tasks == 1:  # samples that are all right deserve an interval that is not empty
        low, high, kind = interval([points for score in group for points in score.points])
        mean = {**mean, "low": 100 * low, "high": 100 * high, "interval": kind}
    return {**mean, "num_tasks": tasks, "context_lengths_tokens": lengths}
