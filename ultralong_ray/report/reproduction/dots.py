"""Means with intervals, one row each, in panels that share the rows. Pure: numbers in, inline SVG out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ultralong_ray.report.svg import Scale, ScaleKind, element, figure

LABELS, PANEL, GAP, ROW, MARK, HEADING = 204.0, 208.0, 66.0, 17.0, 8.0, 34.0  # pixels
TOP, BOTTOM = 34.0, 34.0


@dataclass(frozen=True, slots=True)
class Mark:
    """A mean with its interval, if it has one. `style` is a class of the style sheet; `words` are shown on hover."""

    value: float
    low: float | None
    high: float | None
    style: str
    words: str


@dataclass(frozen=True, slots=True)
class Row:
    """`marks[p]`: those of panel p. A row without any is a heading."""

    label: str
    marks: tuple[tuple[Mark, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """A column of the chart: what it shows, how a value is written, and the value that others are held against."""

    title: str
    write: Callable[[float], str]
    kind: ScaleKind = "linear"
    reference: float | None = None
    limits: tuple[float, float] | None = None
    """Default: the smallest and the largest value or bound. A mean beyond them is an arrow at the edge."""


def dot_chart(identity: str, title: str, description: str, rows: Sequence[Row], panels: Sequence[Panel]) -> Markup:
    """Rows from top to bottom; means are written beside the panels where no row has several marks."""
    written = all(len(marks) <= 1 for row in rows for marks in row.marks)
    heights = [ROW + MARK * max(map(len, row.marks)) if row.marks else HEADING for row in rows]
    bottom = TOP + sum(heights)
    scales = [_scale(panel, index, rows) for index, panel in enumerate(panels)]
    parts = [part for panel, scale in zip(panels, scales, strict=True) for part in _frame(panel, scale, bottom)]
    y = TOP
    for row, height in zip(rows, heights, strict=True):
        class_ = "tick row-label" if row.marks else "group-label"
        middle = y + height / 2 if row.marks else y + height - 9
        parts.append(element("text", text=row.label, class_=class_, x=0, y=middle, dominant_baseline="central"))
        for panel, scale, marks in zip(panels, scales, row.marks, strict=False):
            guide = f"M{scale.start:g} {middle:g}H{scale.end:g}"
            parts.append(element("path", d=guide, class_="guide"))
            parts += _marks(panel, scale, marks, middle)
            if written and marks:
                place = {"x": scale.end + 52, "y": middle, "text_anchor": "end", "dominant_baseline": "central"}
                parts.append(element("text", text=panel.write(marks[0].value), class_="tick value", **place))
        y += height
    width = LABELS + len(panels) * (PANEL + GAP) - 8
    return figure(identity, title, description, width, bottom + BOTTOM, parts)


def _scale(panel: Panel, index: int, rows: Sequence[Row]) -> Scale:
    marks = [mark for row in rows if row.marks for mark in row.marks[index]]
    values = [v for m in marks for v in (m.value, m.low, m.high) if v is not None and _has_place(panel.kind, v)]
    if panel.reference is not None:
        values.append(panel.reference)
    low, high = panel.limits or (min(values, default=0.0), max(values, default=1.0))
    if panel.limits is None and panel.kind == "linear":
        margin = 0.04 * ((high - low) or abs(high) or 1.0)
        low, high = low - margin, high + margin
    elif panel.limits is None:
        low, high = low / 1.1, high * 1.1
    start = LABELS + index * (PANEL + GAP)
    return Scale(panel.kind, low, high, start, start + PANEL)


def _has_place(kind: ScaleKind, value: float) -> bool:
    return kind == "linear" or value > 0


def _frame(panel: Panel, scale: Scale, bottom: float) -> list[str]:
    """Caption, grid lines with their values below, and the line of the reference."""
    caption = {"x": (scale.start + scale.end) / 2, "y": 14.0, "text_anchor": "middle"}
    parts = [element("text", text=panel.title, class_="panel-label", **caption)]
    for tick in _ticks(scale):
        at = scale(tick)
        parts.append(element("path", d=f"M{at:.1f} {TOP - 8:g}V{bottom + 6:g}", class_="grid"))
        label = {"x": at, "y": bottom + 22, "text_anchor": "middle"}
        parts.append(element("text", text=panel.write(tick), class_="tick", **label))
    if panel.reference is not None:
        at = scale(panel.reference)
        parts.append(element("path", d=f"M{at:.1f} {TOP - 12:g}V{bottom + 6:g}", class_="reference"))
    return parts


def _ticks(scale: Scale) -> list[float]:
    """At least two where there are any: one number does not tell how far apart values are."""
    few = scale.ticks(4 if scale.kind == "linear" else 2)
    return few if len(few) > 1 else scale.ticks(8)


def _marks(panel: Panel, scale: Scale, marks: Sequence[Mark], middle: float) -> list[str]:
    parts = []
    for index, mark in enumerate(marks):
        y = middle + MARK * (index - (len(marks) - 1) / 2)
        if mark.low is not None and mark.high is not None:
            # an interval may pass what can be: 0 and 1 of a share, 0 of a perplexity
            ends = [scale(v) if _has_place(panel.kind, v) else scale.start for v in (mark.low, mark.high)]
            low, high = (min(max(end, scale.start), scale.end) for end in ends)
            parts.append(element("path", d=f"M{low:.1f} {y:.1f}H{high:.1f}", class_=f"interval {mark.style}"))
        title = element("title", text=mark.words)
        if scale.low <= mark.value <= scale.high:
            parts.append(element("circle", title, cx=scale(mark.value), cy=y, r=4.2, class_=f"dot {mark.style}"))
        else:
            tip, back = (scale.end, -9) if mark.value > scale.high else (scale.start, 9)
            arrow = f"M{tip:g} {y:g}l{back} -5v10z"
            parts.append(element("path", title, d=arrow, class_=f"dot beyond {mark.style}"))
    return parts
