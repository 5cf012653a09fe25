"""Losses of documents: shown in nats a token and by position, never as a share that a reader could take for a score."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import made_recipe, write_run, write_tasks
from ultralong_ray.report.compare import comparison_facts, find_side, write_comparison
from ultralong_ray.report.page import write_report
from ultralong_ray.storage import Location, StageDirectory

LOSSES = {"base": [4.0, 5.0], "final": [2.0, 2.5]}
DASH = "\N{EN DASH}"
TASK, LENGTH = "perplexity/books", 1024


def write_documents(stage: StageDirectory) -> None:
    """Two documents of each model, cut to LENGTH tokens; at 2048 tokens those of the base model failed."""
    points: dict[Any, Any] = {(m, TASK, LENGTH): [math.exp(-loss) for loss in own] for m, own in LOSSES.items()}
    points |= {("base", TASK, 2048): "out of memory", ("final", TASK, 2048): [0.5, 0.5]}
    write_tasks(stage, points)
    for model, losses in LOSSES.items():
        for length, own in ((LENGTH, losses), (2048, [1.0, 3.0])):
            file = stage.location / f"cells/{model}/{TASK}/{length}-shard0.json"
            if not file.exists():
                continue
            stored = file.read_json()
            for index, (sample, loss) in enumerate(zip(stored["samples"], own, strict=True)):
                ends = [256, 512, length]
                curve = {"loss": loss, "bucket_end_tokens": ends, "bucket_loss": [loss + 1, loss, loss - 1]}
                answer = f"{loss:.4f} nats a token"
                sample |= {"index": index, "facts": curve, "metric": "inverse_perplexity", "answer": answer}
            file.write_json(stored)


@pytest.fixture
def stage(tmp_path: Path) -> StageDirectory:
    directory = write_run(made_recipe(tmp_path))["evaluate"]
    write_documents(directory)
    return directory


def test_the_page_has_losses_and_no_shares(tmp_path: Path, stage: StageDirectory) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    write_documents(directories["evaluate"])
    write_report(recipe, directories, directories["report"])
    folder = Path(directories["report"].location.path)
    (suite,) = json.loads((folder / "report.json").read_text())["benchmarks"]["suites"]
    base, final = (table["rows"][0]["scores"] for table in suite["models"])
    assert (base[0]["loss"], final[0]["loss"], final[1]["loss"]) == (4.5, 2.25, 2.0)
    assert final[0]["bucket_end_tokens"] == [256, 512, 1024] and final[0]["bucket_loss"] == [3.25, 2.25, 1.25]
    assert 2.0 <= final[0]["loss_low"] <= 2.25 <= final[0]["loss_high"] <= 2.5
    assert base[1]["loss"] is None, "a cell that failed has no loss, and 0 would be the best one"
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    part = page[page.index('id="suite-perplexity"') : page.index('id="perplexity"')]
    assert ">4.500</a>" in part and ">2.250</a>" in part and ">2.125<" in part and "style=" not in part
    assert f">{DASH}*</a>" in part
    assert "documents-books" in part and "nats per token, lower is better" in part
    assert "up to 256: 3.250, 512: 2.250, 1,024: 1.250" in page and "2.5000 nats a token" in page
    assert f"| books | 4.500 | {DASH}* |" in text and "| books | 2.250 | 2.000 |" in text


def test_losses_of_other_documents_are_told_apart(stage: StageDirectory, tmp_path: Path) -> None:
    sides = [find_side(f"{stage.location}#{model}", None) for model in LOSSES]
    (row,) = [row for row in comparison_facts(*sides)["rows"] if row["context_length_tokens"] == LENGTH]
    assert row["paired"] and row["mixed_sources"] == []
    file = stage.location / f"cells/final/{TASK}/{LENGTH}-shard0.json"
    stored = file.read_json()
    stored["samples"][1]["prompt_end"] = "another end"  # the file has changed since
    file.write_json(stored)
    (row,) = [row for row in comparison_facts(*sides)["rows"] if row["context_length_tokens"] == LENGTH]
    assert not row["paired"]
    (said,) = row["mixed_sources"]
    assert re.fullmatch(r"documents at 1024 tokens: [0-9a-f]{8}, [0-9a-f]{8}", said)
    plan = (stage.location / "plan.json").read_json()
    (cell,) = [cell for cell in plan["cells"] if cell["file"] == f"cells/final/{TASK}/{LENGTH}-shard0.json"]
    plan["cells"].append({**cell, "shard": 1, "file": f"cells/final/{TASK}/{LENGTH}-shard1.json"})
    (stage.location / "plan.json").write_json(plan)
    (row,) = [row for row in comparison_facts(*sides)["rows"] if row["context_length_tokens"] == LENGTH]
    assert row["mixed_sources"] == [], "some are not there yet, which does not make the others' texts different"


def test_two_models_are_compared_by_their_losses(stage: StageDirectory, tmp_path: Path) -> None:
    place = stage.location.uri
    first, second = (find_side(f"{place}#{model}", None) for model in ("base", "final"))
    row, failed = comparison_facts(first, second)["rows"]
    assert row["difference"] == -2.25 and -2.5 <= row["low"] <= -2.25 <= row["high"] <= -2.0
    assert (failed["difference"], failed["low"]) == (None, None)
    text = write_comparison(first, second, Location.of(tmp_path / "out"))
    assert "| perplexity/books | 1K | 4.500 | 2.250 | -2.250 |" in text
    assert f"| perplexity/books | 2K | {DASH}* | 2.000 | {DASH} |" in text
    assert ">4.500<" in (tmp_path / "out" / "comparison.html").read_text()


def test_every_cell_of_the_grid_leads_to_its_answers_and_file(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    write_report(recipe, directories, directories["report"])
    page = (Path(directories["report"].location.path) / "report.html").read_text()
    links = re.findall(r'<a href="#(p-[^"]+)"', page)
    assert len(links) == len(set(links)) == 24
    for link in links:
        model, length, depth = link.removeprefix("p-").split("-")
        (opened,) = re.findall(rf'id="{link}">(.*?)</details>', page, re.DOTALL)
        (file,) = re.findall(r'<a href="\.\./([^"]+)">', opened)
        stored = json.loads((tmp_path / file).read_text())
        assert [stored["model"], stored["context_length_tokens"], stored["depth_percent"]] == [
            model,
            int(length),
            float(depth),
        ]


def test_one_document_gives_no_interval(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path)
    directories = write_run(recipe)
    stage = directories["evaluate"]
    write_documents(stage)
    for model in LOSSES:
        file = stage.location / f"cells/{model}/{TASK}/{LENGTH}-shard0.json"
        file.write_json({**(stored := file.read_json()), "samples": stored["samples"][:1]})
    write_report(recipe, directories, directories["report"])
    page = (directories["report"].location / "report.html").read_bytes().decode()
    assert ">4.000</a></td>" in page and ">2.000</a></td>" in page, "the loss alone"
    place = f"{stage.location}#"
    first, second = (find_side(place + model, None) for model in LOSSES)
    text = write_comparison(first, second, Location.of(tmp_path / "out"))
    assert f"| perplexity/books | 1K | 4.000 | 2.000 | -2.000 | {DASH} |" in text
    assert ">4.000</td>" in (tmp_path / "out" / "comparison.html").read_text()
