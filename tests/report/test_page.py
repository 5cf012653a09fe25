"""From stage folders to the four files: every number traceable, every text escaped, every gap said."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import (
    directories_of,
    made_cell,
    made_data_report,
    made_metrics,
    made_recipe,
    write_cell,
    write_json,
    write_lines,
    write_run,
)
from ultralong_ray.config import Recipe
from ultralong_ray.report import page
from ultralong_ray.report.page import shown_answers, write_report
from ultralong_ray.report.recipe_toml import recipe_toml
from ultralong_ray.storage import StageDirectory

ATTACK = '<script>alert("x")</script><img src="http://example.org/x.png">'
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Collects tags, ids, texts and what a browser would load; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "srcset", "data", "poster") or (name in ("href", "xlink:href") and tag != "a"):
                self.loads.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _outline(html: str) -> Outline:
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    return outline


def _write(recipe: Recipe, directories: dict[str, StageDirectory]) -> tuple[Outline, dict[str, Any], Path]:
    stage = directories["report"]
    write_report(recipe, directories, stage)
    folder = Path(stage.location.path)
    return _outline((folder / "report.html").read_text()), json.loads((folder / "report.json").read_text()), folder


def test_a_whole_run(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    outline, facts, folder = _write(recipe, write_run(recipe))
    text = outline.text.replace("\N{NO-BREAK SPACE}", " ")
    assert facts["notes"] == []
    assert facts["verdict"] and " ".join(facts["verdict"]).replace("\N{NO-BREAK SPACE}", " ") in text
    assert outline.tags.count("h1") == 1
    assert len(outline.ids) == len(set(outline.ids))
    for section in ("passkey", "perplexity", "training", "data", "reproduce", "samples"):
        assert section in outline.ids
    # 2 heatmaps, 1 perplexity chart, 2 x (loss, rate), histograms of 2 domains and of both; 2 lines in a legend.
    assert outline.tags.count("svg") == 2 + 1 + 4 + 3 + 2
    assert "Notes" not in text
    assert (folder / "report.md").read_text().startswith("# made-run\n\nThe base model")
    assert "| Final model | 98.3" in (folder / "report.md").read_text()


def test_report_json_traces_every_section_to_a_stored_file(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    _, facts, _ = _write(recipe, write_run(recipe))

    def files(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["file"]] if isinstance(value.get("file"), str) else []
            return own + [name for item in value.values() for name in files(item)]
        return [name for item in value for name in files(item)] if isinstance(value, list) else []

    found = files(facts)
    assert len(found) == 24 + 2 + 2 + 1 + 1 + 1 + 6
    for name in found:
        assert (tmp_path / name).is_file(), name
    curves = facts["training"]["pretrain"]["curves"]
    rows = [json.loads(line) for line in (tmp_path / facts["training"]["pretrain"]["file"]).read_text().splitlines()]
    assert curves["loss"] == [row["loss"] for row in rows]
    assert curves["learning_rate"] == [row["learning_rate"] for row in rows]
    assert facts["training"]["pretrain"]["tokens"] == rows[-1]["tokens"]
    assert facts["training"]["pretrain"]["tokens_per_second_median"] == 1003.0
    assert facts["training"]["pretrain"]["mfu_median"] is None
    stored = json.loads((tmp_path / facts["data"]["file"]).read_text())
    assert {key: facts["data"][key] for key in stored} == stored
    assert facts["data"]["bucket_shares"][0]["before"] == pytest.approx([4 / 6, 1 / 6, 5 / 60, 5 / 60])
    assert facts["data"]["bucket_bounds_tokens"] == [[None, 1024], [1024, 2048], [2048, 4096], [4096, None]]


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    outline, _, folder = _write(recipe, write_run(recipe))
    html = (folder / "report.html").read_text()
    assert outline.loads == ["data:,"]
    assert "script" not in outline.tags
    assert not re.search(r"url\(|@import|javascript:|\son\w+=", html)
    assert {tag for tag in outline.tags if tag in ("iframe", "object", "embed", "img", "use")} == set()
    assert "default-src 'none'" in html


def test_decoded_text_and_answers_cannot_break_out(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    write_json(directories["prepare"], "report.json", made_data_report(f"before<s>{ATTACK}"))
    write_cell(directories["evaluate"], made_cell("base", 1024, 0.0, 0, answer=ATTACK))
    outline, _, folder = _write(recipe, directories)
    assert not {"script", "img", "i>prose"} & set(outline.tags)
    assert outline.text.count(ATTACK) == 1 + 5
    assert "<i>prose</i>" in outline.text
    assert "<mark>&lt;s&gt;</mark>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("name", ["prepare", "prepare_sft", "pretrain", "sft", "export", "evaluate"])
@pytest.mark.parametrize("how", ["absent", "unfinished"])
def test_a_stage_that_is_not_done_is_said_and_not_read(tmp_path: Path, name: str, how: str) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    if how == "absent":
        del directories[name]
    else:
        (Path(directories[name].location.path) / "_SUCCESS.json").unlink()
    outline, facts, _ = _write(recipe, directories)
    assert [note for note in facts["notes"] if note.startswith(f"Stage {name} has not been run to its end")]
    assert name not in [stage["stage"] for stage in facts["stages"]]
    assert f"Stage {name} has not been run" in outline.text
    read = {"prepare": "data", "prepare_sft": "sft_data", "export": "export", "evaluate": "passkey"}
    assert (facts[read[name]] if name in read else facts["training"][name]) is None


def test_a_run_with_nothing_done_is_still_a_page(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    outline, facts, folder = _write(recipe, directories_of(recipe))
    assert facts["verdict"] == [] and len(facts["notes"]) == 6
    assert "the verdict is open" in outline.text
    assert "the verdict is open" in (folder / "report.md").read_text()


def test_a_missing_cell_is_shown_as_missing(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    (Path(directories["evaluate"].location.path) / "cells/final/4096-50.json").unlink()
    outline, facts, _ = _write(recipe, directories)
    assert "4,096 tokens, depth 50 %: missing" in outline.text
    assert facts["passkey"]["models"][1]["mean"] == 1.0
    assert "1 cell is missing" in outline.text


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    rows = made_metrics(4, 3.0)
    rows[2]["loss"] = float("nan")
    write_lines(directories["pretrain"], "metrics.jsonl", rows)
    outline, facts, folder = _write(recipe, directories)
    assert facts["training"]["pretrain"]["curves"]["loss"][2] is None
    assert "1 steps have a loss that is no finite number" in outline.text
    assert "NaN" not in (folder / "report.json").read_text()


def test_a_resumed_run_counts_a_step_once_and_a_torn_line_is_a_note(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    rows = made_metrics(4, 3.0)
    again = {**rows[2], "loss": 1.25}
    text = "\n".join(map(json.dumps, [*rows[:3], again, rows[3]])) + '\n{"step": 5, "lo'
    (directories["pretrain"].location / "metrics.jsonl").write_bytes(text.encode())
    _, facts, _ = _write(recipe, directories)
    assert facts["training"]["pretrain"]["curves"]["step"] == [1, 2, 3, 4]
    assert facts["training"]["pretrain"]["curves"]["loss"][2] == 1.25
    assert [note for note in facts["notes"] if "metrics.jsonl line 6 is not valid JSON" in note]


def test_answers_stay_within_their_room_wrong_ones_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    outline, facts, _ = _write(recipe, directories)
    assert facts["answers"] == {"num_shown": 120, "num_stored": 120}
    assert [s["right"] for s in shown_answers(facts["passkey"])["final", 4096, 50.0]] == [False, True, True, True, True]
    assert "120 of 120 stored answers" in outline.text
    monkeypatch.setattr(page, "SAMPLE_CHARACTERS", 24 * 300)
    outline, facts, _ = _write(recipe, directories)
    few = shown_answers(facts["passkey"])
    assert 24 <= facts["answers"]["num_shown"] == sum(map(len, few.values())) < 48
    assert all(few.values()), "every cell shows one answer before any shows two"
    assert few["final", 4096, 50.0][0]["right"] is False
    assert "of 120 stored answers, wrong ones first; the rest" in outline.text


def test_long_prompts_keep_their_end(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    cell = made_cell("base", 256, 0.0, 5)
    cell["samples"][0]["prompt_end"] = "x" * 5000 + "the question"
    write_cell(directories["evaluate"], cell)
    _, facts, _ = _write(recipe, directories)
    shown = shown_answers(facts["passkey"])["base", 256, 0.0][0]["prompt_end"]
    assert shown.startswith("[...] ") and shown.endswith("the question") and len(shown) < 700


def test_recipe_toml_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    _, _, folder = _write(recipe, write_run(recipe))
    text = (folder / "recipe.toml").read_text()
    assert Recipe.model_validate(tomllib.loads(text)) == recipe
    assert '"long prose" = 0.3' in text
    odd = recipe.model_copy(update={"workdir": 'a\\b "c"\x7f\n\N{SNOWMAN}'})
    assert Recipe.model_validate(tomllib.loads(recipe_toml(odd))) == odd
    mixed = recipe.prepare.model_copy(update={"domain_mix": {"\N{GRINNING FACE}": 1.0, "\N{SNOWMAN}": 1.0, "": 1.0}})
    odd = recipe.model_copy(update={"prepare": mixed})
    assert Recipe.model_validate(tomllib.loads(recipe_toml(odd))) == odd


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    _, _, folder = _write(recipe, directories)
    first = (folder / "report.html").read_bytes()
    _write(recipe, directories)
    assert (folder / "report.html").read_bytes() == first
