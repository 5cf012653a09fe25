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


def read_trials(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """Name -> what is kept of each trial below `folder` that is done; of two with one name, the newer file's."""
    files = sorted([*folder.glob("tune-*/tune.json"), *folder.glob("tune-*/trials/*.json")], key=_age)
    trials: dict[str, dict[str, Any]] = {}
    for file in files:
        where = f"{file.parent.name}/{file.name}"
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            for record in value["trials"] if file.name == "tune.json" else [value]:
                if record["status"] == "done" and record["values"].get("variant"):
                    trials[record["trial"]] = _kept(record)
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{where} holds no trial ({type(error).__name__}: {error}).")
    return dict(sorted(trials.items()))


def _age(file: Path) -> tuple[float, str]:
    return file.stat().st_mtime, str(file)


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers of the model that the trial is compared by: after SFT where it has one."""
    scores = record["scores"]
    outcome = "final" if any(key.startswith("final/") for key in scores) else "pretrained"
    curve = next((curve for curve in record["perplexity"] if curve["model"] == outcome), None)
    return {
        "variant": record["values"]["variant"],
        "seed": record["values"].get("seed"),
        "model": outcome,
        "scores": {key.removeprefix(f"{outcome}/"): s for key, s in scores.items() if key.startswith(f"{outcome}/")},
        WITHIN: record["passkey_within_base_window"],
        BEYOND: record["passkey_beyond_base_window"],
        "perplexity": None if curve is None else {key: curve[key] for key in ("bucket_end_tokens", "loss")},
        "steps": record["steps"],
        "tokens": record["tokens"],
        "last_loss": record["loss"],
        "on_gpus": _on_gpus(record),
    }


def _on_gpus(record: dict[str, Any]) -> dict[str, float]:
    """Seconds of each training, by its fingerprint, and of the evaluation: trials may share a training."""
    seconds = {
        summary["fingerprint"]: float(summary["seconds"]) for step in record["training"] for summary in step.values()
    }
    evaluation = math.fsum(step.get("evaluate") or 0.0 for step in record["stage_seconds"])
    return {**seconds, f"evaluation of {record['trial']}": evaluation}


def ablations(trials: dict[str, dict[str, Any]], gpus_per_trial: float) -> dict[str, Any]:
    """The part of the JSON: the trials, and for each variant means over seeds with Student's 95 % intervals."""
    by_variant: dict[str, dict[Any, dict[str, float]]] = defaultdict(dict)
    for trial in trials.values():
        by_variant[trial["variant"]][trial["seed"]] = _measures(trial)
    seconds = {name: value for trial in trials.values() for name, value in trial["on_gpus"].items()}
    variants = {variant: _over_seeds(seeds) for variant, seeds in by_variant.items()}
    for variant, seeds in by_variant.items():
        if variant != RECIPE and RECIPE in by_variant:
            variants[variant]["against_recipe"] = _against(by_variant[RECIPE], seeds)
        variants[variant]["paper_percent"] = ABLATIONS.get(variant)
    return {
        "intervals_are": "95 %, Student's t over seeds; differences over pairs of equal seeds",
        "gpus_per_trial": gpus_per_trial,
        "gpu_seconds": gpus_per_trial * math.fsum(seconds.values()),
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
