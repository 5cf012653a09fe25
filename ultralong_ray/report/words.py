"""Numbers as a reader sees them. Pure: a number in, a few characters out, a dash for a number that is not there."""

from __future__ import annotations

ABSENT = "\N{EN DASH}"
UNIT = "\N{NO-BREAK SPACE}%"  # a line never ends between a number and its sign


def percent(share: float | None, digits: int = 1) -> str:
    """0 to 1 as per cent. A share that is not whole never reads as 0 % or 100 %: rounding must not hide a failure."""
    if share is None:
        return ABSENT
    step = 10.0**-digits
    value = round(100 * share, digits)
    if value >= 100 and share < 1:
        value = 100 - step
    if value <= 0 < share:
        value = step
    return f"{value:.{digits}f}".removesuffix("." + "0" * digits) + UNIT


def tokens(count: float | None) -> str:
    """A token count in full, with thousands separators."""
    return ABSENT if count is None else f"{round(count):,}"


def short_tokens(count: int) -> str:
    """A context length as people say it: 4K for 4,096, 1M for 1,048,576; other lengths in full."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if count >= size and count % size == 0:
            return f"{count // size}{letter}"
    return f"{count:,}"


def near_tokens(count: int) -> str:
    """A context length to three figures, on an axis that has others: 3.2K for 3,277, 128K, 1M."""
    if count < 2**10 or count % 2**20 == 0:
        return short_tokens(count)
    return f"{count / 2**10:.3g}K" if count < 2**20 else f"{count / 2**20:.3g}M"


def number(value: float | None) -> str:
    """A measured quantity to three significant figures, whole numbers from 100 on, scientific where tiny."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value == 0 or abs(value) >= 99.95 else f"{value:#.3g}"


def tick(value: float) -> str:
    """A round value on an axis, no longer than it has to be."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Seconds as "42 s", "3 min 5 s" or "2 h 7 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
