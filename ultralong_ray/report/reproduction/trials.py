"""Records of the ablations' trials to means over seeds. A record is `tune-*/trials/NAME.json` or a row of `tune.json`
(ultralong_ray/tune/results.py says what is in it); nothing else of a run is needed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ultralong_ray.report.intervals import of_seeds
from ultralong_ray.report.published import ABLATIONS
from ultralong_ray.report.reading import finite

RECIPE = "recipe"  # the variant that changes nothing
WITHIN, BEYOND, AT_END = "passkey within window", "passkey beyond window", "perplexity at end"
RULER, SKILLS = "ruler over all lengths", "short skills"
OF_ALL = {"ruler": RULER, "short_skills": SKILLS}  # suite -> the mean of all its scores
COMPARED = (WITHIN, BEYOND, AT_END, RULER, SKILLS)
EQUAL_SEEDS = "Where all seeds gave the same, the interval has no width: that is what was seen, and not certain."


def read_trials(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> what is kept of each trial below `folder` that is done; of two with one name, the one that ended later.

    notes gets what is damaged, and the trials that are not done.
    """
    trials: dict[str, dict[str, Any]] = {}
    undone: dict[str, str] = {}
    for record, kept in _records(folder, notes):
        if kept is not None:
            trials[record["trial"]] = kept
        elif record["status"] != "waiting":
            undone[record["trial"]] = f"{record['trial']} {record['status']}: {record['cause']}"
    if left := [said for name, said in undone.items() if name not in trials]:
        notes.append(f"not done, so these trials do not count: {'; '.join(left)}.")
    return dict(sorted(trials.items()))


def _records(folder: Path, notes: list[str]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Trials with a variant, and what is kept of those that are done; those that ended later come later."""
    found: list[tuple[float, str, dict[str, Any], dict[str, Any] | None]] = []
    for file in [*folder.glob("tune-*/tune.json"), *folder.glob("tune-*/trials/*.json")]:
        search = file.relative_to(folder).parts[0]
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            for record in value["trials"] if file.name == "tune.json" else [value]:
                ended = record.get("ended") or file.stat().st_mtime  # a copied file may be as old as its copy
                kept = {"search": search, **_kept(record)} if record["status"] == "done" else None
                if record["values"].get("variant"):
                    found.append((ended, str(file), record, kept))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{file.parent.name}/{file.name} holds no trial ({type(error).__name__}: {error}).")
    return [(record, kept) for _, _, record, kept in sorted(found, key=lambda one: one[:2])]


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the model that the trial is compared by: after SFT where it has one."""
    scores = record["scores"]
    outcome = "final" if any(key.startswith("final/") for key in scores) else "pretrained"
    curve = next((curve for curve in record["perplexity"] if curve["model"] == outcome), None)
    return {
        "variant": record["values"].get("variant"),
        "seed": record["values"].get("seed"),
        "model": outcome,
        "scores": {key.removeprefix(f"{outcome}/"): s for key, s in scores.items() if key.startswith(f"{outcome}/")},
        WITHIN: record["passkey_within_base_window"],
        BEYOND: record["passkey_beyond_base_window"],
        "perplexity": None if curve is None else {key: curve[key] for key in ("bucket_end_tokens", "loss")},
        "steps": record["steps"],
        "tokens": record["tokens"],
        "last_loss": record["loss"],
        "made_from": record.get("made_from", []),
        "gpus": record.get("gpus", 1),
        "on_gpus": _on_gpus(record),
    }


def _on_gpus(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of each training, by its fingerprint, and of the evaluation: trials may share a training."""
    seconds = {
        summary["fingerprint"]: float(summary["seconds"]) for step in record["training"] for summary in step.values()
    }
    evaluation = math.fsum(step.get("evaluate") or 0.0 for step in record["stage_seconds"])
    return {**seconds, f"evaluation of {record['trial']}": evaluation}


def ablations(trials: dict[str, dict[str, Any]], gpus_per_trial: float | None = None) -> dict[str, Any]:
    """The part of the JSON: the trials, and for each variant means over seeds with Student's 95 % intervals.

    gpus_per_trial: default what each trial's record says.
    """
    by_variant: dict[str, dict[Any, dict[str, float]]] = defaultdict(dict)
    for trial in trials.values():
        by_variant[trial["variant"]][trial["seed"]] = _measures(trial)
    gpu_seconds = {
        name: seconds * (gpus_per_trial or trial["gpus"])
        for trial in trials.values()
        for name, seconds in trial["on_gpus"].items()
    }
    variants = {variant: _over_seeds(seeds) for variant, seeds in by_variant.items()}
    for variant, seeds in by_variant.items():
        if variant != RECIPE and RECIPE in by_variant:
            variants[variant]["against_recipe"] = _against(by_variant[RECIPE], seeds)
        variants[variant]["paper_percent"] = ABLATIONS.get(variant)
    return {
        "intervals_are": "95 %, Student's t over seeds; differences over pairs of equal seeds",
        "gpu_seconds": math.fsum(gpu_seconds.values()),
        "variants": variants,
        "trials": trials,
    }


def _measures(trial: dict[str, Any]) -> dict[str, float]:
    """All numbers that variants are compared by: shares of 1, perplexities, nats."""
    measures = {key: trial[key] for key in (WITHIN, BEYOND)}
    curve = trial["perplexity"]
    if curve is not None and curve["loss"]:
        measures[AT_END] = exp_or_none(curve["loss"][-1])
        measures["perplexity at start"] = exp_or_none(curve["loss"][0])
    measures |= {"last loss": trial["last_loss"], "tokens": trial["tokens"]}
    suites: dict[str, list[float]] = defaultdict(list)
    for key, score in trial["scores"].items():
        measures[key] = score
        task, _, length = key.rpartition("/")
        if "/" in task:
            suites[f"{task.split('/', 1)[0]}/{length}"].append(score)
            if (of_all := OF_ALL.get(task.split("/", 1)[0])) is not None:
                suites[of_all].append(score)
    measures |= {key: math.fsum(scores) / len(scores) for key, scores in suites.items()}
    return {key: number for key, value in measures.items() if (number := finite(value)) is not None}


def exp_or_none(loss: float | None) -> float | None:
    """None past the largest float."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def _over_seeds(seeds: dict[Any, dict[str, float]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for measures in seeds.values() for key in measures)
    found = {key: [measures[key] for measures in seeds.values() if key in measures] for key in keys}
    return {"seeds": list(seeds), "measures": {key: mean_over_seeds(values) for key, values in found.items()}}


def mean_over_seeds(values: Sequence[float]) -> dict[str, Any]:
    low, high = of_seeds(values) or (None, None)
    return {"mean": math.fsum(values) / len(values), "low": low, "high": high, "num_seeds": len(values)}


def _against(recipe: dict[Any, dict[str, float]], seeds: dict[Any, dict[str, float]]) -> dict[str, Any]:
    """Means of variant minus recipe, over the seeds that both have."""
    found = {key: list(_differences(recipe, seeds, key)) for key in COMPARED}
    return {key: mean_over_seeds(values) for key, values in found.items() if values}


def _differences(recipe: dict[Any, Any], seeds: dict[Any, Any], key: str) -> Iterator[float]:
    for seed in recipe.keys() & seeds.keys():
        if key in recipe[seed] and key in seeds[seed]:
            yield seeds[seed][key] - recipe[seed][key]
