"""Figures stand alone, are the same each time, and their marks stand where the numbers say."""

from __future__ import annotations

import json
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.report.made_run import write_json
from tests.report.reproduction.made_reproduction import trial_record, write_extension, write_trials
from ultralong_ray.report.reproduction.command import figures_command
from ultralong_ray.report.reproduction.dots import Mark, Panel, Row, dot_chart
from ultralong_ray.report.reproduction.figures import FIGURES, spread
from ultralong_ray.report.reproduction.sheet import Placed, sheet
from ultralong_ray.report.reproduction.trials import BEYOND, EQUAL_SEEDS
from ultralong_ray.report.reproduction.variants import grouped
from ultralong_ray.stages import stage_directory

ROOT = Path(__file__).resolve().parents[3]
SVG = "{http://www.w3.org/2000/svg}"
TASKS = {
    "ruler/vt": [1024, 4096, 8192],
    "ruler/cwe": [1024, 4096, 8192],
    "short_skills/copying": [0],
    "perplexity/code": [4096],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reproduction")
    write_extension(folder / "runs/extend_128k", 131072, [4096, 8192, 131072], [0.0, 100.0], TASKS)
    write_extension(folder / "runs/extend_1m", 1048576, [4096, 1048576], [0.0], TASKS, ("pretrained", "final"))
    trials = [trial_record(name, seed, 0.5 + seed / 50) for name in ("recipe", "rope_ntk", "new") for seed in (1, 2)]
    write_trials(folder / "runs/ablations", trials)
    assert figures_command(["gather", str(folder / "runs"), "--out", str(folder / "reproduction.json")]) == 0
    return folder


def _drawn(results: Path, out: Path) -> dict[str, ElementTree.Element]:
    assert figures_command(["--results", str(results), "--out", str(out)]) == 0
    return {file.name: ElementTree.fromstring(file.read_text()) for file in sorted(out.iterdir())}


def _texts(root: ElementTree.Element) -> list[str]:
    return [(text.text or "").replace("\N{NO-BREAK SPACE}", " ") for text in root.iter(f"{SVG}text")]


def test_all_figures_are_drawn_and_stand_alone(results: Path, tmp_path: Path) -> None:
    drawn = _drawn(results, tmp_path)
    assert set(drawn) == set(FIGURES)
    for name, root in drawn.items():
        text = (tmp_path / name).read_text()
        assert "var(--" not in text and "<script" not in text and "url(http" not in text, name
        ids = [element.get("id") for element in root.iter() if element.get("id")]
        assert len(ids) == len(set(ids)), name
        styled = "".join(style.text or "" for style in root.iter(f"{SVG}style"))
        classes = {c for element in root.iter() for c in element.get("class", "").split()}
        missing = {c for c in classes if f".{c}" not in styled} - {
            "cell",
            "final",
        }  # names that need no style of their own
        assert not missing, (name, missing)


def test_the_same_results_give_the_same_bytes(results: Path, tmp_path: Path) -> None:
    _drawn(results, tmp_path / "a")
    _drawn(results, tmp_path / "b")
    for name in FIGURES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_heatmaps_count_their_cells(results: Path, tmp_path: Path) -> None:
    root = _drawn(results, tmp_path)["niah.svg"]
    texts = _texts(root)
    assert "The base model: 2 of 6 cells all right, mean 33.3 %" in texts
    assert "Extended to 128K: 4 of 6 cells all right, mean 93.3 %" in texts
    assert "Extended to 1M: 1 of 2 cells all right, mean 90 %" in texts
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert sum("131,072 tokens" in (title or "") for title in titles) == 4  # two depths of two models
    assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == "window-edge"]) == 3


def test_ruler_has_a_line_with_intervals_for_every_model(results: Path, tmp_path: Path) -> None:
    root = _drawn(results, tmp_path)["ruler.svg"]
    styles = ("base", "extend_128k pretrained", "extend_128k final", "extend_1m pretrained", "extend_1m final")
    for style in styles:
        assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == f"interval {style}"]) == 3
    hover = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert any(text.startswith("base model, context length, tokens 4K: 81.2") for text in hover)
    labels = [text for text in _texts(root) if text.endswith("K")]
    assert len(set(labels)) == len(labels) > 3  # a tick between two measured lengths is not named after one of them


def test_the_recipe_is_the_line_that_variants_are_held_against(results: Path, tmp_path: Path) -> None:
    root = _drawn(results, tmp_path)["ablations.svg"]
    lines = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "reference"]
    dots = [c for c in root.iter(f"{SVG}circle") if (c.get("class") or "").strip() == "dot"]
    assert len(lines) == len(dots) == 3
    for line, dot in zip(lines, dots, strict=True):
        assert float(line.split(" ")[0][1:]) == pytest.approx(float(dot.get("cx", "")), abs=0.06)
    texts = _texts(root)
    assert texts.index("RoPE") < texts.index("NTK-aware") < texts.index("Other") < texts.index("new")
    assert texts[-1] == EQUAL_SEEDS
    assert EQUAL_SEEDS in json.loads((results / "reproduction.json").read_text())["tables"]["ablations"]


def test_costs_are_shown_by_task_with_three_models_a_panel(results: Path, tmp_path: Path) -> None:
    root = _drawn(results, tmp_path)["paid.svg"]
    texts = _texts(root)
    for text in ("RULER", "mean of 2 tasks", "Short skills", "copying", "Text, 100 / perplexity", "code"):
        assert text in texts
    of_base = [circle for circle in root.iter(f"{SVG}circle") if circle.get("class") == "dot base"]
    assert len(of_base) == 1 + 3 * 2  # the legend, and three rows in two panels


def test_models_of_one_window_share_a_chart_with_the_base(tmp_path: Path) -> None:
    for part, models in (("extend_1m", ("base", "pretrained", "final")), ("extend_1m_long_sft", ("final",))):
        write_extension(tmp_path / "runs" / part, 1048576, [4096, 1048576], [0.0], TASKS, models)
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    drawn = _drawn(tmp_path, tmp_path / "svg")
    texts = _texts(drawn["perplexity.svg"])
    assert "To 1M" in texts and not any(text.startswith("To 1M,") for text in texts)
    of_long = [
        p for p in drawn["perplexity.svg"].iter(f"{SVG}path") if p.get("class") == "line extend_1m_long_sft final"
    ]
    assert len(of_long) == 2, "in the legend, and in the only chart"
    texts = _texts(drawn["paid.svg"])
    assert texts.count("extended to 1M") == 2 and "extended to 1M, long SFT" not in texts
    assert "1M, long SFT, final" in texts and "1M, long SFT, before SFT" not in texts, "nobody asked that model"


def test_a_curve_of_many_buckets_has_eight_points_for_a_doubling() -> None:
    ends = [4096 * number for number in range(1, 257)]
    far, means = spread(ends, [float(number) for number in range(1, 256)] + [None])
    assert far[:3] == [4096, 8192, 12288] and far[-9::8] == [524288, 1048576] and len(far) == len(means) < 60
    assert means[:3] == [1.0, 2.0, 3.0] and means[-2] == sum(range(216, 235)) / 19, "of 235 = 256 / 2^(1/8) buckets"
    assert spread([4096, 8192], [None, 2.0]) == ([4096.0, 8192.0], [None, 2.0])


def test_no_point_lies_on_the_numbers_of_an_axis(results: Path, tmp_path: Path) -> None:
    root = _drawn(results, tmp_path)["ruler.svg"]
    of_y = [
        float(t.get("x", ""))
        for t in root.iter(f"{SVG}text")
        if t.get("class") == "tick" and t.get("text-anchor") == "end"
    ]
    points = [float(c.get("cx", "")) for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert of_y and max(of_y) < min(points)


def test_failed_cells_are_said(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path / "runs/extend_128k", 131072, [4096, 131072], [0.0], {}, ("final",))
    stage = stage_directory(recipe, "evaluate")
    place = {"model": "final", "task": "passkey", "context_length_tokens": 131072, "depth_percent": 0.0}
    cell = {**place, "section": -1, "shard": 0, "num_samples": 5, "file": "cells/final/131072-0.json"}
    write_json(stage, "plan.json", {"cells": [cell]})
    write_json(stage, "failed.json", {"cells/final/131072-0.json": "out of memory"})
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    texts = _texts(_drawn(tmp_path, tmp_path / "svg")["niah.svg"])
    assert "Extended to 128K: 1 of 2 cells all right, mean 50 %; 1 failed, counted as wrong" in texts


def test_a_grid_of_one_cell_asked_for_perplexity_does_not_stand_for_the_base(tmp_path: Path) -> None:
    write_extension(tmp_path / "runs/extend_1m", 1048576, [4096], [50.0], {}, ("base",))
    write_extension(tmp_path / "runs/base_4k", 4096, [1024, 4096, 8192], [0.0, 100.0], {}, ("final",))
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    root = _drawn(tmp_path, tmp_path / "svg")["niah.svg"]
    assert any(text.startswith("The base model: 6 of 6 cells") for text in _texts(root))


def test_every_variant_of_the_recipe_has_its_place() -> None:
    recipe = tomllib.loads((ROOT / "jobs/recipes/reproduction/ablations.toml").read_text())
    groups = grouped(recipe["tune"]["variants"])
    assert "Other" not in groups
    assert sum(map(len, groups.values())) == len(recipe["tune"]["variants"]) - 1, "all but the recipe itself"


def test_a_part_that_is_not_there_is_skipped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trials(tmp_path / "runs/ablations", [trial_record("recipe", 1, 0.5)])
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    assert set(_drawn(tmp_path, tmp_path / "svg")) == {"ablations.svg"}
    said = capsys.readouterr().out
    assert all(f"{name} is not drawn" in said for name in FIGURES if name != "ablations.svg")
    assert figures_command(["--results", str(tmp_path / "absent"), "--out", str(tmp_path)]) == 2
    (tmp_path / "file").write_text("")
    assert figures_command(["--results", str(tmp_path), "--out", str(tmp_path / "file")]) == 2
    assert "file/ablations.svg cannot be written" in capsys.readouterr().err


def test_marks_stand_at_their_values_and_intervals_stay_in_the_panel() -> None:
    mark = Mark(0.25, -0.5, 0.75, "muted", "a quarter")
    panel = Panel("share", str, reference=0.5, limits=(0.0, 1.0))
    root = ElementTree.fromstring(dot_chart("d", "t", "d", [Row("group"), Row("a <b>", ((mark,),))], [panel]))
    edges = [float(p.get("d", "").split(" ")[0][1:]) for p in root.iter(f"{SVG}path") if p.get("class") == "grid"]
    left, right = min(edges), max(edges)
    circle = next(root.iter(f"{SVG}circle"))
    assert float(circle.get("cx", "")) == pytest.approx(left + (right - left) / 4, abs=0.1)
    interval = next(p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "interval muted")
    assert interval.startswith(f"M{left:.1f} ") and interval.endswith(f"H{left + 0.75 * (right - left):.1f}")
    assert {"group", "a <b>"} <= set(_texts(root))


@pytest.mark.parametrize("limits", [(3.62, 4.45), (0.1, 0.9), (1.01, 1.19)])
def test_an_axis_has_more_than_one_number(limits: tuple[float, float]) -> None:
    panel = Panel("perplexity", str, limits=limits)
    root = ElementTree.fromstring(
        dot_chart("d", "t", "d", [Row("a", ((Mark(limits[0], None, None, "", ""),),))], [panel])
    )
    assert len([p for p in root.iter(f"{SVG}path") if p.get("class") == "grid"]) > 1


def test_an_interval_below_zero_ends_at_the_edge_of_a_logarithmic_panel() -> None:
    rows = [Row("a", ((Mark(10.0, -5.0, 25.0, "muted", "w"),),)), Row("b", ((Mark(1000.0, None, None, "", "w"),),))]
    root = ElementTree.fromstring(dot_chart("d", "t", "d", rows, [Panel("perplexity", str, "log10")]))
    interval = next(p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "interval muted")
    circles = [float(circle.get("cx", "")) for circle in root.iter(f"{SVG}circle")]
    assert float(interval.split(" ")[0][1:]) < circles[0] < float(interval.split("H")[1]) < circles[1]


def test_a_mean_beyond_the_limits_is_an_arrow_at_the_edge() -> None:
    row = Row("a", ((Mark(9.0, None, None, "muted", "nine"),),))
    root = ElementTree.fromstring(dot_chart("d", "t", "d", [row], [Panel("p", str, limits=(0.0, 1.0))]))
    arrow = next(p for p in root.iter(f"{SVG}path") if "beyond" in (p.get("class") or ""))
    edges = [float(p.get("d", "").split(" ")[0][1:]) for p in root.iter(f"{SVG}path") if p.get("class") == "grid"]
    assert float(arrow.get("d", "").split(" ")[0][1:]) == max(edges)
    assert not list(root.iter(f"{SVG}circle")) and "9.0" in _texts(root)


def test_a_variant_that_broke_does_not_hide_the_others(tmp_path: Path) -> None:
    trials = [trial_record(name, 1, beyond) for name, beyond in (("recipe", 0.5), ("a", 0.6), ("b", 0.7), ("c", -6.0))]
    write_trials(tmp_path / "runs/ablations", trials)
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    root = _drawn(tmp_path, tmp_path / "svg")["ablations.svg"]
    places = [
        float(c.get("cx", "")) for c in root.iter(f"{SVG}circle") if "perplexity" in (c.findtext(f"{SVG}title") or "")
    ]
    assert len(places) == 3 and max(places) - min(places) > 100


def test_variants_that_pairs_of_seeds_do_not_tell_apart_from_the_recipe_are_hollow(tmp_path: Path) -> None:
    """Seeds differ more than variants: intervals of means overlap, those of differences need not."""
    beyond = {"recipe": (0.3, 0.5, 0.7), "lower": (0.2, 0.41, 0.6), "alike": (0.2, 0.6, 0.6)}
    trials = [trial_record(name, seed, found[seed - 1]) for name, found in beyond.items() for seed in (1, 2, 3)]
    write_trials(tmp_path / "runs/ablations", [*trials, trial_record("once", 1, 0.1)])
    figures_command(["gather", str(tmp_path / "runs"), "--out", str(tmp_path / "reproduction.json")])
    styles = {}
    for circle in _drawn(tmp_path, tmp_path / "svg")["ablations.svg"].iter(f"{SVG}circle"):
        name, key = (circle.findtext(f"{SVG}title") or "").split(":")[0].split(", ")
        if key == BEYOND:
            styles[name] = circle.get("class", "").strip()
    assert styles == {
        "the recipe": "dot",
        "lower": "dot muted",
        "alike": "dot muted hollow",
        "once": "dot muted hollow",
    }


def test_a_sheet_is_as_large_as_its_charts() -> None:
    chart = dot_chart("d", "t", "d", [Row("a", ((Mark(1.0, None, None, "", "w"),),))], [Panel("p", str)])
    one = ElementTree.fromstring(sheet("T", "s", [Placed(chart, "heading", 2.0)]))
    wide = Placed(chart).size[0]
    assert float(one.get("width", "")) == pytest.approx(2 * wide + 52, abs=1)
    beside = ElementTree.fromstring(sheet("T", "s", [Placed(chart)] * 3, side_by_side=True))
    below = ElementTree.fromstring(sheet("T", "s", [Placed(chart)] * 3))
    assert float(beside.get("width", "")) > 2 * wide > float(below.get("width", "")) - 52
    assert float(below.get("height", "")) > float(beside.get("height", ""))
