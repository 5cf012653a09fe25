"""Charts of the report to one SVG file that stands alone: its own style, a light ground, no script. Pure.

A page that shows the file as an image gives it no style sheet, so colours and fonts are literal; they are those of the
report's page by day.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ultralong_ray.report.figures import COLOUR_STOPS, score_colour
from ultralong_ray.report.svg import element

MARGIN = 26.0
SUBTITLE_CHARACTER = 7.0  # pixels, about
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", Arial, sans-serif'
# subject's class -> colour; the model after continued pretraining alone is drawn in dashes and hollow
COLOURS = {
    "base": "#c2540a",
    "extend_128k": "#0b62a8",
    "extend_128k_long_sft": "#7a3fa0",
    "extend_1m": "#0a7a55",
    "extend_1m_long_sft": "#a0353f",
    "extend_1m_from_start_sft": "#c23a9a",
}
STYLE = f"""
text {{ font: 12px {FONT}; fill: #1b2430; }}
.chart {{ overflow: visible; }}
.title {{ font-size: 21px; font-weight: 650; }} .subtitle {{ font-size: 14px; fill: #586271; }}
.chart-title {{ font-size: 15px; font-weight: 650; }} .note {{ font-size: 12.5px; fill: #586271; }}
.legend-label {{ font-size: 13.5px; }}
.tick, .axis-label {{ fill: #586271; font-variant-numeric: tabular-nums; }}
.row-label {{ fill: #1b2430; font-size: 13px; }} .value {{ fill: #1b2430; }}
.group-label {{ font-weight: 650; font-size: 13px; fill: #586271; }}
.panel-label {{ font-weight: 650; font-size: 13px; }}
.cell-value {{ fill: #10151b; font-weight: 600; font-variant-numeric: tabular-nums; }}
.cell-value.small {{ font-size: 9px; font-weight: 400; fill-opacity: 0.6; }}
.grid {{ stroke: #dce0e6; fill: none; }} .axis {{ stroke: #586271; fill: none; }}
.guide {{ stroke: #eceff3; fill: none; }}
.missing {{ fill: none; stroke: #586271; stroke-dasharray: 3 3; }} .missing-cross {{ stroke: #586271; fill: none; }}
.failed-cross {{ stroke: #10151b; stroke-width: 1.5; fill: none; }}
.window-edge {{ stroke: #1b2430; stroke-width: 2; fill: none; }} .window-label {{ font-weight: 600; }}
.reference {{ stroke: #1b2430; stroke-width: 1.4; stroke-dasharray: 5 3; fill: none; }}
.line {{ fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke: #1b2430; }}
.interval {{ fill: none; stroke-width: 1.6; stroke-opacity: 0.55; stroke: #1b2430; stroke-linecap: round; }}
.dot {{ fill: #1b2430; stroke: #ffffff; stroke-width: 1; }}
.dot.muted {{ fill: #0b62a8; }} .interval.muted {{ stroke: #0b62a8; }}
.dot.hollow {{ fill: #ffffff; stroke: #0b62a8; stroke-width: 1.8; }}
""" + "".join(
    f".line.{name}, .interval.{name} {{ stroke: {colour}; }} .dot.{name} {{ fill: {colour}; }}\n"
    f".line.{name}.pretrained {{ stroke-dasharray: 7 4; }} "
    f".dot.{name}.pretrained {{ fill: #ffffff; stroke: {colour}; stroke-width: 1.8; }}\n"
    for name, colour in COLOURS.items()
)


@dataclass(frozen=True)
class Placed:
    """A chart of the report with a heading, drawn `scale` times as large."""

    chart: Markup
    heading: str = ""
    scale: float = 1.0

    @property
    def size(self) -> tuple[float, float]:
        """Pixels to the right and down, with the heading."""
        found = re.search(r'viewBox="0 0 (\S+) (\S+)"', self.chart)
        assert found is not None
        width, height = float(found[1]), float(found[2])
        return width * self.scale, height * self.scale + (30 if self.heading else 0)


def sheet(
    title: str,
    subtitle: str,
    charts: Sequence[Placed],
    *,
    legend: Sequence[tuple[str, str]] = (),
    ramp: bool = False,
    notes: Sequence[str] = (),
    side_by_side: bool = False,
) -> str:
    """An SVG file of charts below or beside each other. legend: (class, label) of lines; ramp: the scores' colours."""
    sizes = [chart.size for chart in charts]
    gap = 34.0
    beside = side_by_side and len(charts) > 1
    across = sum(w for w, _ in sizes) + gap * (len(sizes) - 1) if beside else max(w for w, _ in sizes)
    width = max(across, 640.0, SUBTITLE_CHARACTER * len(subtitle)) + 2 * MARGIN
    parts = [
        element("text", text=title, class_="title", x=MARGIN, y=MARGIN + 18),
        element("text", text=subtitle, class_="subtitle", x=MARGIN, y=MARGIN + 42),
    ]
    y = MARGIN + 62
    if legend:
        rows = _legend(legend, y + 8, width - MARGIN)
        parts += rows[0]
        y += rows[1]
    if ramp:
        parts += _ramp(width - MARGIN, MARGIN + 8)
    x, tallest = MARGIN, 0.0
    for chart, (wide, high) in zip(charts, sizes, strict=True):
        parts += _place(chart, x, y)
        tallest = max(tallest, high)
        if beside:
            x += wide + gap
        else:
            y += high + 12
    y += tallest + 12 if beside else 0
    for note in notes:
        parts.append(element("text", text=note, class_="note", x=MARGIN, y=y + 8))
        y += 19
    height = y + MARGIN - 8
    ground = element("rect", width=width, height=height, fill="#ffffff")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}"><style>{STYLE}</style>{ground}{"".join(parts)}</svg>\n'
    )


def _place(placed: Placed, x: float, y: float) -> list[str]:
    parts = []
    if placed.heading:
        parts.append(element("text", text=placed.heading, class_="chart-title", x=x, y=y + 16))
        y += 30
    return [*parts, element("g", placed.chart, transform=f"translate({x:g} {y:g}) scale({placed.scale:g})")]


def _legend(entries: Sequence[tuple[str, str]], y: float, right: float) -> tuple[list[str], float]:
    """Lines with their labels, in as many rows as they need, and the height of those."""
    parts, x, first = [], MARGIN, y
    for class_, label in entries:
        wide = 44 + 7.1 * len(label)
        if x + wide > right and x > MARGIN:
            x, y = MARGIN, y + 22
        parts.append(element("path", d=f"M{x:g} {y:g}h30", class_=f"line {class_}"))
        parts.append(element("circle", cx=x + 15, cy=y, r=3.6, class_=f"dot {class_}"))
        place = {"x": x + 37, "y": y, "dominant_baseline": "central"}
        parts.append(element("text", text=label, class_="legend-label", **place))
        x += wide + 16
    return parts, y - first + 32


def _ramp(right: float, y: float) -> list[str]:
    """The scores' colours from 0 to 100 %, ending at `right`."""
    stops = [element("stop", offset=share, stop_color=score_colour(share)) for share, _ in COLOUR_STOPS]
    left = right - 180
    labels = [("0 %", left, "start"), ("right answers", left + 90, "middle"), ("100 %", right, "end")]
    return [
        element("defs", element("linearGradient", *stops, id="ramp")),
        element("rect", x=left, y=y, width=180, height=12, rx=3, fill="url(#ramp)"),
        *(element("text", text=text, class_="tick", x=x, y=y + 28, text_anchor=anchor) for text, x, anchor in labels),
    ]
