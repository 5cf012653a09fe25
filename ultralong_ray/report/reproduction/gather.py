"""`jobs/figures.py gather`: run folders in, one JSON of all parts out, and its tables on the terminal.

    {"parts": {name of the run's folder: runs.read_part}, "ablations": trials.ablations, "notes": {...},
     "tables": {name: Markdown}}

Parts are run on different days and machines: what the JSON has and RUNS has not, stays. Of the ablations it is the
trials that stay, one by one.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from ultralong_ray.report.reading import json_safe
from ultralong_ray.report.reproduction.runs import read_part
from ultralong_ray.report.reproduction.subjects import BASE_PART, EXTENSIONS, WINDOWS
from ultralong_ray.report.reproduction.tables import tables
from ultralong_ray.report.reproduction.trials import ablations, read_trials
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

ORDER = ("base_512", BASE_PART, *EXTENSIONS)
DIGITS = 6
OBJECT_CHARACTERS = 400


def gather(runs: Path, out: Path, notes: list[str]) -> dict[str, Any]:
    """Read every run below `runs`, put what it says into the JSON `out`, and return that.

    notes: "key=value" or "part.key=value", of what a run folder does not know; the value is JSON or plain text.
    Raises UserError where there is no run, and for a note that is none.
    """
    results = read_results(out) if out.exists() else {"parts": {}, "notes": {}}
    for note in notes:
        _add_note(results["notes"], note)
    problems: list[str] = []
    folders = [path for path in sorted(runs.glob("*")) if path.is_dir()]
    trials = {name: trial for folder in folders for name, trial in read_trials(folder, problems).items()}
    # the trials' own trainings lie beside their records, and are no runs
    found = {folder.name: read_part(folder) for folder in folders if not any(folder.glob("tune-*"))}
    parts = {name: part for name, part in found.items() if part is not None}
    if not parts and not trials:
        raise UserError(
            f"gather {runs}: no finished run there; it is a folder with runs in it, such as runs/reproduction with "
            "base_4k, extend_128k, and ablations/tune-*/trials/*.json"
        )
    for name, part in parts.items():
        problems += [f"{name}: {note}" for note in [*part["notes"], *_lost(results, name, part)]]
    problems += _unlike({**results["parts"], **parts})
    problems += _unlike_trials({**_trials_of(results), **trials})
    for problem in problems:
        print(f"note: {problem}")
    print(f"gathered: {', '.join([*parts, *([f'{len(trials)} trials'] if trials else [])])}")
    results = _merged(results, parts, trials)
    Location.of(out).write_bytes(as_json(results).encode())
    return results


def _merged(results: dict[str, Any], parts: dict[str, Any], trials: dict[str, Any]) -> dict[str, Any]:
    """What is new in place of what was there under its name, and the tables of all."""
    there = {**results["parts"], **parts}
    merged: dict[str, Any] = {"parts": {name: there[name] for name in sorted(there, key=_order)}}
    known = {**_trials_of(results), **trials}
    if known:
        gpus = results["notes"].get("ablations", {}).get("gpus_per_trial")
        merged["ablations"] = ablations(dict(sorted(known.items())), gpus)
    merged = _rounded(json_safe({**merged, "notes": results["notes"]}))
    return {**merged, "tables": tables(merged)}


def _trials_of(results: dict[str, Any]) -> dict[str, Any]:
    return results.get("ablations", {}).get("trials", {})


def _lost(results: dict[str, Any], name: str, part: dict[str, Any]) -> list[str]:
    """A note of what a part was gathered from before and is not now: its numbers are gone from the JSON."""
    before = results["parts"].get(name, {"folders": []})["folders"]
    lost = [folder for folder in before if folder not in part["folders"]]
    return [f"without {', '.join(lost)}, of which it had numbers before."] if lost else []


def _unlike(parts: dict[str, Any]) -> list[str]:
    """Notes of parts that are shown as two SFTs of one model and are not."""
    trained = {
        name: [folder for folder in part["folders"] if folder.startswith("pretrain-")] for name, part in parts.items()
    }
    return [
        f"{long} is of another pretraining than {plain}, beside which figures show it."
        for plain, *longer in WINDOWS.values()
        for long in longer
        if plain in trained and long in trained and trained[plain] != trained[long]
    ]


def _unlike_trials(trials: dict[str, Any]) -> list[str]:
    """Notes where trials are changes of several recipes, or were asked different questions, and are compared."""
    ways = {
        "of different recipes": Counter(trial["search"] for trial in trials.values()),
        "asked different questions": Counter(", ".join(trial.get("made_from", [])) for trial in trials.values()),
    }
    named = {
        what: ", ".join(f"{count} of {way or 'no texts'}" for way, count in counts.items())
        for what, counts in ways.items()
        if len(counts) > 1
    }
    return [f"ablations {what} are compared: trials {counted}." for what, counted in named.items()]


def _order(name: str) -> tuple[int, str]:
    """Parts as they were made, unknown ones last."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def read_results(file: Path) -> dict[str, Any]:
    """Raises UserError where the file is absent, or not what `gather` wrote."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        words = f"cannot be read ({reason}); write it by  python jobs/figures.py gather RUNS --out {file}"
        raise UserError(f"{file} {words}") from None
    if not isinstance(results, dict) or "parts" not in results or "notes" not in results:
        raise UserError(f"{file} has no parts and notes, so it is not of jobs/figures.py gather; name another --out")
    return results


def _add_note(notes: dict[str, Any], text: str) -> None:
    """`base.seconds=537` as {"base": {"seconds": 537}}."""
    name, equals, value = text.partition("=")
    *above, key = name.split(".")
    if not equals or not all([*above, key]):
        raise UserError(f"--note {text}: it has the form key=value or part.key=value")
    place = notes
    for part in above:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"--note {text}: {part} is a note already, so it has no key {key}; choose another name")
    try:
        place[key] = json.loads(value)
    except ValueError:
        place[key] = value


def _rounded(value: Any) -> Any:
    """Six digits tell all that was measured; counts stay whole."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) >= 1000 else float(f"{value:.{DIGITS}g}")
    return value


def as_json(value: Any) -> str:
    """Indented, but for lists and short objects of plain values, on one line each: a grid is read by its rows."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    inner = re.compile(r"([\[{])\n\s+([^\[\]{}]*?)\n\s+([\]}])")  # JSON strings hold no line breaks
    return inner.sub(_on_one_line, text) + "\n"


def _on_one_line(found: re.Match[str]) -> str:
    line = found[1] + re.sub(r",\n\s+", ", ", found[2]) + found[3]
    return found[0] if found[1] == "{" and len(line) > OBJECT_CHARACTERS else line
