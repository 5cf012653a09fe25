"""Scores to tables, one part per suite of benchmarks: JSON-ready, the only place where means over tasks are taken.

In go the scores of one evaluation; out comes a list of suites. A suite has for every model a table of tasks x columns
(context lengths; for LV-Eval its levels), the mean of every column, and a summary row in the columns of the published
tables, which stand beside it with their source.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ultralong_ray.report.published import (
    LVEVAL_BOUNDS,
    RULER_BOUNDS,
    RULER_FIRST,
    STANDARD,
    published,
    published_by_length,
)
from ultralong_ray.report.scores import DOCUMENTS, Score, mean_loss, mean_of
from ultralong_ray.report.words import short_tokens
from ultralong_ray.types import stand_ins

TITLES = {
    "ruler": "RULER",
    "lveval": "LV-Eval",
    "infinitebench": "InfiniteBench",
    "niah": "Needle sentences",
    "multiround": "Multi-round retrieval",
    "manyshot": "Many-shot classification",
    "retrieved": "Retrieval-augmented questions",
    "short_skills": "Short skills",
    "perplexity": "Loss on documents",
    "standard": "Standard tests",
}
NUM_TASKS = {"ruler": 13, "lveval": 11, "infinitebench": 12}  # of the whole benchmark, as published means have them
EFFECTIVE_PERCENT = 85.6  # RULER: the longest length at or above it counts as effective
Column = int | str
Mean = dict[str, Any] | None


def benchmark_facts(
    scores: Sequence[Score], models: Sequence[str], labels: dict[str, str], base_window_tokens: int
) -> list[dict[str, Any]]:
    """One dict a suite, in the order of TITLES. `models` in the order of the page."""
    suites = [*TITLES, *sorted({score.suite for score in scores} - set(TITLES))]
    found = [(suite, [score for score in scores if score.suite == suite]) for suite in suites]
    return [
        {**_suite(suite, own, models, labels), "grids": depth_grids(own, labels, base_window_tokens)}
        for suite, own in found
        if own
    ]


def _suite(suite: str, scores: list[Score], models: Sequence[str], labels: dict[str, str]) -> dict[str, Any]:
    columns = list(dict.fromkeys(_column(score) for score in sorted(scores, key=_column_order)))
    order = [*models, *sorted({score.model for score in scores} - set(models))]
    tables = [
        _model_table(suite, model, labels.get(model, model), [s for s in scores if s.model == model], columns)
        for model in order
        if any(score.model == model for score in scores)
    ]
    counts = [len(score.points) for score in scores]
    return {
        "suite": suite,
        "title": TITLES.get(suite, suite),
        "unit": "nats per token, lower is better" if suite == DOCUMENTS else "per cent",
        "columns": [short_tokens(column) if isinstance(column, int) else column for column in columns],
        "models": tables,
        "published": published(suite),
        "published_by_length": published_by_length() if suite == "ruler" else [],
        "summary_columns": list(dict.fromkeys(name for table in tables for name in table["summary"])),
        "samples_per_score": sorted({min(counts), max(counts)}),
        "limits": sorted({limit for score in scores if (limit := score.settings.get("section", {}).get("limit"))}),
        "strict": {
            labels.get(score.model, score.model): score.strict_percent
            for score in scores
            if score.strict_percent is not None
        },
        "settings": list({str(score.settings): score.settings for score in scores if score.settings}.values()),
        "sources": sorted(sources := {source for score in scores for source in score.sources}),
        "stand_ins": stand_ins(sources),
        "mixed_sources": mixed_sources(scores),
    }


def _column(score: Score) -> Column:
    """LV-Eval's levels count words, so that one window holds several of them; elsewhere the context length."""
    if score.suite == "lveval":
        level = score.task.rpartition("_")[2]
        return f"{level}, window {short_tokens(score.context_length_tokens)}"
    # the prompts of standard tests are as long as their questions
    return score.context_length_tokens or "score"


def _column_order(score: Score) -> tuple[int, int]:
    level = score.task.rpartition("_")[2].removesuffix("k") if score.suite == "lveval" else ""
    return (int(level) if level.isdecimal() else 0, score.context_length_tokens)


def _name(score: Score) -> str:
    name = score.task.split("/", 1)[1]
    return name.rpartition("_")[0] if score.suite == "lveval" else name


def _model_table(suite: str, model: str, label: str, scores: list[Score], columns: list[Column]) -> dict[str, Any]:
    """`rows[i]["scores"][j]` of task i in column j, None where it was not asked."""
    placed = {(_name(score), _column(score)): score for score in scores}
    names = list(dict.fromkeys(_name(score) for score in scores))
    means: list[Mean] = []
    for column in columns:
        asked = [placed[name, column] for name in names if (name, column) in placed]
        means.append(mean_of(asked))
    return {
        "model": model,
        "label": label,
        "rows": [
            {
                "name": name,
                "scores": [placed[name, column].facts() if (name, column) in placed else None for column in columns],
            }
            for name in names
        ],
        "means": means,
        "cumulative": _cumulative(means) if suite == "ruler" else None,
        "effective_tokens": _effective(columns, means) if suite == "ruler" else None,
        "summary": _SUMMARIES.get(suite, _plain_summary)(columns, placed, means),
        "num_failed_cells": sum(len(score.failed) for score in scores),
        "num_empty_answers": sum(score.num_empty for score in scores),
        "num_cut_answers": sum(score.num_cut for score in scores),
        "num_missing_samples": sum(score.num_missing for score in scores),
    }


def _cumulative(means: list[Mean]) -> list[float | None]:
    """Plain mean of the columns up to and with each; None from the first that is not there."""
    percents = [None if mean is None else mean["percent"] for mean in means]
    sums = accumulate(percents, lambda a, b: None if a is None or b is None else a + b)
    return [None if total is None else total / count for count, total in enumerate(sums, start=1)]


def _effective(columns: list[Column], means: list[Mean]) -> int | None:
    """Of lengths at which all tasks were asked: a few easy ones say nothing about the others."""
    whole = [_of_all_tasks("ruler", mean) for mean in means]
    reached = [c for c, mean in zip(columns, whole, strict=True) if mean and mean["percent"] >= EFFECTIVE_PERCENT]
    return max((c for c in reached if isinstance(c, int)), default=None)


Placed = dict[tuple[str, Column], Score]
Summary = dict[str, Any]


def _ruler_summary(columns: list[Column], placed: Placed, means: list[Mean]) -> Summary:
    """The paper's columns: 4K, 8K, ... to the bound, each length counting once; None unless all was measured."""
    by_length = dict(zip(columns, means, strict=True))
    summary: Summary = {}
    for name, bound in RULER_BOUNDS.items():
        lengths = [RULER_FIRST << k for k in range((bound // RULER_FIRST).bit_length())]
        summary[name] = _mean_of_columns([_of_all_tasks("ruler", by_length.get(length)) for length in lengths])
    summary["mean of the lengths asked"] = _mean_of_columns(means)
    return summary


def _lveval_summary(columns: list[Column], placed: Placed, means: list[Mean]) -> Summary:
    """Mean over levels of the means over sets. With several windows the longest counts."""
    longest = {str(column).partition(",")[0]: mean for column, mean in zip(columns, means, strict=True)}
    summary: Summary = {
        name: _mean_of_columns([_of_all_tasks("lveval", longest.get(level)) for level in levels])
        for name, levels in LVEVAL_BOUNDS.items()
    }
    summary["mean of the levels asked"] = _mean_of_columns(means)
    return summary


def _infinitebench_summary(columns: list[Column], placed: Placed, means: list[Mean]) -> Summary:
    """The mean of all twelve tasks, at the longest window, is what the paper prints."""
    return {"mean": _of_all_tasks("infinitebench", means[-1]), "mean of the tasks asked": _mean_of_columns(means)}


def _standard_summary(columns: list[Column], placed: Placed, means: list[Mean]) -> Summary:
    found = {name: next((placed[name, c] for c in columns if (name, c) in placed), None) for name in STANDARD}
    summary: Summary = {STANDARD[name]: score.facts() if score else None for name, score in found.items()}
    return {**summary, "mean": mean_of(found.values())}


def _plain_summary(columns: list[Column], placed: Placed, means: list[Mean]) -> Summary:
    return {"mean": _mean_of_columns(means)}


_SUMMARIES: dict[str, Callable[[list[Column], Placed, list[Mean]], Summary]] = {
    "ruler": _ruler_summary,
    "lveval": _lveval_summary,
    "infinitebench": _infinitebench_summary,
    "standard": _standard_summary,
}


def _of_all_tasks(suite: str, mean: Mean) -> Mean:
    """A column's mean where it is over the whole benchmark, as published ones are; None where tasks are not in it."""
    return mean if mean is not None and mean["num_tasks"] == NUM_TASKS[suite] else None


def _mean_of_columns(means: Sequence[Mean]) -> Mean:
    """Plain mean over columns, None unless every one is there."""
    if not means or any(mean is None for mean in means):
        return None
    found = [mean for mean in means if mean is not None]
    percent = sum(mean["percent"] for mean in found) / len(found)
    return {"percent": percent, "num_columns": len(found), **mean_loss(found)}


def depth_grids(scores: Sequence[Score], labels: dict[str, str], window: int) -> list[dict[str, Any]]:
    """Length x depth grids of tasks that have depths, in the form of the passkey grid."""
    found = []
    for model, task in dict.fromkeys((score.model, score.task) for score in scores if score.by_depth):
        own = {score.context_length_tokens: score for score in scores if (score.model, score.task) == (model, task)}
        lengths, depths = sorted(own), sorted({depth for score in own.values() for depth in score.by_depth})
        cells = [[_grid_cell(own[length].by_depth.get(depth)) for length in lengths] for depth in depths]
        means = {length: sum(own[length].points) / len(own[length].points) for length in lengths if own[length].points}
        within = [mean for length, mean in means.items() if length <= window]
        beyond = [mean for length, mean in means.items() if length > window]
        found.append(
            {
                "model": model,
                "task": task,
                "label": labels.get(model, model),
                "base_window_tokens": window,
                "context_lengths_tokens": lengths,
                "depths_percent": depths,
                "cells": cells,
                "mean": _mean(list(means.values())),
                "mean_within_base_window": _mean(within),
                "mean_beyond_base_window": _mean(beyond),
            }
        )
    return found


def _grid_cell(points: list[float] | None) -> dict[str, Any] | None:
    if not points:
        return None
    right = sum(point >= 1 for point in points)
    return {"score": sum(points) / len(points), "num_right": right, "num_samples": len(points)}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def mixed_sources(scores: Sequence[Score]) -> list[str]:
    """In what samples of one task differ, so that not all were asked the same: "words: built in, wonderwords 2.2.0"."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for score in scores:
        for source in score.sources:
            kind, _, value = source.partition(": ")
            found[score.task, kind].add(value)
    return sorted({f"{kind}: {', '.join(sorted(v))}" for (_, kind), v in found.items() if len(v) > 1})


def failed_cells(scores: Sequence[Score]) -> list[dict[str, str]]:
    """Every cell that failed, and why."""
    return [
        {"model": score.model, "task": score.task, "file": file, "reason": reason}
        for score in scores
        for file, reason in score.failed.items()
    ]
