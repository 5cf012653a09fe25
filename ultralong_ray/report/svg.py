"""Small parts of charts: escaped SVG elements, scales and ticks. Pure text and arithmetic, no drawing library.

Colours and fonts are classes that the page's style sheet fills, so that one chart serves light, dark and paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Literal

from markupsafe import Markup

ScaleKind = Literal["linear", "log2", "log10"]


def element(name: str, *children: str, text: str | None = None, **attributes: str | float) -> str:
    """One SVG element. Text and attribute values are escaped; children are elements already.

    `class_` is written as class, and underscores in attribute names as hyphens.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items()
    )
    inner = (escape(text) if text is not None else "") + "".join(children)
    return f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>"


def _attribute(value: str | float) -> str:
    return escape(value) if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")


def figure(identity: str, title: str, description: str, width: float, height: float, children: list[str]) -> Markup:
    """An accessible <svg>: `identity` must be unique on the page, as title and description are found by it."""
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'aria-labelledby="{escape(identity)}-title {escape(identity)}-desc" xmlns="http://www.w3.org/2000/svg">'
        + element("title", text=title, id=f"{identity}-title")
        + element("desc", text=description, id=f"{identity}-desc")
        + "".join(children)
        + "</svg>"
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] to pixels [start, end]; log scales need low > 0."""

    kind: ScaleKind
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        low, high, at = (self._forward(v) for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)

    def _forward(self, value: float) -> float:
        return value if self.kind == "linear" else math.log2(value) if self.kind == "log2" else math.log10(value)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within [low, high]."""
        if self.kind == "log2":
            return _powers_of_two(self.low, self.high, count)
        if self.kind == "log10":
            return _round_decades(self.low, self.high, count)
        step = _round_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(index * step, 12) for index in range(first, last + 1)]


def _round_step(rough: float) -> float:
    """The 1, 2 or 5 times a power of ten at or above `rough`."""
    if rough <= 0:
        return 1.0
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * (1 - 1e-9))


def _powers_of_two(low: float, high: float, count: int) -> list[float]:
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    stride = max(1, math.ceil((last - first + 1) / max(count, 1)))
    return [2.0**exponent for exponent in range(first, last + 1, stride)]


def _round_decades(low: float, high: float, count: int) -> list[float]:
    """1-2-5 steps where they fit, else powers of ten, else every second, third, ... power."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in ((1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in mantissas]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= 2 * count:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]
