"""How many units of haystack fill a token budget: a search that reads the whole prompt a few times only.

In go a function from a number of units to a `Sample`, a `Prompts` and a budget; out comes the longest sample that fits.
RULER tokenises the whole prompt at each of 15 to 20 probes. Here the probes are counted by words that are remembered
(`Prompts.estimate`), and only what the estimate proposes is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.types import UserError

MAX_CORRECTIONS = 8  # of the estimate by a whole tokenisation; two are usual


class DoesNotFit(UserError):
    """Not even the smallest form of a task leaves room for its answer."""


def fill(
    build: Callable[[int], Sample], prompts: Prompts, length_tokens: int, *, least: int, most: int | None = None
) -> Sample:
    """The sample of the most units, `least` to `most`, with prompt tokens + `max_new_tokens` <= `length_tokens`.

    `build(units)` must grow with its argument. The result stays below the length by less than one unit wherever the
    tokens of units add up.

    Raises: DoesNotFit when the sample of `least` units is too long.
    """
    best = _measured(prompts, build(least))
    if _needed(best) > length_tokens:
        raise DoesNotFit(
            f"{best.task}: {length_tokens} tokens are too few with this tokenizer; the shortest prompt and its answer "
            f"take {_needed(best)}. Ask for a longer context, or leave the task out"
        )
    units, best_units, tried = least, least, {least}
    error = best.prompt_tokens - prompts.estimate(prompts.text(best))
    for _ in range(MAX_CORRECTIONS):
        units, estimated = _largest(build, prompts, length_tokens - error, best_units, units, most)
        if units in tried:
            break
        tried.add(units)
        sample = _measured(prompts, build(units))
        if _needed(sample) <= length_tokens and units > best_units:
            best, best_units = sample, units
        if _needed(sample) - estimated == error:
            break
        error = _needed(sample) - estimated
    return best


def _needed(sample: Sample) -> int:
    """Tokens of a measured sample's prompt and answer."""
    return sample.prompt_tokens + sample.max_new_tokens


def _measured(prompts: Prompts, sample: Sample) -> Sample:
    measured = prompts.measured(sample)
    return replace(measured, facts={**measured.facts, "length_tokens": _needed(measured)})


def _largest(
    build: Callable[[int], Sample], prompts: Prompts, target: int, least: int, guess: int, most: int | None
) -> tuple[int, int]:
    """(units, estimate) of the largest sample that takes, answer included, about `target`; `least` where none does.

    Begins at `guess`. Interpolates, since tokens are nearly proportional to units, and halves the interval every third
    time.
    """

    def estimate(units: int) -> int:
        sample = build(units)
        return prompts.estimate(prompts.text(sample)) + sample.max_new_tokens

    low, low_tokens = least, estimate(least)
    high, high_tokens = low, low_tokens
    step = guess - low if guess > low else 8
    while high_tokens <= target:  # grow until the target is passed
        low, low_tokens = high, high_tokens
        if most is not None and low >= most:
            return most, low_tokens
        high = low + step if most is None else min(low + step, most)
        high_tokens = estimate(high)
        unit_tokens = max((high_tokens - low_tokens) / (high - low), 0.01)
        # a little beyond the extrapolation, but never more than 64 times at once: the first steps are small
        step = max(1, min(64 * step, int((target - high_tokens) / unit_tokens * 1.01) + 1))
    probes = 0
    while high - low > 1:
        probes += 1
        share = 0.5 if probes % 3 == 0 else (target - low_tokens) / max(high_tokens - low_tokens, 1)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        tokens = estimate(middle)
        if tokens <= target:
            low, low_tokens = middle, tokens
        else:
            high, high_tokens = middle, tokens
    return low, low_tokens
