"""Charts are well-formed, accessible SVG whose marks stand where the numbers say."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from ultralong_ray.report.figures import Axis, Line, heatmap, length_histogram, line_chart, score_colour
from ultralong_ray.report.svg import Scale, element
from ultralong_ray.report.words import duration, near_tokens, number, percent, short_tokens

SVG = "{http://www.w3.org/2000/svg}"


def _passkey(lengths: list[int], depths: list[float], window: int) -> dict[str, Any]:
    return {"context_lengths_tokens": lengths, "depths_percent": depths, "base_window_tokens": window}


def _grid(cells: list[list[float | None]], label: str = "Base model") -> dict[str, Any]:
    rows = [[None if s is None else {"score": s, "num_right": 0, "num_samples": 0} for s in row] for row in cells]
    means = {"mean": None, "mean_within_base_window": None, "mean_beyond_base_window": None}
    return {"model": "base", "label": label, "cells": rows, **means}


def _parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def _titles(root: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Hover text of every cell -> its group."""
    groups = {group.findtext(f"{SVG}title"): group for group in root.iter(f"{SVG}g")}
    return {title.replace("\N{NO-BREAK SPACE}", " "): group for title, group in groups.items() if title}


def test_colours_run_from_red_through_yellow_to_green() -> None:
    assert (score_colour(0.0), score_colour(0.5), score_colour(1.0)) == ("#f0496e", "#ebb839", "#0cd79f")
    assert score_colour(0.25) == "#ee8054"
    with pytest.raises(ValueError, match=r"1\.5"):
        score_colour(1.5)


def test_heatmap_paints_each_cell_with_its_score() -> None:
    svg = heatmap(_grid([[1.0, 0.0], [0.5, None]]), _passkey([512, 1024], [0.0, 100.0], 512))
    cells = _titles(_parse(svg))
    assert set(cells) == {
        "512 tokens, depth 0 %: 100 %",
        "1,024 tokens, depth 0 %: 0 %",
        "512 tokens, depth 100 %: 50 %",
        "1,024 tokens, depth 100 %: missing",
    }
    rect = cells["512 tokens, depth 100 %: 50 %"].find(f"{SVG}rect")
    assert rect is not None and rect.get("fill") == "#ebb839"
    assert cells["512 tokens, depth 0 %: 100 %"].findtext(f"{SVG}text") == "100"


def test_the_caption_of_a_narrow_grid_is_not_cut_off() -> None:
    root = _parse(heatmap(_grid([[1.0]]), _passkey([512], [50.0], 512)))
    caption = next(
        text for text in root.iter(f"{SVG}text") if text.get("class") == "axis-label" and text.text != "depth"
    )
    width = float(root.get("viewBox", "").split(" ")[2])
    assert 7 * len(caption.text or "") <= float(caption.get("x", "")) <= width


def test_labels_of_depths_begin_within_the_figure() -> None:
    depths = [0.0, 33.3333, 99.99, 100.0]
    root = _parse(heatmap(_grid([[1.0]] * 4), _passkey([512], depths, 512)))
    labels = [text for text in root.iter(f"{SVG}text") if (text.text or "").endswith(" %")]
    assert [text.text for text in labels] == ["0 %", "33.3333 %", "99.99 %", "100 %"]
    assert all(float(text.get("x", "")) - 6.5 * len(text.text or "") >= 0 for text in labels)
    plain = _parse(heatmap(_grid([[1.0]] * 2), _passkey([512], [0.0, 100.0], 512)))
    assert next(rect.get("x") for rect in plain.iter(f"{SVG}rect")) == "50.75", "short labels need no more room"


def test_a_missing_cell_has_no_score_and_no_colour() -> None:
    cells = _titles(_parse(heatmap(_grid([[None]]), _passkey([512], [0.0], 512))))
    group = cells["512 tokens, depth 0 %: missing"]
    rect = group.find(f"{SVG}rect")
    assert rect is not None and rect.get("fill") is None and rect.get("class") == "missing"
    assert group.find(f"{SVG}text") is None


@pytest.mark.parametrize(("window", "columns_within"), [(512, 2), (700, 2), (100, 0), (9999, 4)])
def test_the_window_edge_stands_after_the_last_length_within(window: int, columns_within: int) -> None:
    root = _parse(heatmap(_grid([[1.0] * 4]), _passkey([256, 512, 1024, 2048], [0.0], window)))
    edge = next(path for path in root.iter(f"{SVG}path") if path.get("class") == "window-edge")
    rects = [float(rect.get("x", "")) for rect in root.iter(f"{SVG}rect")]
    x = float(edge.get("d", "").split()[0].lstrip("M"))
    assert sum(rect < x for rect in rects) == columns_within


def test_a_forty_by_ten_grid_keeps_labels_inside_the_picture() -> None:
    lengths = [26_214 * index for index in range(1, 41)]
    root = _parse(heatmap(_grid([[1.0] * 40] * 10), _passkey(lengths, [10.0 * i for i in range(10)], 131_072)))
    height = float(root.get("viewBox", "").split()[3])
    baseline = max(float(rect.get("y", "")) + float(rect.get("height", "")) for rect in root.iter(f"{SVG}rect"))
    assert height - baseline > len("1,048,560") * 5
    assert len(_titles(root)) == 400


def test_every_chart_says_what_it_is() -> None:
    chart = heatmap(_grid([[1.0]], label="A <b>& model"), _passkey([512], [0.0], 512))
    root = _parse(chart)
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None and description is not None and title.text == "Passkey retrieval, A <b>& model"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert root.get("role") == "img"


def _chart(ys: list[float | None], **options: Any) -> ElementTree.Element:
    xs = [float(step + 1) for step in range(len(ys))]
    return _parse(
        line_chart("c", "t", [Line("l", "loss", xs, ys)], Axis("x", "linear", str), Axis("y", "linear", str), **options)
    )


def test_a_value_that_is_not_there_breaks_the_line() -> None:
    root = _chart([3.0, 2.0, None, 1.0])
    path = next(p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "line loss")
    assert path.count("M") == 2 and path.count("L") == 1
    assert len(list(root.iter(f"{SVG}circle"))) == 3


def test_long_curves_are_thinned_but_end_at_the_last_step() -> None:
    root = _chart([float(step) for step in range(10_000)])
    path = next(p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "line loss")
    points = path.replace("M", "L").split("L")[1:]
    assert 300 < len(points) <= 601
    assert points[-1].split()[0] == "548.0"


def test_nothing_finite_means_no_chart() -> None:
    assert (
        line_chart("c", "t", [Line("l", "s", [1.0], [None])], Axis("x", "linear", str), Axis("y", "linear", str)) == ""
    )
    assert length_histogram("h", "t", ["a"], [], [0.0]) == ""


@pytest.mark.parametrize("ys", [[2.0], [2.0, 2.0], [0.0]])
def test_one_point_and_constant_curves_stand_inside_the_frame(ys: list[float | None]) -> None:
    dots = list(_chart(ys).iter(f"{SVG}circle"))
    assert len(dots) == len(ys)
    for dot in dots:
        assert 58 <= float(dot.get("cx", "")) <= 548 and 26 < float(dot.get("cy", "")) < 208


def test_bars_are_as_high_as_their_shares() -> None:
    root = _parse(length_histogram("h", "t", ["< 1K", "1K +"], [0.5, 0.5], [0.25, 0.75]))
    heights = {r.get("class", "") + str(i): float(r.get("height", "")) for i, r in enumerate(root.iter(f"{SVG}rect"))}
    assert heights["bar-before0"] / heights["bar-after3"] == pytest.approx(2 / 3, abs=1e-3)
    assert heights["bar-after1"] / heights["bar-after3"] == pytest.approx(1 / 3, abs=1e-3)


def test_intervals_are_drawn_and_fit_into_the_frame() -> None:
    line = Line("l", "loss", [1.0, 2.0], [0.5, 0.6], [(0.1, 0.9), (0.5, 0.7)])
    root = _parse(line_chart("c", "t", [line], Axis("x", "linear", str), Axis("y", "linear", str)))
    paths = [p.get("d", "") for p in root.iter(f"{SVG}path") if p.get("class") == "interval loss"]
    (low, high), (_, other) = [tuple(map(float, path.split(" ")[1].split("V"))) for path in paths]
    assert 26 <= high < other < low <= 208


@pytest.mark.parametrize(("edge", "anchor"), [(2, "start"), (10, "end")])
def test_the_label_of_the_window_stays_in_the_picture(edge: int, anchor: str) -> None:
    root = _chart([1.0] * 10, edge=edge)
    label = next(text for text in root.iter(f"{SVG}text") if text.get("class") == "window-label")
    assert label.get("text-anchor") == anchor


def test_an_axis_of_whole_numbers_names_each_once() -> None:
    line = Line("l", "loss", [1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    steps = Axis("step", "linear", lambda step: f"step {step:.0f}", whole=True)
    svg = str(line_chart("c", "t", [line], steps, Axis("y", "linear", str)))
    assert [svg.count(f">step {step}<") for step in (1, 2, 3)] == [1, 1, 1]


def test_scales_and_ticks() -> None:
    assert Scale("log2", 256, 4096, 0, 4)(1024) == 2
    assert Scale("log2", 256, 4096, 0, 1).ticks(8) == [256, 512, 1024, 2048, 4096]
    assert Scale("linear", 0, 1, 0, 1).ticks(5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert Scale("log10", 9, 2100, 0, 1).ticks(4) == [10, 20, 50, 100, 200, 500, 1000, 2000]
    assert len(Scale("log10", 1, 1e80, 0, 1).ticks(5)) <= 6
    assert len(Scale("log2", 1, 2**40, 0, 1).ticks(8)) <= 8


def test_text_is_escaped_in_content_and_attributes() -> None:
    assert element("text", text="<script>", class_='a"b') == '<text class="a&quot;b">&lt;script&gt;</text>'


def test_shares_never_round_to_whole() -> None:
    said = {0.9996: "99.9", 1.0: "100", 0.0: "0", 0.0001: "0.1", 0.5: "50", 0.955: "95.5"}
    assert {share: percent(share).split("\N{NO-BREAK SPACE}")[0] for share in said} == said
    assert percent(0.999, digits=0).startswith("99\N{NO-BREAK SPACE}")


def test_numbers_as_words() -> None:
    assert [short_tokens(n) for n in (512, 4096, 131072, 2**20, 1000)] == ["512", "4K", "128K", "1M", "1,000"]
    assert [near_tokens(n) for n in (512, 3277, 131072, 104858, 2**20, 1572864)] == [
        "512",
        "3.2K",
        "128K",
        "102K",
        "1M",
        "1.5M",
    ]
    assert [number(x) for x in (3.1, 99.99, 1234.6, 0.0005, 0)] == ["3.10", "100", "1,235", "0.000500", "0"]
    assert [duration(s) for s in (4.25, 59.4, 185, 7620)] == ["4.2 s", "59 s", "3 min 5 s", "2 h 7 min"]
