"""The page shows what was taken out of the data and why."""

from __future__ import annotations

from pathlib import Path

from tests.report.made_run import directories_of, made_data_report, made_recipe, write_json, write_run
from ultralong_ray.report.page import write_report


def test_decontamination_and_sources(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    counts = {"items": 1319, "whole_item": 0, "too_short": 7, "dropped": 3, "cut": 2, "spans": 5}
    found = {"file": "contamination.jsonl", "dropped": 31, "cut": 22, "benchmarks": {"gsm<8k>": counts}}
    source = {"source": "s3://b/chats", "read": 97, "too_long": 1, "contaminated": 31, "exact_duplicates": 4}
    write_json(directories["prepare"], "report.json", {**made_data_report(), "decontamination": found})
    sft = {"samples": 12, "domains": {}, "sources": [source], "decontamination": {**found, "cut": 0}}
    write_json(directories["prepare_sft"], "report.json", sft)
    stage = directories_of(recipe)["report"]
    write_report(recipe, directories, stage)
    page = (stage.location / "report.html").read_bytes().decode()
    assert "31 texts dropped and 22 cut" in page and "31 texts dropped and 0 cut" in page
    assert page.count("gsm&lt;8k&gt;</th><td>1,319</td><td>7</td><td>3</td><td>2</td>") == 2
    assert "s3://b/chats</th><td>97</td><td>1</td><td>31</td><td>4</td>" in page
