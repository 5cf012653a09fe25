"""What trials left behind to one record for each, and to one table. No Ray.

`trials/<name>.json` in the folder of the search says that a trial is over: {"status": "done" | "stopped" | "failed",
"cause", "changes", "ended", and all numbers of `measured`}. It needs nothing beside it: a machine that is given these
files runs none of these trials again. A record whose `changes` are not those of the trial is of another trial, and
ignored.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.stages import stage_directory, stages
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.tune.trials import Trial, section, table_keys
from ultralong_ray.types import sources_of

FINAL = ("done", "stopped")  # a failed trial is tried again by the next submission


def write_record(trial: Trial, folder: Location, status: str, cause: str | None = None) -> None:
    said = {"trial": trial.name, "status": status, "cause": cause, "changes": trial.changes}
    trial.record(folder).write_json({**said, "ended": time.time(), "values": trial.values, **measured(trial)})


def record_of(trial: Trial, folder: Location) -> dict[str, Any] | None:
    """What `write_record` wrote of this trial; None for one that is not over."""
    file = trial.record(folder)
    found = file.read_json() if file.exists() else None
    return found if found is not None and found["changes"] == json.loads(json.dumps(trial.changes)) else None


def is_over(trial: Trial, folder: Location) -> bool:
    record = record_of(trial, folder)
    return record is not None and record["status"] in FINAL


def measured(trial: Trial) -> dict[str, Any]:
    """All that a comparison needs, of as much as there is.

    steps, num_steps, tokens, loss, curve and gpus are of the last pretraining, `seconds` those in its steps; training
    and stage_seconds have one entry for each of the trial's steps; scores are means by "model/task/tokens", 0 to 1, and
    made_from what their questions were made from.
    """
    records = read_metrics(stage_directory(trial.recipe, "pretrain").location)
    evaluated = _stage(trial.recipe, "evaluate")
    passkey = evaluated.summary()["models"][trial.outcome] if evaluated is not None and evaluated.done else {}
    done = [_done_stages(recipe) for recipe in trial.steps]
    return {
        "steps": records[-1].step if records else 0,
        "num_steps": records[-1].num_steps if records else None,
        "tokens": records[-1].tokens if records else 0,
        "loss": records[-1].loss if records else None,
        "seconds": sum(record.step_seconds for record in records),
        "gpus": trial.recipe.cluster.num_workers * trial.recipe.cluster.gpus_per_worker,
        "curve": {"step": [record.step for record in records], "loss": [record.loss for record in records]},
        "passkey_within_base_window": passkey.get("mean_within_base_window"),
        "passkey_beyond_base_window": passkey.get("mean_beyond_base_window"),
        "training": [{name: step[name] for name in ("pretrain", "sft") if name in step} for step in done],
        "stage_seconds": [{name: summary.get("seconds") for name, summary in step.items()} for step in done],
        **({"scores": {}, "made_from": [], "perplexity": []} if evaluated is None else _evaluation(evaluated.location)),
    }


def _stage(recipe: Recipe, name: str) -> StageDirectory | None:
    return stage_directory(recipe, name) if name in stages(recipe) else None


def _done_stages(recipe: Recipe) -> dict[str, dict[str, Any]]:
    directories = {name: stage_directory(recipe, name) for name in stages(recipe)}
    return {name: directory.summary() for name, directory in directories.items() if directory.done}


def _evaluation(stage: Location) -> dict[str, Any]:
    scores: dict[str, list[float]] = defaultdict(list)
    sources: set[str] = set()
    for file in (stage / "cells").files(recursive=True):
        if file.name.endswith(".json"):
            cell = file.read_json()
            scores[f"{cell['model']}/{cell['task']}/{cell['context_length_tokens']}"].append(cell["score"])
            sources.update(*(sources_of(sample.get("facts", {})) for sample in cell["samples"]))
    curves = [file.read_json() for file in (stage / "perplexity").files() if file.name.endswith(".json")]
    means = {key: sum(found) / len(found) for key, found in sorted(scores.items())}
    return {"scores": means, "made_from": sorted(sources), "perplexity": curves}


def table(recipe: Recipe, planned: list[Trial], folder: Location) -> dict[str, Any]:
    """What tune.json holds: the records of the trials, best first; those that are not over have status "waiting"."""
    rows = [_row(trial, folder) for trial in planned]
    ranked_by = "passkey" if any(row["passkey_beyond_base_window"] is not None for row in rows) else "loss"
    rows.sort(key=lambda row: _rank(row, ranked_by))
    best = rows[0]["trial"] if rows and rows[0]["status"] == "done" else None
    return {"keys": table_keys(section(recipe)), "ranked_by": ranked_by, "best": best, "trials": rows}


def _row(trial: Trial, folder: Location) -> dict[str, Any]:
    waiting = {"trial": trial.name, "values": trial.values, "status": "waiting", "cause": None}
    return record_of(trial, folder) or {**waiting, **measured(trial)}


def _rank(row: dict[str, Any], ranked_by: str) -> tuple[Any, ...]:
    """Finished trials first, by what they were measured by; the others by how far they got."""
    loss = math.inf if row["loss"] is None else row["loss"]
    if row["status"] != "done":
        return (1, -row["steps"], loss)
    beyond = row["passkey_beyond_base_window"]
    return (0, -(beyond or 0.0), loss) if ranked_by == "passkey" else (0, loss)


def as_text(found: dict[str, Any]) -> str:
    """The table for a terminal."""
    heads = ["trial", *found["keys"], "status", "steps", "loss", "passkey within", "passkey beyond"]
    lines = [heads]
    for row in found["trials"]:
        numbers = [row["loss"], row["passkey_within_base_window"], row["passkey_beyond_base_window"]]
        shown = ["-" if number is None else f"{number:.3g}" for number in numbers]
        values = [_short(row["values"][key]) for key in found["keys"]]
        lines.append([row["trial"], *values, row["status"], f"{row['steps']}/{row['num_steps'] or '-'}", *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
