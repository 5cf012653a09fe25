"""The JSON of `gather` to Markdown tables, as a README shows them. Pure; a table without a number is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from ultralong_ray.report.published import ABLATION_COLUMN, ABLATIONS_SOURCE
from ultralong_ray.report.reproduction.subjects import (
    SUBJECTS,
    Subject,
    base_window,
    grid_of,
    means_of,
    num_tasks,
    own_texts,
    paid,
    paid_rows,
    parts_of,
    texts_of,
)
from ultralong_ray.report.reproduction.trials import AT_END, BEYOND, EQUAL_SEEDS, RECIPE, RULER, SKILLS, WITHIN
from ultralong_ray.report.reproduction.variants import RECIPE_LABEL, grouped, label
from ultralong_ray.report.words import ABSENT, number, percent, short_tokens

WHOLE_COMMAND = "seconds_of_the_whole_command"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown."""
    made = {
        "passkey": _passkey(results),
        "ruler_by_length": _ruler(results),
        "paid_and_restored": _paid(results),
        "ablations": _ablations(results),
        "training": _training(results),
        "gpu_time": _gpu_time(results),
    }
    return {name: text for name, text in made.items() if text}


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]], below: str = "") -> str:
    first, *others = heads
    lines = [[first, *others], ["---", *("---:" for _ in others)], *rows]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{text}\n\n{below}" if below else text


def _passkey(results: dict[str, Any]) -> str:
    rows, lacking = [], []
    for subject in SUBJECTS:
        grid = grid_of(results, subject)
        if grid is not None:
            lengths, depths = grid["context_lengths_tokens"], grid["depths_percent"]
            size = f"{len(lengths)} x {len(depths)} to {short_tokens(lengths[-1])}"
            counted = f"{grid['num_cells_all_right']} of {grid['num_cells']}"
            # the recipe of the base has a smaller window of its own, so means are taken here
            within, beyond = _within_and_beyond(grid, base_window(results) or 0)
            rows.append([subject.label, size, counted, percent(within), percent(beyond), percent(grid["mean"])])
            lacking.append(_lacking(subject, grid["num_failed"], grid["num_missing"], "cells"))
    window = short_tokens(base_window(results) or 0)
    heads = ["passkey", "lengths x depths", "cells all right", f"within {window}", f"beyond {window}", "all"]
    return _table(heads, rows, " ".join(filter(None, lacking))) if rows else ""


def _lacking(subject: Subject, failed: int, missing: int, missed: str) -> str:
    """What of a model's answers is not there; empty where all are."""
    said = [f"{failed} of its cells failed, counted as wrong"] if failed else []
    said += [f"{missing} of its {missed} missing"] if missing else []
    return f"{subject.label}: {'; '.join(said)}." if said else ""


def _within_and_beyond(grid: dict[str, Any], window: int) -> list[float | None]:
    cells = [(n, s) for row in grid["scores"] for n, s in zip(grid["context_lengths_tokens"], row, strict=True)]
    sides = [[s for n, s in cells if s is not None and (n <= window) == within] for within in (True, False)]
    return [sum(side) / len(side) if side else None for side in sides]


def _ruler(results: dict[str, Any]) -> str:
    texts = texts_of(results, "ruler")
    found = {
        subject.label if made_from == texts[0] else f"{subject.label}, {own_texts(made_from, texts)}": means
        for made_from in texts
        for subject in SUBJECTS
        if (means := means_of(results, subject, "ruler", made_from))
    }
    lengths = sorted({length for means in found.values() for length in means})
    if not lengths:
        return ""
    tasks = num_tasks(results, "ruler")
    rows = [[name, *(_with_half(means.get(length)) for length in lengths)] for name, means in found.items()]
    below = [f"Mean of {tasks} tasks, per cent, ± half of the 95 % interval.", *_lacking_of_ruler(results)]
    if len(texts) > 1:
        below.append(f"Where nothing is said: {own_texts(texts[0], texts)}; compare only rows of the same.")
    return _table([f"RULER, {tasks} tasks", *map(short_tokens, lengths)], rows, " ".join(below))


def _lacking_of_ruler(results: dict[str, Any]) -> Iterator[str]:
    for subject in SUBJECTS:
        asked = [
            score
            for part, model in parts_of(results, subject)
            for score in part["benchmarks"]["scores"]
            if score["model"] == model and score["task"].startswith("ruler/")
        ]
        failed, missing = (sum(score[key] for score in asked) for key in ("num_failed_cells", "num_missing_samples"))
        if said := _lacking(subject, failed, missing, "samples"):
            yield said


def _with_half(mean: dict[str, Any] | None) -> str:
    if mean is None:
        return ABSENT
    return f"{mean['percent']:.1f} ± {(mean['high'] - mean['low']) / 2:.1f}"


def _with_bounds(mean: dict[str, Any] | None) -> str:
    return ABSENT if mean is None else f"{mean['percent']:.1f} [{mean['low']:.1f}, {mean['high']:.1f}]"


def _paid(results: dict[str, Any]) -> str:
    found = {row: paid(results, *row) for row in paid_rows(results)}
    asked = [s.label for s in SUBJECTS if any(s.label in means for means in found.values())]
    rows = [
        [task or f"{suite}, mean of all tasks", *(_with_bounds(means.get(name)) for name in asked)]
        for (suite, task), means in found.items()
    ]
    window = short_tokens(base_window(results) or 0)
    return (
        _table([f"within {window}", *asked], rows, "Per cent with 95 % intervals; of perplexity, 100 / perplexity.")
        if rows
        else ""
    )


def _ablations(results: dict[str, Any]) -> str:
    variants = results.get("ablations", {}).get("variants", {})
    if not variants:
        return ""
    names = [RECIPE] if RECIPE in variants else []
    names += [name for group in grouped(variants).values() for name in group]
    # the paper's numbers are RULER's; where trials were not asked that, the passkey stands in
    compared = RULER if any(RULER in found["measures"] for found in variants.values()) else BEYOND
    what = {RULER: "RULER", BEYOND: "passkey beyond"}[compared]
    heads = ["variant", "seeds", "passkey within", "passkey beyond"]
    lengths = _ruler_lengths(variants)
    heads += ["RULER", *(f"RULER {short_tokens(length)}" for length in lengths.values())] if lengths else []
    heads += [
        f"{what}, less the recipe's",
        "short skills",
        "perplexity at end",
        "perplexity, less the recipe's",
        f"paper, RULER {ABLATION_COLUMN}",
        "side of the recipe",
    ]
    paper = variants.get(RECIPE, {}).get("paper_percent")
    rows = [
        [
            *_ablation(name, variants[name], compared, [RULER, *lengths] if lengths else []),
            *_paper(variants[name], compared, paper),
        ]
        for name in names
    ]
    below = (
        "Mean and 95 % interval over seeds (Student's t, cut at 0 and 100; differences over pairs of equal seeds). "
        f"{EQUAL_SEEDS} Within and beyond the base model's window. Paper: {ABLATIONS_SOURCE}."
    )
    return _table(heads, rows, below)


def _ruler_lengths(variants: dict[str, Any]) -> dict[str, int]:
    """Measure -> its tokens: RULER is the price within the window, and the gain beyond it."""
    keys = {key for found in variants.values() for key in found["measures"]}
    lengths = {key: int(key.removeprefix("ruler/")) for key in keys if re.fullmatch(r"ruler/\d+", key)}
    return dict(sorted(lengths.items(), key=lambda item: item[1]))


def _ablation(name: str, found: dict[str, Any], compared: str, of_ruler: Iterable[str]) -> list[str]:
    measures, against = found["measures"], found.get("against_recipe", {})
    return [
        RECIPE_LABEL if name == RECIPE else label(name).replace("<s>", "`<s>`"),  # Markdown would take it as a tag
        str(len(found["seeds"])),
        _share(measures.get(WITHIN)),
        _share(measures.get(BEYOND)),
        *(_share(measures.get(key)) for key in of_ruler),
        _difference(against.get(compared), 100.0, ".1f"),
        _share(measures.get(SKILLS)),
        _perplexity(measures.get(AT_END)),
        _difference(against.get(AT_END), 1.0, ".2f"),
    ]


def _share(measure: dict[str, Any] | None) -> str:
    if measure is None or measure["low"] is None:
        return ABSENT if measure is None else f"{100 * measure['mean']:.1f}"
    low, high = (100 * min(max(bound, 0.0), 1.0) for bound in (measure["low"], measure["high"]))
    return f"{100 * measure['mean']:.1f} [{low:.1f}, {high:.1f}]"


def _difference(measure: dict[str, Any] | None, unit: float, digits: str) -> str:
    """Mean and interval with their signs, in `unit`s."""
    if measure is None:
        return ABSENT
    bounds = {key: measure[key] for key in ("mean", "low", "high") if measure[key] is not None}
    said = {key: f"{unit * bound:+{digits}}" for key, bound in bounds.items()}
    return f"{said['mean']} [{said['low']}, {said['high']}]" if "low" in said else said["mean"]


def _perplexity(measure: dict[str, Any] | None) -> str:
    if measure is None or measure["low"] is None:
        return ABSENT if measure is None else number(measure["mean"])
    return f"{number(measure['mean'])} [{number(measure['low'])}, {number(measure['high'])}]"


def _paper(found: dict[str, Any], compared: str, recipe_percent: float | None) -> list[str]:
    """The paper's number, and whether our variant stands on the same side of the recipe."""
    theirs, ours = found["paper_percent"], found.get("against_recipe", {}).get(compared)
    if theirs is None or ours is None or recipe_percent is None:
        return ["" if theirs is None else f"{theirs:.2f}", ""]
    # an interval from below zero to above it, or none at all, tells no side
    if ours["low"] is None or ours["low"] <= 0 <= ours["high"]:
        return [f"{theirs:.2f}", "not decided"]
    same = (ours["mean"] > 0) == (theirs > recipe_percent)
    return [f"{theirs:.2f}", "as in the paper" if same else "the other one"]


def _training(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{part}, {name}",
            f"{training['steps']:,}",
            f"{training['tokens'] / 1e6:,.1f} M",
            f"{training['first_loss']:.3f} to {training['last_loss']:.3f}",
            number(training["step_seconds_median"]),
            percent(training["mfu_median"]),
        ]
        for part, found in results["parts"].items()
        for name, training in found["training"].items()
    ]
    return _table(["training", "steps", "tokens", "loss", "seconds a step", "MFU (causal)"], rows) if rows else ""


def _gpu_time(results: dict[str, Any]) -> str:
    """GPU time of every part, and its sum: what trainings and evaluations took, start-up included."""
    times: dict[str, float] = {}
    counted: set[str] = set()
    for name, part in results["parts"].items():
        times[name] = part["gpu_seconds"] - _gpu_seconds_of(part, counted)
        counted.update(part["folders"])
    if "ablations" in results:
        times["ablations"] = results["ablations"]["gpu_seconds"]
    if not times:
        return ""
    rows = [[name, f"{seconds:,.0f}", _hours(seconds)] for name, seconds in times.items()]
    rows.append(["all", f"{sum(times.values()):,.0f}", _hours(sum(times.values()))])
    below = "Seconds x GPUs of trainings and evaluations, start-up included; preparing data takes no GPU."
    held = [line for name, note in results["notes"].items() if (line := _whole_command(name, note))]
    return _table(["part", "GPU-seconds", "GPU-hours"], rows, " ".join([below, *held]))


def _gpu_seconds_of(part: dict[str, Any], folders: set[str]) -> float:
    """Of those of its trainings that ran once for this part and for another: their folders are among `folders`."""
    shared = {folder.rpartition("-")[0] for folder in folders.intersection(part["folders"])}
    return sum(
        time["seconds"] * time["gpus"] for stage, time in part["stages"].items() if stage in shared - {"evaluate"}
    )


def _whole_command(name: str, note: Any) -> str:
    """Of a note with the seconds of the command that ran a part, and the GPUs that it held."""
    if not isinstance(note, dict) or WHOLE_COMMAND not in note or "gpus" not in note:
        return ""
    seconds = note[WHOLE_COMMAND]
    gpus = len(note["gpus"]) if isinstance(note["gpus"], list) else note["gpus"]
    plural = "" if gpus == 1 else "s"
    return f"The whole command of {name}: {seconds:,} s on {gpus} GPU{plural}, {_hours(seconds * gpus)} GPU-hours."


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f}"
