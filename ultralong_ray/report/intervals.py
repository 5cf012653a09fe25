"""95 % confidence intervals of scores between 0 and 1. Pure: sample scores in, (low, high) out.

Where every score is 0 or 1 the interval is Wilson's (JASA 22, 1927), which stays sensible at 0 and at 1 and for few
samples. Where scores lie between it is the percentile bootstrap over samples (Efron, 1979) with a fixed seed; samples
that all score alike give that no width, and then it is Wilson's too, which is rather too wide: a score between 0 and 1
of mean p has a variance of at most p (1 - p), that of a share. For means over tasks the tasks' own intervals are
combined by Zou and Donner's method of variance estimates recovery (Statistics in Medicine 27, 2008), so that a mean of
tasks which are all 0 does not look certain. Differences have the bootstrap; where it has no width, they have Newcombe's
hybrid of the two Wilson intervals (Statistics in Medicine 17, 1998, method 10). Losses have no bound: where the
bootstrap has no width, they have no interval. Means over trainings with different seeds have Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
# Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
DRAWS = 1000
WORDS = (
    "95 % intervals: Wilson's where every sample is right or wrong, else the percentile bootstrap over samples "
    f"({DRAWS} draws, fixed seed); for means over tasks those of the tasks, combined by variance estimates recovery"
)
ALIKE_WORDS = "where all samples score alike, so that the bootstrap has no width, it is Wilson's too"
DIFFERENCE_WORDS = (
    f"percentile bootstrap ({DRAWS} draws, fixed seed), over pairs of samples where both models were asked the same "
    "ones; where all agree, so that it has no width, Newcombe's from the two Wilson intervals, without pairs, and of "
    "losses none"
)
DUST = 1e-9  # what rounding makes of equal scores
Kind = Literal["wilson", "bootstrap"]


def interval(scores: Sequence[float]) -> tuple[float, float, Kind]:
    """(low, high, which) of the mean of at least one score."""
    drawn = None if all(score in (0.0, 1.0) for score in scores) else resampled(scores)
    return (*wilson(sum(scores), len(scores)), "wilson") if drawn is None else (*drawn, "bootstrap")


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, z2 = right / count, Z_95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def of_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean of a few independent runs; None for one run, which has no spread.

    Runs of one value give it no width: that is what was seen, and no proof that another would have it too.
    """
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / freedom
    half = T_95[min(freedom, len(T_95)) - 1] * math.sqrt(variance / len(values))  # wide for more than eleven runs
    return mean - half, mean + half


def resampled(scores: Sequence[float]) -> tuple[float, float] | None:
    """Percentile bootstrap of the mean of scores or losses; None where it has no width, as of a single one."""
    return _middle(_drawn_means(scores, np.random.default_rng(0)))


def combined(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Of the plain mean of the groups' means, from the interval of each; the groups are independent."""
    means = [sum(group) / len(group) for group in groups]
    ends = [interval(group) for group in groups]
    mean = sum(means) / len(means)
    below = math.hypot(*(value - low for value, (low, _, _) in zip(means, ends, strict=True))) / len(means)
    above = math.hypot(*(high - value for value, (_, high, _) in zip(means, ends, strict=True))) / len(means)
    return mean - below, mean + above


def difference(first: Sequence[float], second: Sequence[float], *, paired: bool) -> tuple[float, float]:
    """Of mean(second) - mean(first). `paired`: scores at the same place are of the same question.

    A bootstrap of samples that all agree has no width, as if few of them left no doubt: it is then Newcombe's, which is
    of independent samples and for pairs rather too wide than too narrow.
    """
    return drawn_difference(first, second, paired=paired) or newcombe(first, second)


def drawn_difference(first: Sequence[float], second: Sequence[float], *, paired: bool) -> tuple[float, float] | None:
    """The percentile bootstrap of `difference`, of losses too; None where it has no width or a side is a single one."""
    if min(len(first), len(second)) < 2:
        return None
    rng = np.random.default_rng(0)
    if paired:
        return _middle(_drawn_means([b - a for a, b in zip(first, second, strict=True)], rng))
    return _middle(_drawn_means(second, rng) - _drawn_means(first, rng))


def newcombe(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Of the difference of two shares, from Wilson's interval of each; too wide where scores lie between 0 and 1."""
    a, b = sum(first) / len(first), sum(second) / len(second)
    (a_low, a_high), (b_low, b_high) = (wilson(sum(scores), len(scores)) for scores in (first, second))
    return b - a - math.hypot(b - b_low, a_high - a), b - a + math.hypot(b_high - b, a - a_low)


def _drawn_means(scores: Sequence[float], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of DRAWS draws of as many scores, with replacement. Returns: [DRAWS]."""
    values = np.asarray(scores, dtype=np.float64)
    # how often each sample is drawn takes less room than the draws themselves
    counts = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=DRAWS)  # [DRAWS, samples]
    return counts @ values / len(values)


def _middle(means: NDArray[np.float64]) -> tuple[float, float] | None:
    low, high = np.percentile(means, [2.5, 97.5])
    return (float(low), float(high)) if high - low > DUST else None
