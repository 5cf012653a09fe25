"""Confidence intervals against values worked out elsewhere, and what must hold of any."""

from __future__ import annotations

import pytest

from ultralong_ray.report.intervals import difference, interval, stratified, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (450, 500, 0.8706, 0.9233),
    ],
)
def test_wilson(right: float, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_the_kind_follows_the_scores() -> None:
    assert interval([1.0, 0.0, 1.0])[2] == "wilson"
    low, high, kind = interval([0.25, 0.5, 1.0, 0.75] * 10)
    assert kind == "bootstrap" and 0.5 < low < 0.625 < high < 0.75
    assert interval([0.5, 0.5])[:2] == (0.5, 0.5)


def test_strata_are_drawn_from_their_own_samples() -> None:
    assert stratified([[1.0] * 9, [0.0] * 3]) == (0.5, 0.5), "tasks that never vary leave nothing to chance"
    assert stratified([[0.0, 1.0] * 20, [0.5] * 5]) == stratified([[0.0, 1.0] * 20, [0.5] * 5])


def test_pairs_make_a_difference_sharper() -> None:
    first = [0.0, 1.0] * 50
    second = [min(1.0, score + 0.1) for score in first]
    paired, unpaired = difference(first, second, paired=True), difference(first, second, paired=False)
    assert paired[0] > 0 > unpaired[0] and unpaired[1] > paired[1]
