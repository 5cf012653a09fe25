"""`jobs/figures.py`: the JSON of `gather` in, five SVG files out. The same JSON gives the same bytes.

niah.svg        passkey grids of the base model and of the extensions, as the paper draws them
ruler.svg       RULER by context length
perplexity.svg  perplexity of held-out books by position
ablations.svg   every variant of the ablations against the recipe
paid.svg        RULER and short skills within the base model's window, before and after
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ultralong_ray.report import words
from ultralong_ray.report.benchmarks import TITLES
from ultralong_ray.report.figures import Axis, Line, heatmap, line_chart
from ultralong_ray.report.intervals import WORDS
from ultralong_ray.report.reproduction.dots import Mark, Panel, Row, dot_chart
from ultralong_ray.report.reproduction.sheet import Placed, sheet
from ultralong_ray.report.reproduction.subjects import (
    BASE,
    EXTENSIONS,
    FINAL,
    PRETRAINED,
    SUBJECTS,
    WINDOWS,
    Subject,
    base_window,
    curve_of,
    grid_of,
    means_of,
    num_tasks,
    of_window,
    paid,
    paid_rows,
    texts_of,
)
from ultralong_ray.report.reproduction.trials import AT_END, BEYOND, EQUAL_SEEDS, RECIPE, RULER, WITHIN, exp_or_none
from ultralong_ray.report.reproduction.variants import RECIPE_LABEL, grouped, label
from ultralong_ray.report.words import near_tokens, percent, short_tokens
from ultralong_ray.storage import Location

BESIDE = 7.0  # pixels between the points of two models at one length: equal points would hide each other
TEXT = "perplexity"  # a suite whose scores are 1 / perplexity
SUITES = TITLES | {TEXT: "Text, 100 / perplexity"}
FAR = 2.5  # times the median
POINTS_PER_DOUBLING = 8  # of a curve by position
WIDE = 10.0  # values that span more have a logarithmic axis


def draw(results: dict[str, Any], out: Path) -> None:
    """Write the figures whose numbers are there, and say of the others that they are not."""
    for name, (figure, needs) in FIGURES.items():
        drawn = figure(results)
        if drawn is None:
            print(f"{name} is not drawn: it needs {needs}, which the results lack")
            continue
        Location.of(out / name).write_bytes(drawn.encode())
        print(f"{out / name}")


def niah(results: dict[str, Any]) -> str | None:
    """The base model and, of each extension, the last model that was asked."""
    window = base_window(results)
    named = [(BASE, "The base model")]
    for part, reached in EXTENSIONS.items():
        of_part = [(FINAL[part], f"Extended to {reached}"), (PRETRAINED[part], f"Extended to {reached}, before SFT")]
        named += [next(((s, name) for s, name in of_part if grid_of(results, s)), of_part[0])]
    charts = []
    for subject, name in named:
        grid = grid_of(results, subject)
        if grid is None or window is None:
            continue
        right = f"{grid['num_cells_all_right']} of {grid['num_cells']} cells all right"
        failed = f"; {grid['num_failed']} failed, counted as wrong" if grid["num_failed"] else ""
        heading = f"{name}: {right}, mean {percent(grid['mean'])}{failed}"
        chart = heatmap(*_heatmap_input(grid, subject, window), "Passkey", near_tokens)
        charts.append(Placed(chart, heading))
    if not charts:
        return None
    samples = sorted({grid["samples_per_cell"] for s, _ in named if (grid := grid_of(results, s))})
    asked = " or ".join(f"{n} question" + ("s" if n > 1 else "") for n in samples)
    notes = [f"{asked} a cell; greedy answers. The line marks the base model's window of {window:,} tokens."]
    return sheet("Passkey retrieval", "by context length and depth of the passkey", charts, ramp=True, notes=notes)


def _heatmap_input(grid: dict[str, Any], subject: Subject, window: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two arguments of the report's heatmap."""
    samples = grid["samples_per_cell"]
    cells = [
        [None if s is None else {"score": s, "num_right": round(s * samples), "num_samples": samples} for s in row]
        for row in grid["scores"]
    ]
    identity = {"model": subject.style.replace(" ", "-"), "label": subject.label, "cells": cells}
    return {**grid, **identity}, {**grid, "base_window_tokens": window}


def ruler(results: dict[str, Any]) -> str | None:
    """Of all models, of the questions that most were asked."""
    texts = texts_of(results, "ruler")
    asked = {subject: means_of(results, subject, "ruler", texts[0]) for subject in SUBJECTS} if texts else {}
    found = {subject: means for subject, means in asked.items() if means}
    lines = []
    for number, (subject, means) in enumerate(found.items()):
        aside = BESIDE * (number - (len(found) - 1) / 2)
        bounds = [(mean["low"], mean["high"]) for mean in means.values()]
        ys: list[float | None] = [mean["percent"] for mean in means.values()]
        lines.append(Line(subject.label, subject.style, [float(length) for length in means], ys, bounds, aside))
    x = Axis("context length, tokens", "log2", lambda at: short_tokens(round(at)))
    y = Axis("per cent", "linear", words.tick, from_zero=True)
    window = base_window(results)
    chart = line_chart("ruler", "RULER by context length", lines, x, y, height=350, width=760, edge=window)
    if not chart:
        return None
    subtitle = f"mean of {num_tasks(results, 'ruler')} tasks, with 95 % intervals"
    legend = [(line.style, line.label) for line in lines]
    placed = [Placed(chart, scale=1.1)]
    return sheet("RULER by context length", subtitle, placed, legend=legend, notes=_lines(WORDS))


def _lines(text: str, characters: int = 118) -> list[str]:
    """Broken between words."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= characters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [f"{line[0].upper()}{line[1:]}" if number == 0 else line for number, line in enumerate(lines)]


def perplexity(results: dict[str, Any]) -> str | None:
    """One chart for each window: the models extended to it, and the base model on the same books."""
    charts, legend = [], {}
    edge = base_window(results)
    for window in WINDOWS:
        lines = []
        for subject in of_window(window):
            curve = curve_of(results, subject, window)
            if curve is not None:
                ends, losses = spread(curve["bucket_end_tokens"], curve["loss"])
                lines.append(Line(subject.label, subject.style, ends, [exp_or_none(loss) for loss in losses]))
                legend[subject.style] = subject.label
        values = [value for line in lines for value in line.ys if value is not None]
        wide = bool(values) and max(values) > WIDE * min(values)
        x = Axis("position in the book, tokens", "log2", lambda end: short_tokens(round(end)))
        y = Axis("perplexity", "log10" if wide else "linear", words.tick)
        title = f"Perplexity by position to {window}"
        chart = line_chart(f"perplexity-{window}", title, lines, x, y, height=300, edge=edge)
        if chart:
            charts.append(Placed(chart, f"To {window}"))
    if not charts:
        return None
    title = "Perplexity by position"
    subtitle = "held-out books; each point is the mean loss of the tokens up to its position, since the point before"
    return sheet(title, subtitle, charts, legend=list(legend.items()), side_by_side=True)


def spread(ends: Sequence[int], losses: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    """Buckets of one size taken together where a logarithmic axis crowds them: their last end and their mean loss."""
    together: dict[int, list[int]] = {}
    for number, end in enumerate(ends):
        together.setdefault(math.ceil(POINTS_PER_DOUBLING * math.log2(end / ends[0])), []).append(number)
    means = []
    for numbers in together.values():
        known = [loss for loss in (losses[number] for number in numbers) if loss is not None]
        means.append(statistics.fmean(known) if known else None)
    return [float(ends[numbers[-1]]) for numbers in together.values()], means


def ablations(results: dict[str, Any]) -> str | None:
    variants = results.get("ablations", {}).get("variants", {})
    if not variants:
        return None
    measures = {name: found["measures"] for name, found in variants.items()}
    reads = base_window(results)
    window = "the window" if reads is None else short_tokens(reads)
    asked_ruler = any(RULER in found for found in measures.values())
    beside = (RULER, "RULER") if asked_ruler else (WITHIN, f"passkey within {window}")
    panels = {
        BEYOND: (f"passkey beyond {window}", percent, _share_limits(measures, BEYOND)),
        beside[0]: (beside[1], percent, _share_limits(measures, beside[0])),
        AT_END: (f"perplexity at {_reached(results)}", words.number, _most(measures, AT_END)),
    }
    shown = [
        (key, Panel(title, write, reference=_mean(measures, key), limits=limits))
        for key, (title, write, limits) in panels.items()
    ]
    keys = [key for key, _ in shown]
    rows = [_variant(RECIPE_LABEL, variants[RECIPE], keys)] if RECIPE in measures else []
    for group, names in grouped(variants).items():
        rows.append(Row(group))
        rows += [_variant(label(name), variants[name], keys) for name in names]
    seeds = sorted({len(found["seeds"]) for found in variants.values()})
    said = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    subtitle = f"one choice of the recipe changed at a time; mean and 95 % interval over {said} seeds (Student's t)"
    chart = dot_chart("ablations", "Ablations", subtitle, rows, [panel for _, panel in shown])
    notes = [
        "The dashed line is the unchanged recipe. Intervals are cut at the edges; an arrow is a mean beyond them.",
        "Filled: told apart from the recipe over pairs of equal seeds, whose 95 % interval leaves out 0. Hollow: not.",
        EQUAL_SEEDS,
    ]
    return sheet(f"Ablations at {_reached(results)}", subtitle, [Placed(chart)], notes=notes)


def _reached(results: dict[str, Any]) -> str:
    """The position that the trials' losses end at, as a label."""
    curves = [trial["perplexity"] for trial in results["ablations"]["trials"].values() if trial["perplexity"]]
    return short_tokens(max((curve["bucket_end_tokens"][-1] for curve in curves), default=0)) if curves else "the end"


def _bounds(measures: dict[str, Any], key: str) -> list[float]:
    found = [measure[key] for measure in measures.values() if key in measure]
    return [v for measure in found for v in (measure["mean"], measure["low"], measure["high"]) if v is not None]


def _share_limits(measures: dict[str, Any], key: str) -> tuple[float, float]:
    """From the tenth below all to 1."""
    lowest = max(0.0, min(_bounds(measures, key), default=0.0))
    return (min(math.floor(10 * lowest) / 10, 0.9), 1.0)


def _most(measures: dict[str, Any], key: str) -> tuple[float, float] | None:
    """Limits that leave out what is many times the median: a variant that broke would hide how the others differ."""
    means = [measure[key]["mean"] for measure in measures.values() if key in measure]
    if not means or max(means) <= FAR * statistics.median(means):
        return None
    near = {name: m for name, m in measures.items() if key in m and m[key]["mean"] <= FAR * statistics.median(means)}
    bounds = [bound for bound in _bounds(near, key) if 0 < bound <= FAR * statistics.median(means)]
    margin = 0.06 * (max(bounds) - min(bounds))
    return min(bounds) - margin, max(bounds) + 3 * margin


def _mean(measures: dict[str, Any], key: str) -> float | None:
    return measures.get(RECIPE, {}).get(key, {}).get("mean")


def _variant(name: str, found: dict[str, Any], keys: list[str]) -> Row:
    marks: list[tuple[Mark, ...]] = []
    for key in keys:
        measure, style = found["measures"].get(key), _style(name, found, key)
        if measure is None:
            marks.append(())
            continue
        words = f"{name}, {key}: {measure['mean']:.4g}, {measure['num_seeds']} seeds"
        marks.append((Mark(measure["mean"], measure["low"], measure["high"], style, words),))
    return Row(name, tuple(marks))


def _style(name: str, found: dict[str, Any], key: str) -> str:
    if name == RECIPE_LABEL:
        return ""
    difference = found.get("against_recipe", {}).get(key)
    told_apart = difference and difference["low"] is not None and not difference["low"] <= 0 <= difference["high"]
    return "muted" if told_apart else "muted hollow"


def paid_and_restored(results: dict[str, Any]) -> str | None:
    """Base, after continued pretraining, after SFT: a panel for each window; loss on text has a scale of its own."""
    asked = {row: paid(results, *row) for row in paid_rows(results)}
    measured = {label for means in asked.values() for label in means}
    shown = {window: [s for s in of_window(window) if s.label in measured] for window in WINDOWS}
    panels = {window: subjects for window, subjects in shown.items() if set(subjects) - {BASE}}
    halves = ([row for row in asked if row[0] != TEXT], [row for row in asked if row[0] == TEXT])
    charts = [
        Placed(_paid_chart(results, {row: asked[row] for row in half}, panels, f"paid-{number}"), scale=1.2)
        for number, half in enumerate(halves)
        if half
    ]
    if not charts:
        return None
    subtitle = f"per cent over lengths to {short_tokens(base_window(results) or 0)}, with 95 % intervals"
    legend = {subject.style: subject.label for subjects in panels.values() for subject in subjects}
    return sheet("What extension costs within the base model's window", subtitle, charts, legend=list(legend.items()))


def _paid_chart(
    results: dict[str, Any],
    asked: dict[tuple[str, str | None], dict[str, dict[str, Any]]],
    panels: dict[str, list[Subject]],
    name: str,
) -> Markup:
    """asked: (suite, task) -> mean by label. All panels have the same limits: those of all marks, to the next ten."""
    rows: list[Row] = []
    for (suite, task), means in asked.items():
        label = f"mean of {num_tasks(results, suite)} tasks" if task is None else task.split("/", 1)[1]
        if (heading := SUITES.get(suite, suite.replace("_", " "))) not in [row.label for row in rows]:
            rows.append(Row(heading))
        rows.append(Row(label.replace("_", " "), tuple(_marks(subjects, means) for subjects in panels.values())))
    marks = [mark for row in rows for panel in row.marks for mark in panel]
    ends = [end for mark in marks for end in (mark.value, mark.low, mark.high) if end is not None]
    limits = (10.0 * math.floor(min(ends) / 10), 10.0 * math.ceil(max(ends) / 10))
    columns = [Panel(f"extended to {window}", words.tick, limits=limits) for window in panels]
    return dot_chart(name, "Paid and restored", "Base, before SFT, final", rows, columns)


def _marks(subjects: list[Subject], means: dict[str, dict[str, Any]]) -> tuple[Mark, ...]:
    found = [(subject, means[subject.label]) for subject in subjects if subject.label in means]
    return tuple(
        Mark(mean["percent"], mean["low"], mean["high"], subject.style, f"{subject.label}: {mean['percent']:.1f} %")
        for subject, mean in found
    )


Figure = Callable[[dict[str, Any]], str | None]
FIGURES: dict[str, tuple[Figure, str]] = {
    "niah.svg": (niah, "passkey grids of base_4k, extend_128k or extend_1m"),
    "ruler.svg": (ruler, "RULER scores of base_4k, extend_128k or extend_1m"),
    "perplexity.svg": (perplexity, "perplexity curves of extend_128k or extend_1m"),
    "ablations.svg": (ablations, "trials of ablations"),
    "paid.svg": (paid_and_restored, "benchmarks within the base window of extend_128k or extend_1m"),
}
