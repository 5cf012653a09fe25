"""Benchmark cells become tables: means as published, what failed counts 0, every number names its files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import made_recipe, made_sample, write_run, write_tasks
from ultralong_ray.report.benchmarks import benchmark_facts
from ultralong_ray.report.evaluation import evaluation_facts, verdict
from ultralong_ray.report.page import write_report
from ultralong_ray.report.reading import StageReader
from ultralong_ray.report.scores import Score
from ultralong_ray.storage import StageDirectory

RULER = {"kind": "ruler", "names": ["vt", "qa_1"], "context_lengths": [512, 4096], "samples_per_cell": 4}
POINTS: dict[tuple[str, str, int], list[float] | str | None] = {
    ("base", "ruler/vt", 512): [1.0, 0.8, 0.6, 0.0],
    ("base", "ruler/vt", 4096): [0.0, 0.0, 0.0, 0.0],
    ("base", "ruler/qa_1", 512): [1.0, 1.0, 1.0, 0.0],
    ("base", "ruler/qa_1", 4096): "its worker was lost 3 times",
    ("final", "ruler/vt", 512): [1.0, 1.0, 1.0, 1.0],
    ("final", "ruler/vt", 4096): [1.0, 1.0, 1.0, 1 / 3],
    ("final", "ruler/qa_1", 512): [1.0, 1.0, 1.0, 1.0],
    ("final", "ruler/qa_1", 4096): None,
}


def _facts(workdir: Path) -> tuple[dict[str, Any], StageReader, Any]:
    recipe = made_recipe(workdir, tasks=[RULER])
    stage = write_run(recipe)["evaluate"]
    write_tasks(stage, POINTS)
    reader = StageReader(stage)
    return evaluation_facts(recipe, reader), reader, recipe


def test_a_score_is_the_mean_of_its_samples_and_names_its_files(tmp_path: Path) -> None:
    facts, reader, _ = _facts(tmp_path)
    (suite,) = facts["benchmarks"]["suites"]
    assert (suite["suite"], suite["columns"]) == ("ruler", ["512", "4K"])
    base, final = suite["models"]
    assert [[score["percent"] for score in row["scores"]] for row in base["rows"]] == [[60.0, 0.0], [75.0, 0.0]]
    assert final["rows"][0]["scores"][1]["percent"] == 83.33, "RULER rounds to two decimals"
    for table in suite["models"]:
        for row in table["rows"]:
            for score in row["scores"]:
                for file in score["files"]:
                    stored = (reader.directory.location.parent / file).read_json()
                    assert round(100 * stored["score"], 2) == score["percent"] and stored["model"] == table["model"]


def test_failed_cells_count_0_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    facts, reader, _ = _facts(tmp_path)
    base, final = facts["benchmarks"]["suites"][0]["models"]
    failed = base["rows"][1]["scores"][1]
    assert (failed["percent"], failed["num_samples"], failed["num_failed_cells"]) == (0.0, 4, 1)
    assert [cell["reason"] for cell in facts["benchmarks"]["failed_cells"]] == ["its worker was lost 3 times"]
    missing = final["rows"][1]["scores"][1]
    assert (missing["percent"], missing["num_missing_samples"], final["num_missing_samples"]) == (None, 4, 4)
    assert [mean and mean["percent"] for mean in base["means"]] == [67.5, 0.0]
    assert [mean and mean["percent"] for mean in final["means"]] == [100.0, None], "no mean of half the tasks"
    assert any("qa_1/4096-shard0.json is missing" in note for note in reader.notes)
    assert base["cumulative"] == [67.5, 33.75] and final["cumulative"] == [100.0, None]


def test_verdict_names_ruler_at_the_longest_length(tmp_path: Path) -> None:
    facts, _, _ = _facts(tmp_path)
    text = verdict(None, facts["benchmarks"])[0].replace("\N{NO-BREAK SPACE}", " ")
    assert text == "RULER at 4K tokens, mean of 2 tasks: Base model 0.0 %."


def test_verdict_counts_the_tasks_of_that_length_alone(tmp_path: Path) -> None:
    only = {"kind": "ruler", "names": ["vt"], "context_lengths": [4096], "samples_per_cell": 4}
    recipe = made_recipe(tmp_path, tasks=[{**RULER, "context_lengths": [512]}, only])
    stage = write_run(recipe)["evaluate"]
    write_tasks(stage, {place: points for place, points in POINTS.items() if place[1:] != ("ruler/qa_1", 4096)})
    text = verdict(None, evaluation_facts(recipe, StageReader(stage))["benchmarks"])[0]
    assert text.startswith("RULER at 4K tokens, 1 task: Base model 0.0")


RULER_LENGTHS = [4096 << k for k in range(9)]


def _whole(model: str, suite: str, names: int, lengths: list[int], points: Any) -> list[Score]:
    return [
        Score(model, f"{suite}/task{k}", length, [points(k, length)] * 4) for k in range(names) for length in lengths
    ]


def test_rulers_published_means_need_all_tasks_and_all_lengths() -> None:
    scores = _whole("final", "ruler", 13, RULER_LENGTHS, lambda k, length: 1.0 if length <= 131072 else 0.5)
    summary = benchmark_facts(scores, ["final"], {}, 4096)[0]["models"][0]["summary"]
    shares = {name: None if mean is None else mean["percent"] for name, mean in summary.items()}
    assert shares["<128K"] == 100.0 and shares["<512K"] == pytest.approx((6 * 100 + 2 * 50) / 8)
    assert shares["<1M"] == pytest.approx((6 * 100 + 3 * 50) / 9) == shares["mean of the lengths asked"]
    short = benchmark_facts([s for s in scores if s.context_length_tokens != 8192], ["final"], {}, 4096)[0]
    assert [short["models"][0]["summary"][name] for name in ("<128K", "<512K", "<1M")] == [None] * 3
    few = benchmark_facts([s for s in scores if s.task != "ruler/task3"], ["final"], {}, 4096)[0]
    assert few["models"][0]["summary"]["<128K"] is None
    gap = [s for s in scores if (s.task, s.context_length_tokens) != ("ruler/task3", 2**19)]
    summary = benchmark_facts(gap, ["final"], {}, 4096)[0]["models"][0]["summary"]
    assert summary["<128K"] is not None and summary["<512K"] is None, "of a length with 12 of the 13 tasks no mean"
    assert {row["model"]: row["values"]["<1M"] for row in few["published"]}["UltraLong-8B-4M"] == 78.0


def test_effective_length_is_the_longest_at_or_above_85_6() -> None:
    scores = _whole("final", "ruler", 13, RULER_LENGTHS, lambda k, length: 0.856 if length <= 32768 else 0.8559)
    table = benchmark_facts(scores, ["final"], {}, 4096)[0]["models"][0]
    assert table["effective_tokens"] == 32768
    few = [score for score in scores if score.task != "ruler/task3"]
    assert benchmark_facts(few, ["final"], {}, 4096)[0]["models"][0]["effective_tokens"] is None, "12 of 13 tasks"


def test_lveval_averages_levels_of_sets_and_standard_tests_stand_under_their_names() -> None:
    levels = {"16k": 1.0, "32k": 0.5, "64k": 0.5, "128k": 0.0, "256k": 0.25}
    scores = [
        Score("final", f"lveval/set{k}_{level}", 131072, [share] * 2)
        for k in range(11)
        for level, share in levels.items()
    ]
    suite = benchmark_facts(scores, ["final"], {}, 4096)[0]
    assert suite["columns"] == [f"{level}, window 128K" for level in levels]
    summary = suite["models"][0]["summary"]
    assert (summary["<128K"]["percent"], summary["<256K"]["percent"]) == (50.0, 45.0)
    narrow = [Score("final", score.task, 65536, [0.0]) for score in scores]
    suite = benchmark_facts([*scores, *narrow], ["final"], {}, 4096)[0]
    assert suite["columns"][:2] == ["16k, window 64K", "16k, window 128K"]
    assert suite["models"][0]["summary"]["<128K"]["percent"] == 50.0, "the longest window counts"
    gap = benchmark_facts(scores[:-1], ["final"], {}, 4096)[0]["models"][0]["summary"]
    assert gap["<128K"]["percent"] == 50.0 and gap["<256K"] is None
    standard = benchmark_facts([Score("final", "standard/gsm8k", 4096, [1.0, 0.0])], ["final"], {}, 4096)[0]
    summary = standard["models"][0]["summary"]
    assert summary["GSM8K"]["percent"] == 50.0 and summary["MMLU"] is None and summary["mean"] is None


def test_the_page_shows_every_number_of_the_tables_and_escapes_answers(tmp_path: Path) -> None:
    _, _, recipe = _facts(tmp_path)
    directories = write_run(recipe)
    write_tasks(directories["evaluate"], POINTS)
    file = directories["evaluate"].location / "cells/final/ruler/vt/4096-shard0.json"
    stored = file.read_json()
    stored["samples"][0] |= {"answer": "</code><script>alert(1)</script>", "facts": {"haystack": "made up"}}
    file.write_json(stored)
    summary = write_report(recipe, directories, directories["report"])
    assert summary["num_failed"] == 1
    folder = Path(directories["report"].location.path)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for number in ("60.00", "75.00", "83.33", "67.50", "33.75", "0.00*"):
        assert f">{number}<" in page, number
    assert "| vt | 60.00 | 0.00 |" in text and "| qa_1 | 75.00 | 0.00* |" in text
    assert "| UltraLong-8B-4M | 84.2 | 80.0 | 78.0 |" in text and "do not compare these scores" in page
    facts = json.loads((folder / "report.json").read_text())
    assert facts["benchmarks"]["suites"][0]["models"][1]["rows"][0]["scores"][1]["low"] < 83.33
    links = set(re.findall(r'href="#(a-[^"]+)"', page))
    assert links and all(f'id="{link}"' in page for link in links)


def test_models_that_were_asked_different_questions_are_told_apart(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path, tasks=[RULER])
    directories = write_run(recipe)
    write_tasks(directories["evaluate"], POINTS)
    _made_from(directories["evaluate"], {"base": "built in", "final": "built in"})
    write_report(recipe, directories, directories["report"])
    folder = Path(directories["report"].location.path)
    page = (folder / "report.html").read_text()
    assert "words: built in" in page and "do not compare these scores with published ones" in page
    assert "Not all were asked the same questions" not in page
    _made_from(directories["evaluate"], {"base": "built in", "final": "wonderwords 2.2.0"})
    write_report(recipe, directories, directories["report"])
    for file in ("report.html", "report.md"):
        text = (folder / file).read_text()
        assert "Not all were asked the same questions" in text and "words: built in, wonderwords 2.2.0" in text


def _made_from(stage: StageDirectory, words: dict[str, str]) -> None:
    """Let the samples of each model say that their words are from there."""
    for model, source in words.items():
        for file in (stage.location / f"cells/{model}/ruler").files(recursive=True):
            stored = file.read_json()
            file.write_json(
                {**stored, "samples": [{**sample, "facts": {"words": source}} for sample in stored["samples"]]}
            )


def test_lveval_rounds_a_half_as_its_own_code_does() -> None:
    points = [0.5] * 23 + [0.0] * 57  # 14.375 %
    assert Score("final", "lveval/cmrc_mixup_16k", 512, points).percent == round(100 * sum(points) / 80, 2) == 14.38
    assert Score("final", "ruler/vt", 512, points).percent == round(sum(points) / 80 * 100, 2) == 14.37


def test_half_a_character_of_an_answer_does_not_cost_the_page(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path, tasks=[RULER])
    directories = write_run(recipe)
    write_tasks(
        directories["evaluate"], {("final", "ruler/vt", 512): [0.0], ("final", "ruler/qa_1", 512): "\udc80 lost"}
    )
    file = directories["evaluate"].location / "cells/final/ruler/vt/512-shard0.json"
    file.write_json({**file.read_json(), "samples": [made_sample(0.0, "cut \ud83d")]})
    write_report(recipe, directories, directories["report"])
    page = (tmp_path / directories["report"].location.name / "report.html").read_text(encoding="utf-8")
    assert re.search(r"^code \{[^}]*unicode-bidi: isolate", page, re.M), "answers may run from right to left"
    assert "cut \N{REPLACEMENT CHARACTER}</code>" in page and "\N{REPLACEMENT CHARACTER} lost" in page


def test_a_limit_and_both_scores_of_gsm8k_are_said_in_both_reports(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path, tasks=[RULER])
    directories = write_run(recipe)
    points: dict[tuple[str, str, int], list[float] | str | None] = {
        ("base", "standard/gsm8k", 0): "out of memory",
        ("final", "standard/gsm8k", 0): [1.0, 1.0, 0.0, 1.0],
    }
    write_tasks(directories["evaluate"], points)
    file = directories["evaluate"].location / "cells/final/standard/gsm8k/0-shard0.json"
    stored = file.read_json()
    samples = [
        {**sample, "metrics": {"exact_match,strict-match": float(i == 1), "exact_match,flexible-extract": 1.0}}
        for i, sample in enumerate(stored["samples"])
    ]
    file.write_json({**stored, "samples": samples, "settings": {"section": {"limit": 4}}})
    write_report(recipe, directories, directories["report"])
    for name in ("report.html", "report.md"):
        text = (Path(directories["report"].location.path) / name).read_text()
        assert "the first 4 rows were asked and no others: published figures are of all rows" in text, name
        assert "(strict-match) it is, in per cent: Base model 0.0; " in text and " 25.0.\n" in text.replace("</p>", "")


def test_both_reports_say_what_a_summary_row_is_of(tmp_path: Path) -> None:
    recipe = made_recipe(tmp_path, tasks=[RULER])
    directories = write_run(recipe)
    points: dict[tuple[str, str, int], list[float] | str | None] = {
        ("base", "ruler/vt", 512): "out of memory",
        ("base", "ruler/qa_1", 512): None,
        ("final", "ruler/vt", 512): [1.0] * 4,
    }
    write_tasks(directories["evaluate"], points)
    file = directories["evaluate"].location / "cells/final/ruler/vt/512-shard0.json"
    file.write_json({**(stored := file.read_json()), "samples": [{**stored["samples"][0], "answer": ""}]})
    write_report(recipe, directories, directories["report"])
    for name, end in (("report.html", "</td></tr>"), ("report.md", " |")):
        text = (Path(directories["report"].location.path) / name).read_text()
        assert f"this run; 1 cell failed and counts 0; 4 samples missing{end}" in text, name
        assert f"this run; 1 empty answer{end}" in text, name
