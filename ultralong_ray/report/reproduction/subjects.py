"""The models that figures and tables compare, and their numbers in the JSON of `gather`. Pure look-ups.

The base model is asked in the evaluations of the extensions and, as the "final" model, in that of its own recipe; the
first of these that has a number gives it. What is not there is None, or left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

BASE_PART = "base_4k"
# run folder -> the window it extends to, and what else it has
EXTENSIONS = {
    "extend_128k": "128K",
    "extend_128k_long_sft": "128K, long SFT",
    "extend_1m": "1M",
    "extend_1m_long_sft": "1M, long SFT",
    "extend_1m_from_start_sft": "1M, long SFT from start",
}
# window -> run folders that extend to it, in one chart; the first has the SFT of the paper
WINDOWS = {
    "128K": ("extend_128k", "extend_128k_long_sft"),
    "1M": ("extend_1m", "extend_1m_long_sft", "extend_1m_from_start_sft"),
}


SEPARATOR = "; "  # of sources of texts (types.sources_of) in what a mean is made from


@dataclass(frozen=True)
class Subject:
    """`style` is a class of the figures' style sheet; `sources` are (part, model there), best first."""

    label: str
    style: str
    sources: tuple[tuple[str, str], ...]


BASE = Subject("base model", "base", (*((part, "base") for part in EXTENSIONS), (BASE_PART, "final")))
PRETRAINED = {
    part: Subject(f"{window}, before SFT", f"{part} pretrained", ((part, "pretrained"),))
    for part, window in EXTENSIONS.items()
}
FINAL = {part: Subject(f"{window}, final", f"{part} final", ((part, "final"),)) for part, window in EXTENSIONS.items()}
SUBJECTS = (BASE, *(subject for part in EXTENSIONS for subject in (PRETRAINED[part], FINAL[part])))


def parts_of(results: dict[str, Any], subject: Subject) -> list[tuple[dict[str, Any], str]]:
    """(part, model's name there) of those that were gathered."""
    return [(results["parts"][part], model) for part, model in subject.sources if part in results["parts"]]


def of_window(window: str) -> tuple[Subject, ...]:
    """The base model, and the models that were extended to `window`."""
    return (BASE, *(subject for part in WINDOWS[window] for subject in (PRETRAINED[part], FINAL[part])))


def base_window(results: dict[str, Any]) -> int | None:
    """Tokens that the base model reads: what the extensions start from."""
    extended = [results["parts"][part]["base_window_tokens"] for part in EXTENSIONS if part in results["parts"]]
    made = [results["parts"][BASE_PART]["target_tokens"]] if BASE_PART in results["parts"] else []
    return next(iter([*extended, *made]), None)


def grid_of(results: dict[str, Any], subject: Subject) -> dict[str, Any] | None:
    """The passkey grid with the most cells, and of those the first source's."""
    grids = [grid for part, model in parts_of(results, subject) for grid in part["passkey"] if grid["model"] == model]
    return max(grids, key=lambda grid: grid["num_cells"], default=None)


def curve_of(results: dict[str, Any], subject: Subject, window: str) -> dict[str, Any] | None:
    """The perplexity curve that reaches farthest, and of those the finest, on the books of that window."""
    asked = [
        (results["parts"][part], model)
        for part, model in subject.sources
        if part in WINDOWS[window] and part in results["parts"]
    ]
    curves = [curve for part, name in asked for curve in part["perplexity"] if curve["model"] == name]
    reach = [(curve["bucket_end_tokens"][-1], len(curve["bucket_end_tokens"])) for curve in curves]
    return curves[reach.index(max(reach))] if curves else None


def means_of(results: dict[str, Any], subject: Subject, suite: str, made_from: str) -> dict[int, dict[str, Any]]:
    """Length in tokens -> mean over the suite's tasks, of all tasks that any model was asked, made from these texts."""
    found: dict[int, dict[str, Any]] = {}
    for part, model in parts_of(results, subject):
        for mean in _whole_means(part, suite, num_tasks(results, suite)):
            if (mean["model"], made_from_of(mean)) == (model, made_from):
                found.setdefault(mean["context_length_tokens"], mean)
    return dict(sorted(found.items()))


def texts_of(results: dict[str, Any], suite: str) -> list[str]:
    """What the questions of a suite were made from, that of most means first: only those of one are comparable."""
    whole = num_tasks(results, suite)
    means = [mean for part in results["parts"].values() for mean in _whole_means(part, suite, whole)]
    return [made_from for made_from, _ in Counter(map(made_from_of, means)).most_common()]


def own_texts(made_from: str, all_texts: list[str]) -> str:
    """What tells these texts from the others, in words; empty where there are no others."""
    common = set.intersection(*(set(texts.split(SEPARATOR)) for texts in all_texts)) if all_texts else set()
    return ", ".join(source for source in made_from.split(SEPARATOR) if source not in common)


def _whole_means(part: dict[str, Any], suite: str, whole: int) -> list[dict[str, Any]]:
    return [mean for mean in part["benchmarks"]["means"] if (mean["suite"], mean.get("num_tasks")) == (suite, whole)]


def made_from_of(mean: dict[str, Any]) -> str:
    """Empty in a JSON of before it was written down."""
    return mean.get("made_from", "")


def num_tasks(results: dict[str, Any], suite: str) -> int:
    means = [mean for part in results["parts"].values() for mean in part["benchmarks"]["means"]]
    return max((mean.get("num_tasks", 0) for mean in means if mean["suite"] == suite), default=0)


def within_window(results: dict[str, Any], subject: Subject, suite: str, task: str | None) -> list[dict[str, Any]]:
    """Means of a suite, or of one task, over all lengths within the base model's window: one for each source."""
    window = base_window(results)
    return [
        mean
        for part, model in parts_of(results, subject)
        for mean in part["benchmarks"]["means_to"]
        if (mean["model"], mean["suite"], mean["task"], mean["to_tokens"]) == (model, suite, task, window)
    ]


def paid_rows(results: dict[str, Any]) -> list[tuple[str, str | None]]:
    """(suite, task) that extended models were asked within the base's window: RULER as one row, others by task."""
    found: dict[tuple[str, str | None], None] = {}
    for subject in SUBJECTS[1:]:
        for part, model in parts_of(results, subject):
            for mean in part["benchmarks"]["means_to"]:
                is_row = (mean["task"] is None) == (mean["suite"] == "ruler")
                if is_row and mean["model"] == model and mean["to_tokens"] == base_window(results):
                    found[mean["suite"], mean["task"]] = None
    return sorted(found, key=lambda row: (row[0] != "ruler", row[0], row[1] or ""))


def paid(results: dict[str, Any], suite: str, task: str | None) -> dict[str, dict[str, Any]]:
    """Label of each subject -> its mean within the window. Only means over the same questions are compared: those that
    most extended models were asked."""
    found = {subject.label: within_window(results, subject, suite, task) for subject in SUBJECTS}
    counts = Counter(_asked(mean) for label, means in found.items() if label != BASE.label for mean in means)
    asked = counts.most_common(1)[0][0] if counts else None
    same = {label: next((mean for mean in means if _asked(mean) == asked), None) for label, means in found.items()}
    return {label: mean for label, mean in same.items() if mean is not None}


def _asked(mean: dict[str, Any]) -> tuple[Any, ...]:
    return (mean["num_tasks"], made_from_of(mean), *mean["context_lengths_tokens"])
