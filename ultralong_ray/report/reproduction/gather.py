"""`jobs/figures.py gather`: run folders in, one JSON of all parts out, and its tables on the terminal.

    {"parts": {name of the run's folder: runs.read_part}, "ablations": trials.ablations, "notes": {...},
     "tables": {name: Markdown}}

Parts are run on different days and machines: what the JSON has and RUNS has not, stays. Of the ablations it is the
trials that stay, one by one.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ultralong_ray.report.reading import json_safe
from ultralong_ray.report.reproduction.runs import read_part
from ultralong_ray.report.reproduction.tables import tables
from ultralong_ray.report.reproduction.trials import ablations, read_trials
from ultralong_ray.types import UserError

ORDER = ("base_512", "base_4k", "extend_128k", "extend_1m")
DIGITS = 6


def gather(runs: Path, out: Path, notes: list[str]) -> dict[str, Any]:
    """Read every run below `runs`, put what it says into the JSON `out`, and return that.

    notes: "key=value" or "part.key=value", of what a run folder does not know; the value is JSON or plain text.
    Raises UserError where there is no run, and for a note that is none.
    """
    results: dict[str, Any] = {"parts": {}, "notes": {}}
    if out.exists():
        results = read_results(out)
    said = [parse_note(note) for note in notes]
    for path, value in said:
        place = results["notes"]
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    problems: list[str] = []
    folders = [path for path in sorted(runs.glob("*/")) if path.is_dir()]
    trials = {name: trial for folder in folders for name, trial in read_trials(folder, problems).items()}
    if trials:
        stored = results.get("ablations", {}).get("trials", {})
        gpus = results["notes"].get("ablations", {}).get("gpus_per_trial", 1)
        results["ablations"] = ablations(dict(sorted((stored | trials).items())), gpus)
    # the trials' own trainings lie beside their records, and are no runs
    found = {folder.name: read_part(folder) for folder in folders if not any(folder.glob("tune-*"))}
    parts = {name: part for name, part in found.items() if part is not None}
    if not parts and not trials:
        raise UserError(
            f"gather {runs}: no finished run there; it is a folder with runs in it, such as runs/reproduction with "
            "base_4k, extend_128k, and ablations/tune-*/trials/*.json"
        )
    merged = results["parts"] | parts
    results["parts"] = {name: merged[name] for name in sorted(merged, key=_order)}
    for problem in [*problems, *(f"{name}: {note}" for name, part in parts.items() for note in part["notes"])]:
        print(f"note: {problem}")
    print(f"gathered: {', '.join([*parts, *([f'{len(trials)} trials'] if trials else [])])}")
    results = _rounded(json_safe(results))
    results["tables"] = tables(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(as_json(results))
    return results


def _order(name: str) -> tuple[int, str]:
    """Parts as they were made, unknown ones last."""
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def read_results(file: Path) -> dict[str, Any]:
    """Raises UserError where the file is absent, or not what `gather` wrote."""
    try:
        results = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: {error}; write it by  python jobs/figures.py gather RUNS --out {file}") from None
    if not isinstance(results, dict) or "parts" not in results or "notes" not in results:
        raise UserError(f"{file} has no parts and notes, so it is not of jobs/figures.py gather; name another --out")
    return results


def parse_note(text: str) -> tuple[list[str], Any]:
    """`base.seconds=537` to (["base", "seconds"], 537)."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"--note {text}: it has the form key=value or part.key=value")
    try:
        return key.split("."), json.loads(value)
    except ValueError:
        return key.split("."), value


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
    """Indented, but for lists and objects of plain values, which stand on one line each: a grid is read by its rows."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    inner = re.compile(r"([\[{])\n\s+([^\[\]{}]*?)\n\s+([\]}])")  # JSON strings hold no line breaks
    return inner.sub(lambda found: found[1] + re.sub(r",\n\s+", ", ", found[2]) + found[3], text) + "\n"
