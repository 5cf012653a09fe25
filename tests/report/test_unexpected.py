"""Files that are valid JSON and not what they should be cost their own part of the page and a note, never the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import RULER_SECTION, made_recipe, made_sample, write_json, write_run, write_tasks
from ultralong_ray.report.page import write_report
from ultralong_ray.stages import stage_directory

SECTIONS = ("passkey", "perplexity", "benchmarks", "tuning", "data", "sft_data")
GRID_CELL, RULER_CELL = "cells/final/4096-0.json", "cells/final/ruler/vt/512-shard0.json"
DOCUMENTS = "cells/final/perplexity/books/4096-shard0.json"
NAN = float("nan")
Change = Callable[[dict[str, Any]], object]


def _report(workdir: Path, stage: str, file: str, change: Change) -> tuple[dict[str, Any], str]:
    """report.json and the page of a made run of which one file was changed."""
    tuned = made_recipe(workdir, tasks=[RULER_SECTION]).model_dump()
    recipe = type(made_recipe(workdir)).model_validate({**tuned, "tune": {"search": {"pretrain.seed": [1, 2]}}})
    directories = write_run(recipe)
    points: dict[tuple[str, str, int], Any] = {("final", "ruler/vt", 512): [1.0] * 4, ("base", "ruler/vt", 512): "lost"}
    write_tasks(directories["evaluate"], {**points, ("final", "perplexity/books", 4096): [0.1, 0.2]})
    losses = {"loss": 2.0, "bucket_end_tokens": [1024, 4096], "bucket_loss": [2.0, 3.0]}
    documents = (directories["evaluate"].location / DOCUMENTS).read_json()
    samples = [{**made_sample(0.1), "facts": losses}, {**made_sample(0.2), "facts": losses}]
    write_json(directories["evaluate"], DOCUMENTS, {**documents, "samples": samples})
    directories["tune"] = stage_directory(recipe, "tune")
    trial = {"trial": "a", "values": {"pretrain.seed": 1}, "status": "done", "loss": 2.0, "steps": 2, "num_steps": 2}
    trial |= {"curve": {"step": [1, 2], "loss": [3.0, 2.0]}, "seconds": 3.0, "passkey_within_base_window": None}
    trials = [{**trial, "passkey_beyond_base_window": None}]
    table = {"keys": ["pretrain.seed"], "ranked_by": "loss", "best": "a", "trials": trials}
    write_json(directories["tune"], "tune.json", table)
    value = (directories[stage].location / file).read_json()
    change(value)
    write_json(directories[stage], file, value)
    write_report(recipe, directories, directories["report"])
    folder = Path(directories["report"].location.path)
    return json.loads((folder / "report.json").read_text()), (folder / "report.html").read_text()


def test_nothing_is_amiss_in_the_run_that_the_others_change(tmp_path: Path) -> None:
    facts, _ = _report(tmp_path, "evaluate", RULER_CELL, lambda cell: None)
    assert facts["notes"] == [] and all(facts[name] for name in SECTIONS)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (GRID_CELL, lambda cell: cell.update(samples=None)),
        (GRID_CELL, lambda cell: cell.update(depth_percent=NAN)),
        (DOCUMENTS, lambda cell: cell["samples"][0].pop("facts")),
        (DOCUMENTS, lambda cell: cell["samples"][0]["facts"].pop("loss")),
        (DOCUMENTS, lambda cell: cell["samples"][0]["facts"].update(loss=NAN)),
        (DOCUMENTS, lambda cell: cell["samples"][1]["facts"].update(bucket_loss=[NAN, 1.0])),
        (DOCUMENTS, lambda cell: cell["samples"][1]["facts"].update(bucket_end_tokens=None)),
        ("perplexity/base.json", lambda curve: curve.update(loss=None)),
        ("perplexity/base.json", lambda curve: curve.update(bucket_end_tokens=None)),
    ],
)
def test_one_cell_or_curve_costs_itself_alone(tmp_path: Path, file: str, change: Change) -> None:
    facts, page = _report(tmp_path, "evaluate", file, change)
    (note,) = facts["notes"]
    assert file in note and note[:40] in page
    assert all(facts[name] for name in SECTIONS)


@pytest.mark.parametrize(
    ("stage", "file", "change", "lost"),
    [
        ("evaluate", "plan.json", lambda plan: plan.update(cells=None), ["passkey", "benchmarks"]),
        ("evaluate", "plan.json", lambda plan: plan["cells"][0].pop("task"), ["passkey", "benchmarks"]),
        ("evaluate", "plan.json", lambda plan: plan["cells"][0].pop("section"), ["benchmarks"]),
        ("evaluate", "plan.json", lambda plan: plan["cells"][0].pop("model"), ["benchmarks"]),
        ("evaluate", RULER_CELL, lambda cell: cell.update(settings="x"), ["benchmarks"]),
        ("evaluate", RULER_CELL, lambda cell: cell["samples"][0].update(prompt_tokens="x"), ["benchmarks"]),
        ("prepare", "report.json", lambda data: data["quarantine"].pop("reasons"), ["data"]),
        ("prepare", "report.json", lambda data: data.update(length_edges_tokens="x"), ["data"]),
        ("prepare", "report.json", lambda data: data.update(buckets="x"), ["data"]),
        ("prepare_sft", "report.json", lambda data: data.update(supervised_share="x"), ["sft_data"]),
        ("tune", "tune.json", lambda table: table.pop("ranked_by"), ["tuning"]),
        ("tune", "tune.json", lambda table: table["trials"][0].pop("curve"), ["tuning"]),
    ],
)
def test_a_file_costs_its_section_and_a_note(
    tmp_path: Path, stage: str, file: str, change: Change, lost: list[str]
) -> None:
    facts, page = _report(tmp_path, stage, file, change)
    assert [name for name in SECTIONS if not facts[name]] == lost
    assert len(facts["notes"]) == len(lost) and all("left out" in note for note in facts["notes"])
    assert "left out" in page


def test_a_data_report_without_the_corpus_histogram_has_no_charts(tmp_path: Path) -> None:
    facts, page = _report(tmp_path, "prepare", "report.json", lambda data: data.pop("histogram_before"))
    assert facts["data"]["bucket_shares"] == [] and facts["notes"] == [] and "Domain mix" in page
