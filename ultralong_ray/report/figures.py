"""Numbers of report.json in, inline SVG out: passkey heatmap, line charts, length histogram. Pure.

The heatmap follows the custom of needle-in-a-haystack plots (Greg Kamradt, LLMTest_NeedleInAHaystack): context length
to the right, depth downwards, red through yellow to green. Its three colour stops are that repository's; since red and
green look alike to some eyes, the score is also printed in the cell, or shown on hover where cells are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from ultralong_ray.report.svg import Scale, ScaleKind, element, figure
from ultralong_ray.report.words import UNIT, percent, short_tokens, tokens

COLOUR_STOPS = ((0.0, (0xF0, 0x49, 0x6E)), (0.5, (0xEB, 0xB8, 0x39)), (1.0, (0x0C, 0xD7, 0x9F)))
PRINTED_VALUE_PIXELS = 26  # narrower cells have no room for "100"
PASSKEY = "Passkey retrieval"
CAPTION_PIXELS = 156.0  # about, of "context length, tokens"
EDGE_LABEL_PIXELS = 8.0  # about, of a letter of the label of the base window
LABEL_PIXELS = 6.5  # about, of a character at a tick
MAX_POINTS = 600  # per drawn line; report.json keeps every step


def score_colour(score: float) -> str:
    """0 to 1 as #rrggbb between the three stops."""
    for (low, from_rgb), (high, to_rgb) in pairwise(COLOUR_STOPS):
        if score <= high:
            t = (score - low) / (high - low)
            return "#" + "".join(f"{round(a + t * (b - a)):02x}" for a, b in zip(from_rgb, to_rgb, strict=True))
    raise ValueError(f"score {score} is above 1")


def answers_anchor(model: str, length: int, depth: float) -> str:
    """Where the page has the answers of a passkey cell."""
    return f"p-{model}-{length}-{depth:g}"


def heatmap(
    grid: dict[str, Any],
    passkey: dict[str, Any],
    what: str = PASSKEY,
    write_length: Callable[[int], str] = short_tokens,
) -> Markup:
    """One model's grid (`evaluation.passkey_facts`). Missing cells are hollow and crossed out, failed ones red.

    A cell of the passkey grid leads to its answers. It takes no keyboard focus: the list of answers itself does.
    """
    lengths, depths = passkey["context_lengths_tokens"], passkey["depths_percent"]
    cell_width = 44 if len(lengths) <= 10 else 34 if len(lengths) <= 20 else 27
    cell_height = 32 if len(depths) <= 8 else 25
    left = max(50, 14 + LABEL_PIXELS * max((len(f"{depth:g} %") for depth in depths), default=0))
    top, turned = 24, cell_width < 40
    right, bottom = left + cell_width * len(lengths), top + cell_height * len(depths)
    parts = []
    for row, depth in enumerate(depths):
        y = top + row * cell_height
        parts.append(
            element(
                "text",
                text=f"{depth:g} %",
                class_="tick",
                x=left - 7,
                y=y + cell_height / 2,
                text_anchor="end",
                dominant_baseline="central",
            )
        )
        for column, length in enumerate(lengths):
            x = left + column * cell_width
            drawn = _cell(grid["cells"][row][column], length, depth, x, y, cell_width, cell_height)
            if what == PASSKEY and grid["cells"][row][column] is not None:
                drawn = element("a", drawn, href=f"#{answers_anchor(grid['model'], length, depth)}", tabindex="-1")
            parts.append(drawn)
    for column, length in enumerate(lengths):
        x = left + (column + 0.5) * cell_width
        parts.append(_length_label(write_length(length), x, bottom + (10 if turned else 17), turned))
    label_depth = _turned_pixels(map(write_length, lengths)) if turned else 26
    parts += [
        element(
            "text",
            text="context length, tokens",
            class_="axis-label",
            x=max(right, CAPTION_PIXELS),
            y=bottom + label_depth + 14,
            text_anchor="end",
        ),
        element("text", text="depth", class_="axis-label", x=left - 7, y=top - 9, text_anchor="end"),
        *_window_edge(passkey["base_window_tokens"], lengths, left, cell_width, top, bottom),
    ]
    title = f"{what}, {grid['label']}"
    description = (
        f"Share of right answers by context length and depth of the needle. Mean {percent(grid['mean'])}, within the "
        f"base window {percent(grid['mean_within_base_window'])}, beyond it {percent(grid['mean_beyond_base_window'])}."
    )
    identity = f"heatmap-{grid['model']}" + ("" if what == PASSKEY else f"-{what.replace(' ', '-')}")
    # the caption and the label of the edge may reach beyond a grid of few columns
    width = max(right + 12, CAPTION_PIXELS, _edge_label_end(passkey["base_window_tokens"], lengths, left, cell_width))
    return figure(identity, title, description, width, bottom + label_depth + 22, parts)


def _turned_pixels(labels: Iterable[str]) -> float:
    """Room below the axis for labels turned by 60 degrees."""
    return 22 + max(map(len, labels)) * LABEL_PIXELS * math.sin(math.radians(60))


def _length_label(text: str, x: float, y: float, turned: bool) -> str:
    if not turned:
        return element("text", text=text, class_="tick", x=x, y=y, text_anchor="middle")
    return element(
        "text", text=text, class_="tick", text_anchor="end", transform=f"translate({x + 4:g} {y:g}) rotate(-60)"
    )


def _cell(
    cell: dict[str, Any] | None, length: int, depth: float, x: float, y: float, width: float, height: float
) -> str:
    where = f"{tokens(length)} tokens, depth {depth:g} %"
    box: dict[str, Any] = {"x": x + 0.75, "y": y + 0.75, "width": width - 1.5, "height": height - 1.5, "rx": 2.0}
    if cell is None:
        cross = element("path", d=f"M{x + 8:g} {y + 8:g}L{x + width - 8:g} {y + height - 8:g}", class_="missing-cross")
        return element("g", element("title", text=f"{where}: missing"), element("rect", class_="missing", **box), cross)
    if cell.get("failed"):
        cross = element("path", d=f"M{x + 6:g} {y + 6:g}L{x + width - 6:g} {y + height - 6:g}", class_="failed-cross")
        box["fill"] = score_colour(0.0)
        title = element("title", text=f"{where}: failed, counts 0: {cell['failed'][:200]}")
        return element("g", title, element("rect", class_="cell", **box), cross)
    counted = f" ({cell['num_right']} of {cell['num_samples']} right)" if cell["num_samples"] else ""
    parts = [
        element("title", text=f"{where}: {percent(cell['score'])}{counted}"),
        element("rect", class_="cell", fill=score_colour(cell["score"]), **box),
    ]
    if width >= PRINTED_VALUE_PIXELS:
        value = percent(cell["score"], digits=0).removesuffix(UNIT)
        parts.append(
            element(
                "text",
                text=value,
                class_="cell-value" if width >= 34 else "cell-value small",
                x=x + width / 2,
                y=y + height / 2,
                text_anchor="middle",
                dominant_baseline="central",
            )
        )
    return element("g", *parts)


def _edge_label(window: int) -> str:
    return f"base window {tokens(window)}"


def _edge_place(window: int, lengths: list[int], left: float, width: float) -> tuple[float, bool]:
    """x of the line after the last length that the base model claims to read; whether its label stands before it."""
    within = sum(length <= window for length in lengths)
    x = left + within * width
    return x, within > len(lengths) / 2 and x > EDGE_LABEL_PIXELS * len(_edge_label(window)) + left


def _edge_label_end(window: int, lengths: list[int], left: float, width: float) -> float:
    x, before = _edge_place(window, lengths, left, width)
    return 0.0 if before else x + 5 + EDGE_LABEL_PIXELS * len(_edge_label(window))


def _window_edge(window: int, lengths: list[int], left: float, width: float, top: float, bottom: float) -> list[str]:
    x, before = _edge_place(window, lengths, left, width)
    return [
        element("path", d=f"M{x:g} {top - 16:g}V{bottom + 4:g}", class_="window-edge"),
        element(
            "text",
            text=_edge_label(window),
            class_="window-label",
            x=x - 5 if before else x + 5,
            y=top - 8,
            text_anchor="end" if before else "start",
        ),
    ]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; a None in `ys` interrupts it. `style` is a class of the style sheet that sets colour and dashes.

    `bounds`: (low, high) of the interval of every point, or none at all. `aside`: pixels that it is drawn to the right.
    """

    label: str
    style: str
    xs: list[float]
    ys: list[float | None]
    bounds: list[tuple[float, float]] = field(default_factory=list)
    aside: float = 0.0


@dataclass(frozen=True, slots=True)
class Axis:
    """Its caption, scale and how a value is written at a tick."""

    label: str
    kind: ScaleKind
    write: Callable[[float], str]
    from_zero: bool = False
    whole: bool = False  # between whole numbers there is nothing


def line_chart(
    identity: str,
    title: str,
    lines: list[Line],
    x: Axis,
    y: Axis,
    *,
    height: float = 250,
    width: float = 560,
    edge: int | None = None,
) -> Markup:
    """Curves over one pair of axes; `edge` marks a position on x, the base window. Empty when no point is finite."""
    points = [(px, py) for line in lines for px, py in zip(line.xs, line.ys, strict=True) if py is not None]
    if not points:
        return Markup("")
    left, right, top, bottom = 58.0, width - 12, 26.0, height - 42
    beside = max(abs(line.aside) for line in lines)
    across = _scale(x, [p[0] for p in points], left + beside, right - beside, padded=False)
    bounds = [bound for line in lines for pair in line.bounds for bound in pair]
    up = _scale(y, [*(p[1] for p in points), *bounds], bottom, top, padded=True)
    parts = _frame(across, up, x, y, (left, right), ticks_up=max(2, round((bottom - top) / 30)))
    if edge is not None and across.low <= edge <= across.high:
        at = across(edge)
        anchor, aside = ("end", -5) if at > right - EDGE_LABEL_PIXELS * len(_edge_label(edge)) else ("start", 5)
        place = {"x": at + aside, "y": top - 6, "text_anchor": anchor}
        parts.append(element("path", d=f"M{at:.1f} {top - 14:g}V{bottom:g}", class_="window-edge"))
        parts.append(element("text", text=_edge_label(edge), class_="window-label", **place))
    for line in lines:
        parts += _curve(line, across, up, x, y)
    values = [p[1] for p in points]
    description = (
        f"{y.label} against {x.label}: {', '.join(line.label for line in lines)}. From {y.write(min(values))} to "
        f"{y.write(max(values))}."
    )
    return figure(identity, title, description, width, height, parts)


def _scale(axis: Axis, values: list[float], start: float, end: float, *, padded: bool) -> Scale:
    low, high = min(values), max(values)
    if axis.from_zero:
        low = min(low, 0.0)
    if padded and axis.kind == "linear":
        margin = 0.06 * ((high - low) or abs(high) or 1.0)
        low, high = (low if axis.from_zero else low - margin), high + margin
    elif padded:
        low, high = low / 1.15, high * 1.15
    return Scale(axis.kind, low, high, start, end)


def _frame(across: Scale, up: Scale, x: Axis, y: Axis, ends: tuple[float, float], ticks_up: int) -> list[str]:
    """Grid lines, tick labels and axis captions. ends: pixels on the left and on the right, points aside included."""
    (left, right), bottom, top = ends, up.start, up.end
    parts = []
    for tick in up.ticks(ticks_up):
        at = up(tick)
        parts.append(element("path", d=f"M{left:g} {at:.1f}H{right:g}", class_="grid"))
        parts.append(
            element(
                "text",
                text=y.write(tick),
                class_="tick",
                x=left - 7,
                y=at,
                text_anchor="end",
                dominant_baseline="central",
            )
        )
    for tick in across.ticks(8):
        if x.whole and not float(tick).is_integer():
            continue
        at = across(tick)
        parts.append(element("path", d=f"M{at:.1f} {bottom:g}v4", class_="axis"))
        parts.append(element("text", text=x.write(tick), class_="tick", x=at, y=bottom + 17, text_anchor="middle"))
    return [
        *parts,
        element("path", d=f"M{left:g} {bottom:g}H{right:g}", class_="axis"),
        element("text", text=x.label, class_="axis-label", x=right, y=bottom + 34, text_anchor="end"),
        element("text", text=y.label, class_="axis-label", x=2, y=top - 17),
    ]


def _curve(line: Line, across: Scale, up: Scale, x: Axis, y: Axis) -> list[str]:
    """The line, interrupted where a value is missing, and a dot with its value on hover where there are few."""
    across = replace(across, start=across.start + line.aside, end=across.end + line.aside)
    stride = -(-len(line.xs) // MAX_POINTS)
    points = list(zip(line.xs, line.ys, strict=True))
    drawn = [*points[:-1:stride], points[-1]]
    path, pen_down = [], False
    for px, py in drawn:
        if py is not None:
            path.append(f"{'L' if pen_down else 'M'}{across(px):.1f} {up(py):.1f}")
        pen_down = py is not None
    parts = [
        element("path", d=f"M{across(px):.1f} {up(low):.1f}V{up(high):.1f}", class_=f"interval {line.style}")
        for px, (low, high) in zip(line.xs, line.bounds, strict=False)
    ]
    parts.append(element("path", d="".join(path), class_=f"line {line.style}"))
    if len(drawn) <= 64:
        parts += [
            element(
                "circle",
                element("title", text=f"{line.label}, {x.label} {x.write(px)}: {y.write(py)}"),
                cx=across(px),
                cy=up(py),
                r=2.6,
                class_=f"dot {line.style}",
            )
            for px, py in drawn
            if py is not None
        ]
    return parts


def length_histogram(identity: str, title: str, labels: list[str], before: list[float], after: list[float]) -> Markup:
    """Shares of tokens by document length, corpus beside packed sequences. `labels` name the buckets."""
    top_share = max([*before, *after], default=0.0)
    if not top_share:
        return Markup("")
    left, right, top, bottom = 40.0, 380.0, 16.0, 150.0
    up = Scale("linear", 0.0, top_share, bottom, top)
    parts = []
    for tick in up.ticks(3):
        at = up(tick)
        parts.append(element("path", d=f"M{left:g} {at:.1f}H{right:g}", class_="grid"))
        parts.append(
            element(
                "text",
                text=percent(tick, 0),
                class_="tick",
                x=left - 6,
                y=at,
                text_anchor="end",
                dominant_baseline="central",
            )
        )
    step = (right - left) / len(labels)
    for index, label in enumerate(labels):
        for offset, name, shares in ((0.12, "before", before), (0.5, "after", after)):
            share = shares[index] if index < len(shares) else 0.0
            value = element("title", text=f"{label} tokens, {name}: {percent(share)} of tokens")
            parts.append(
                element(
                    "rect",
                    value,
                    x=left + (index + offset) * step,
                    y=up(share),
                    width=0.36 * step,
                    height=bottom - up(share),
                    class_=f"bar-{name}",
                )
            )
        parts.append(_length_label(label, left + (index + 0.5) * step, bottom + 12, turned=True))
    parts.append(element("path", d=f"M{left:g} {bottom:g}H{right:g}", class_="axis"))
    description = "Share of tokens by document length in tokens, before and after sampling: " + "; ".join(
        f"{label} {percent(b)} and {percent(a)}" for label, b, a in zip(labels, before, after, strict=False)
    )
    return figure(identity, title, description, 390, bottom + _turned_pixels(labels), parts)
