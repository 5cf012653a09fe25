"""What the evaluate stage found: `cells/**.json`, `failed.json` and `perplexity/*.json` in, one JSON-ready dict out.

A cell that failed counts 0, as `failed.json` says why. A cell that was asked for and is simply not there stays None all
the way to the page; it is left out of means, never counted as 0.
"""

from __future__ import annotations

import math
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.report.benchmarks import benchmark_facts, failed_cells
from ultralong_ray.report.intervals import ALIKE_WORDS
from ultralong_ray.report.intervals import WORDS as INTERVAL_WORDS
from ultralong_ray.report.reading import StageReader, finite, guarded, json_safe
from ultralong_ray.report.scores import FAILED_ARE, FAILED_FILE, PLAN_FILE, is_cut_short, is_empty, read_scores
from ultralong_ray.report.words import UNIT, percent, tokens

LABELS = {
    "base": "Base model",
    "extended": "Extended, not trained",
    "pretrained": "After continued pretraining",
    "final": "Final model",
}

SUBJECTS = {
    "final": "The final model",
    "pretrained": "The model after continued pretraining",
    "extended": "The extended model, not yet trained,",
}

Cell = dict[str, Any]


def evaluation_facts(recipe: Recipe, reader: StageReader) -> dict[str, Any]:
    """Keys passkey, perplexity, benchmarks, each a dict or None; every cell and curve names its file."""
    assert recipe.evaluate is not None
    notes, models = reader.notes, list(recipe.evaluate.models)
    grid = guarded(notes, "Passkey grid", passkey_facts, recipe, reader) if recipe.evaluate.passkey else None
    return {
        "passkey": grid,
        "perplexity": guarded(notes, "Perplexity", perplexity_facts, recipe, reader),
        "benchmarks": guarded(notes, "Benchmarks", _benchmarks, recipe, models, reader),
    }


def _benchmarks(recipe: Recipe, models: list[str], reader: StageReader) -> dict[str, Any] | None:
    """Tables by suite, what failed, and how to read both; None without [[evaluate.tasks]]."""
    scores = read_scores(reader)
    if not scores:
        return None
    return {
        "intervals_are": f"{INTERVAL_WORDS}; {ALIKE_WORDS}",
        "failed_are": FAILED_ARE,
        "suites": benchmark_facts(scores, models, LABELS, recipe.model.base_context_length),
        "failed_cells": failed_cells(scores),
    }


def passkey_facts(recipe: Recipe, reader: StageReader) -> dict[str, Any]:
    """Grids by model: `cells[row][column]` at depth `depths_percent[row]`, `context_lengths_tokens[column]`."""
    assert recipe.evaluate is not None
    cells = _read_cells(reader) | _failed_cells(reader)
    lengths = sorted({*recipe.evaluate.context_lengths, *(length for _, length, _ in cells)})
    depths = sorted({*recipe.evaluate.depths_percent, *(depth for _, _, depth in cells)})
    models = [*recipe.evaluate.models, *sorted({m for m, _, _ in cells} - set(recipe.evaluate.models))]
    window = recipe.model.base_context_length
    grids = []
    for model in models:
        rows = [[cells.get((model, length, depth)) for length in lengths] for depth in depths]
        grids.append({"model": model, "label": LABELS.get(model, model), "cells": rows, **grid_means(rows, window)})
    return {
        "base_window_tokens": window,
        "context_lengths_tokens": lengths,
        "depths_percent": depths,
        "samples_per_cell": recipe.evaluate.samples_per_cell,
        "means_are": "mean of cell scores, every cell counting once, failed cells as 0, missing cells left out",
        "models": grids,
    }


def _read_cells(reader: StageReader) -> dict[tuple[str, int, float], Cell]:
    """(model, context length in tokens, depth in per cent) -> cell. Content counts, not the name of the file."""
    cells = {}
    for name in reader.relative_names("cells"):
        value = reader.read_json(name) if name.endswith(".json") else None
        if value is None:
            continue
        if value.get("task", "passkey") != "passkey":
            continue
        try:
            key = (str(value["model"]), int(value["context_length_tokens"]), float(value["depth_percent"]))
            score = finite(value["score"])
            samples = [sample for sample in value.get("samples", []) if isinstance(sample, dict)]
        except (KeyError, TypeError, ValueError) as error:
            reader.notes.append(f"{reader.name(name)} is no passkey cell ({type(error).__name__}: {error}).")
            continue
        if finite(key[2]) is None:
            reader.notes.append(f"{reader.name(name)} is no passkey cell (depth_percent {key[2]}).")
            continue
        if score is None or not 0 <= score <= 1:
            reader.notes.append(f"{reader.name(name)} has score {value['score']!r}, which is no share of 1.")
            continue
        cells[key] = {
            "context_length_tokens": key[1],
            "depth_percent": key[2],
            "score": score,
            "num_samples": len(samples),
            "num_right": sum(bool(sample.get("right")) for sample in samples),
            "seconds": finite(value.get("seconds")),
            "samples": json_safe(samples),
            "failed": None,
            "file": reader.name(name),
        }
    return cells


def _failed_cells(reader: StageReader) -> dict[tuple[str, int, float], Cell]:
    """Passkey cells that failed, as cells of score 0 that say why."""
    if not (reader.directory.location / FAILED_FILE).exists():
        return {}
    failed, plan = reader.read_json(FAILED_FILE) or {}, reader.read_json(PLAN_FILE) or {}
    return {
        (cell["model"], cell["context_length_tokens"], float(cell["depth_percent"])): {
            "context_length_tokens": cell["context_length_tokens"],
            "depth_percent": float(cell["depth_percent"]),
            "score": 0.0,
            "num_samples": 0,
            "num_right": 0,
            "seconds": None,
            "samples": [],
            "failed": str(failed[cell["file"]]),
            "file": reader.name(FAILED_FILE),
        }
        for cell in plan.get("cells", [])
        if cell["task"] == "passkey" and cell["context_length_tokens"] is not None and cell["file"] in failed
    }


def grid_means(rows: list[list[Cell | None]], window: int) -> dict[str, Any]:
    """Means over all cells, within and beyond the base window, and the weakest cell."""
    asked = [cell for row in rows for cell in row]
    cells = [cell for cell in asked if cell is not None]
    weakest = min(cells, key=lambda cell: cell["score"], default=None)
    samples = [sample for cell in cells for sample in cell["samples"]]
    return {
        "mean": _mean(cells),
        "mean_within_base_window": _mean([c for c in cells if c["context_length_tokens"] <= window]),
        "mean_beyond_base_window": _mean([c for c in cells if c["context_length_tokens"] > window]),
        "min_cell": weakest and weakest["score"],
        "min_cell_context_length_tokens": weakest and weakest["context_length_tokens"],
        "min_cell_depth_percent": weakest and weakest["depth_percent"],
        "num_cells": len(cells),
        "num_failed": sum(cell["failed"] is not None for cell in cells),
        "num_missing": len(asked) - len(cells),
        "num_answers": len(samples),
        "num_empty_answers": sum(map(is_empty, samples)),
        "num_cut_answers": sum(map(is_cut_short, samples)),
    }


def _mean(cells: list[Cell]) -> float | None:
    return math.fsum(cell["score"] for cell in cells) / len(cells) if cells else None


def verdict(passkey: dict[str, Any] | None, benchmarks: dict[str, Any] | None = None) -> list[str]:
    """The run in a few sentences, every figure computed from the cells; empty without results."""
    return [*_passkey_verdict(passkey), *_ruler_verdict(benchmarks)]


def _ruler_verdict(benchmarks: dict[str, Any] | None) -> list[str]:
    """RULER at the longest length, of the models that have all tasks there."""
    suite = next((suite for suite in (benchmarks or {}).get("suites", []) if suite["suite"] == "ruler"), None)
    tables = [] if suite is None else suite["models"]
    found = [(table["label"], mean) for table in tables if (mean := table["means"][-1]) is not None]
    if suite is None or not found:
        return []
    count = found[0][1]["num_tasks"]
    what = "1 task" if count == 1 else f"mean of {count} tasks"
    told = ", ".join(f"{label} {mean['percent']:.1f}{UNIT}" for label, mean in found)
    return [f"RULER at {suite['columns'][-1]} tokens, {what}: {told}."]


def _passkey_verdict(passkey: dict[str, Any] | None) -> list[str]:
    grids = {grid["model"]: grid for grid in passkey["models"] if grid["num_cells"]} if passkey else {}
    if not passkey or not grids:
        return []
    window = passkey["base_window_tokens"]
    longest = passkey["context_lengths_tokens"][-1]
    sentences = []
    if base := grids.get("base"):
        sentences.append(
            f"The base model, whose window is {tokens(window)} tokens, finds the passkey in "
            f"{_where_found(base, window)}."
        )
    last = next((grids[name] for name in ("final", "pretrained", "extended") if name in grids), None)
    if last is not None:
        sentences.append(
            f"{SUBJECTS[last['model']]} finds it in {_where_found(last, window)}; over the whole grid, up to "
            f"{tokens(longest)} tokens or {longest / window:.3g} times the window, in {percent(last['mean'])}. Its "
            f"weakest cell is {percent(last['min_cell'])}, at {tokens(last['min_cell_context_length_tokens'])} tokens "
            f"and depth {last['min_cell_depth_percent']:g}{UNIT}."
        )
    before = grids.get("pretrained")
    if last is not None and last["model"] == "final" and before is not None:
        sentences.append(f"Before fine-tuning the same grid gave {percent(before['mean'])}.")
    if failed := sum(grid["num_failed"] for grid in passkey["models"]):
        cells = "1 cell" if failed == 1 else f"{failed} cells"
        sentences.append(f"{cells} failed and counted as 0.")
    if missing := sum(grid["num_missing"] for grid in passkey["models"]):
        cells = "1 cell is" if missing == 1 else f"{missing} cells are"
        sentences.append(f"{cells} missing and left out of every mean.")
    for name, what in (("num_empty_answers", "are empty"), ("num_cut_answers", "were cut short by the server")):
        if count := sum(grid[name] for grid in passkey["models"]):
            asked = sum(grid["num_answers"] for grid in passkey["models"])
            sentences.append(f"{count} of {asked} answers {what}.")
    return sentences


def _where_found(grid: dict[str, Any], window: int) -> str:
    """Shares within and beyond the base window, naming only the part of the grid that was measured."""
    within, beyond = grid["mean_within_base_window"], grid["mean_beyond_base_window"]
    parts = [f"{percent(within)} of the questions within {tokens(window)} tokens"] if within is not None else []
    if beyond is not None:
        parts.append(
            f"{percent(beyond)} beyond"
            if parts
            else f"{percent(beyond)} of the questions beyond {tokens(window)} tokens"
        )
    return " and in ".join(parts)


def perplexity_facts(recipe: Recipe, reader: StageReader) -> dict[str, Any] | None:
    """Curves by model: `perplexity[i]` = exp(mean loss in nats) of the tokens up to position `bucket_end_tokens[i]`."""
    curves = []
    for name in reader.relative_names("perplexity"):
        value = reader.read_json(name) if name.endswith(".json") else None
        curve = None if value is None else guarded(reader.notes, reader.name(name), _curve, reader, name, value)
        if curve is not None:
            curves.append(curve)
    order = list(LABELS)
    curves.sort(key=lambda curve: order.index(curve["model"]) if curve["model"] in order else len(order))
    return {"base_window_tokens": recipe.model.base_context_length, "models": curves} if curves else None


def _curve(reader: StageReader, name: str, value: dict[str, Any]) -> dict[str, Any] | None:
    """One model's curve, or None with a note where its losses are not those of its buckets."""
    ends = [finite(end) for end in value.get("bucket_end_tokens", [])]
    loss = [finite(item) for item in value.get("loss", [])]
    if not ends or len(ends) != len(loss) or None in ends:
        reader.notes.append(
            f"{reader.name(name)} has {len(ends)} bucket ends and {len(loss)} losses; the curve is not drawn."
        )
        return None
    model = str(value.get("model", name.rsplit("/", 1)[-1].removesuffix(".json")))
    return {
        "model": model,
        "label": LABELS.get(model, model),
        "bucket_end_tokens": ends,
        "loss": loss,
        "perplexity": [_exp(item) for item in loss],
        "num_sequences": finite(value.get("num_sequences")),
        "file": reader.name(name),
    }


def _exp(loss: float | None) -> float | None:
    """exp(loss); a loss past 700 nats has no float perplexity and counts as not finite."""
    return None if loss is None or loss > 700 else math.exp(loss)
