"""Two models side by side: the same numbers as their cells, pairs where the same was asked, words otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import RULER_SECTION, made_recipe, write_run, write_tasks
from ultralong_ray.config import StorageConfig
from ultralong_ray.report.compare import compare_command, comparison_facts, find_side, write_comparison
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

POINTS: dict[tuple[str, str, int], list[float] | str | None] = {
    ("base", "ruler/vt", 512): [0.0, 0.0, 0.0, 1.0],
    ("final", "ruler/vt", 512): [0.0, 1.0, 1.0, 1.0],
    ("final", "ruler/vt", 4096): [1.0, 1.0, 1.0, 1.0],
}


def _evaluation(workdir: Path) -> StageDirectory:
    recipe = made_recipe(workdir)
    stage = write_run(recipe)["evaluate"]
    write_tasks(stage, POINTS)
    return stage


def test_side_by_side_with_pairs(tmp_path: Path) -> None:
    place = _evaluation(tmp_path).location.uri
    facts = comparison_facts(find_side(f"{place}#base", None), find_side(str(tmp_path), None))
    assert (facts["a"]["model"], facts["b"]["model"]) == ("base", "final"), "final is what a workdir stands for"
    (row,) = facts["rows"]
    assert (row["a"]["percent"], row["b"]["percent"], row["difference"], row["paired"]) == (25.0, 75.0, 50.0, True)
    assert 0.0 <= row["low"] < 50.0 < row["high"] <= 100.0
    assert facts["b"]["only"] == ["ruler/vt at 4096"] and facts["a"]["only"] == []
    assert row["a"]["files"][0].endswith("cells/base/ruler/vt/512-shard0.json")


def test_other_questions_are_not_paired(tmp_path: Path) -> None:
    stage = _evaluation(tmp_path)
    file = stage.location / "cells/final/ruler/vt/512-shard0.json"
    stored = file.read_json()
    stored["samples"][2]["expected"] = ["another"]
    file.write_json(stored)
    facts = comparison_facts(find_side(f"{stage.location}#base", None), find_side(f"{stage.location}#final", None))
    assert not facts["rows"][0]["paired"] and facts["rows"][0]["mixed_sources"] == []


def test_other_lengths_and_tasks_of_a_section_are_no_other_settings(tmp_path: Path) -> None:
    stage = _evaluation(tmp_path)
    sections = {"base": {**RULER_SECTION, "fixed_order": True}, "final": {**RULER_SECTION, "fixed_order": True}}
    sections["final"] |= {"context_lengths": [512], "names": ["vt"], "samples_per_cell": 8}

    def same() -> bool:
        for model, section in sections.items():
            file = stage.location / f"cells/{model}/ruler/vt/512-shard0.json"
            file.write_json({**file.read_json(), "settings": {"decoding": "greedy", "section": section}})
        sides = [find_side(f"{stage.location}#{model}", None) for model in sections]
        return comparison_facts(*sides)["rows"][0]["same_settings"]

    assert same()
    sections["final"]["fixed_order"] = False
    assert not same()


def test_questions_made_from_other_texts_are_named(tmp_path: Path) -> None:
    stage = _evaluation(tmp_path)
    for model, words in (("base", "built in"), ("final", "wonderwords 2.2.0")):
        file = stage.location / f"cells/{model}/ruler/vt/512-shard0.json"
        stored = file.read_json()
        samples = [{**s, "facts": {"words": words}, "prompt_end": f"a word of {words}"} for s in stored["samples"]]
        file.write_json({**stored, "samples": samples})
    text = write_comparison(
        find_side(f"{stage.location}#base", None), find_side(str(tmp_path), None), Location.of(tmp_path / "out")
    )
    assert "other questions (words: built in, wonderwords 2.2.0)" in text
    assert "other questions (words: built in, wonderwords 2.2.0)" in (tmp_path / "out/comparison.html").read_text()


def test_the_command_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = _evaluation(tmp_path / "run").location, tmp_path / "out"
    assert compare_command(["--compare", f"{place}#base", f"{place}#final", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| ruler/vt | 512 | 25.00 | 75.00 | +50.00 |" in printed
    assert (out / "comparison.md").read_text() in printed
    page = (out / "comparison.html").read_text()
    assert ">25.00<" in page and ">75.00<" in page and "+50.00" in page
    assert json.loads((out / "comparison.json").read_text())["rows"][0]["difference"] == 50.0


@pytest.mark.parametrize(
    ("a", "words"),
    [
        ("nowhere", "neither an evaluate stage nor a workdir with one"),
        ("run#extended", "has no model 'extended'; name one of base, final"),
        ("damaged", "no evaluation at"),
        ("a training", "no evaluation at"),
        ("nothing", "no evaluation at"),
    ],
)
def test_what_cannot_be_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], a: str, words: str
) -> None:
    _evaluation(tmp_path / "run")
    for name, text in (("damaged", "{"), ("a training", '{"plan": {}}'), ("nothing", '{"cells": []}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plan.json").write_text(text)
    arguments: list[Any] = ["--compare", str(tmp_path / a), str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert compare_command(arguments) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_store_out_of_reach_and_a_file_for_a_folder_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _evaluation(tmp_path / "run").location.uri
    (tmp_path / "file").write_text("")
    sides = ["--compare", f"{run}#base", f"{run}#final", "--out"]
    assert compare_command([*sides, str(tmp_path / "file")]) == 2
    assert "file/comparison.json cannot be written" in capsys.readouterr().err
    store = ["--storage.endpoint", "http://127.0.0.1:1", "--storage.max_attempts", "1"]
    assert compare_command(["jobs/recipes/quickstart.toml", *sides, "s3://bucket/out", *store]) == 2
    assert "the storage cannot be reached: the store does not answer" in capsys.readouterr().err


def test_a_place_is_reached_as_the_recipe_says(tmp_path: Path) -> None:
    storage = {"endpoint": "http://127.0.0.1:1", "max_attempts": 1}
    recipe = made_recipe(tmp_path).model_copy(update={"storage": StorageConfig.model_validate(storage)})
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        find_side("s3://bucket/run", recipe)


def test_nothing_in_common_is_an_error(tmp_path: Path) -> None:
    stage = _evaluation(tmp_path)
    plan = (stage.location / "plan.json").read_json()
    plan["cells"] = [cell for cell in plan["cells"] if (cell["model"], cell["context_length_tokens"]) != ("final", 512)]
    (stage.location / "plan.json").write_json(plan)
    sides = [find_side(f"{stage.location}#{model}", None) for model in ("base", "final")]
    with pytest.raises(UserError, match="no task at the same length in common"):
        comparison_facts(*sides)


def test_cells_that_failed_on_both_sides_with_other_numbers_of_samples_are_no_pairs(tmp_path: Path) -> None:
    failed: dict[tuple[str, str, int], list[float] | str | None] = dict.fromkeys(POINTS, "out of memory")
    stages = [_evaluation(tmp_path / name) for name in ("first", "second")]
    for stage in stages:
        write_tasks(stage, failed)
    file = stages[1].location / "plan.json"
    file.write_json({"cells": [{**cell, "num_samples": 2} for cell in file.read_json()["cells"]]})
    facts = comparison_facts(*(find_side(f"{stage.location}#base", None) for stage in stages))
    assert [(row["paired"], row["difference"]) for row in facts["rows"]] == [(False, 0.0)]


def test_what_failed_or_is_missing_has_no_other_settings_and_each_note_stands_once(tmp_path: Path) -> None:
    stage = _evaluation(tmp_path)
    write_tasks(stage, {**POINTS, ("base", "ruler/vt", 512): "out of memory", ("base", "ruler/vt", 4096): None})
    (stage.location / "cells/final/ruler/vt/4096-shard0.json").write_bytes(b"{")
    text = write_comparison(
        find_side(f"{stage.location}#base", None), find_side(f"{stage.location}#final", None), Location.of(tmp_path)
    )
    assert "| ruler/vt | 512 | 0.00* | 75.00 |" in text and "other settings" not in text
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(notes) == len(set(notes)) == 2, notes
