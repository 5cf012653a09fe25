"""Confidence intervals against values worked out elsewhere, and what must hold of any."""

from __future__ import annotations

import pytest

from ultralong_ray.report.intervals import combined, difference, drawn_difference, interval, newcombe, resampled, wilson


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


@pytest.mark.parametrize("scores", [[0.3], [0.5] * 4, [0.1] * 13])
def test_scores_that_are_all_the_same_leave_doubt(scores: list[float]) -> None:
    low, high, kind = interval(scores)
    assert kind == "wilson" and (low, high) == wilson(sum(scores), len(scores))
    assert high - low > 0.2 and low < scores[0] < high
    low, high = combined([scores] * 13)
    assert low < scores[0] - 0.02 < scores[0] + 0.02 < high


def test_losses_that_are_all_the_same_have_no_interval() -> None:
    """A loss has no bound, so one document says nothing of another."""
    assert resampled([2.5]) is None and resampled([2.1] * 3) is None
    assert resampled([2.0, 3.0]) == (2.0, 3.0)
    assert drawn_difference([2.5], [2.0], paired=True) is None
    assert drawn_difference([2.5], [2.0, 3.0], paired=False) is None
    assert drawn_difference([2.5, 2.6], [2.0, 3.0], paired=True) is not None


def test_means_over_tasks_combine_the_intervals_of_the_tasks() -> None:
    one = [1.0] * 3 + [0.0] * 7
    assert combined([one]) == pytest.approx(wilson(3, 10)), "of one task it is the task's own"
    low, high = combined([[0.0] * 10] * 4)
    assert low == 0.0 and high == pytest.approx(wilson(0, 10)[1] / 2), "all wrong is not certain, and four tell more"
    low, high = combined([[1.0] * 9, [0.0] * 3])
    assert low == pytest.approx(0.5 - (1 - wilson(9, 9)[0]) / 2) and high == pytest.approx(0.5 + wilson(0, 3)[1] / 2)
    assert combined([[0.25, 0.5, 1.0] * 20, one]) == combined([[0.25, 0.5, 1.0] * 20, one])


def test_pairs_make_a_difference_sharper() -> None:
    first = [0.0, 1.0] * 50
    second = [min(1.0, score + 0.1) for score in first]
    paired, unpaired = difference(first, second, paired=True), difference(first, second, paired=False)
    assert paired[0] > 0 > unpaired[0] and unpaired[1] > paired[1]


def test_newcombes_interval_of_a_difference_of_shares() -> None:
    """His example (1998, table II, case a): 56 of 70 less 48 of 80."""
    first, second = [1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14
    assert newcombe(first, second) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert newcombe([1.0] * 10, [0.0] * 10) == pytest.approx((-1.0, -0.6075), abs=5e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_samples_that_all_agree_leave_doubt_about_a_difference(paired: bool) -> None:
    low, high = difference([0.0] * 5, [1.0] * 5, paired=paired)
    assert 0.2 < low < 0.5 and high == 1.0
    assert difference([0.0] * 9, [0.0] * 9, paired=paired) == pytest.approx((-wilson(0, 9)[1], wilson(0, 9)[1]))
    low, high = difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], paired=True)
    assert low == -high < -0.3
    low, high = difference([0.2, 0.5, 0.3, 0.4], [0.6, 0.9, 0.7, 0.8], paired=True)
    assert low < 0 < 0.7 < high, "four pairs that all differ by 0.4"
    assert difference([0.25] * 3, [0.5] * 3, paired=paired) == newcombe([0.25] * 3, [0.5] * 3)
    some = [0.0] * 50 + [1.0] * 50
    assert difference(some, [1.0] * 10 + some[10:], paired=True)[0] > 0.04, "pairs that do not all agree stay sharp"
