"""Stored cells of benchmarks to scores: `plan.json`, `failed.json` and `cells/**.json` in, one `Score` per task, length
and model out, with its interval and the files that it was read from.

Every sample counts once. A cell that failed counts 0 for each of its samples, so that a model cannot gain by failing; a
cell that is planned and not there is missing: it is left out of the mean and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultralong_ray.report.intervals import combined, interval, resampled
from ultralong_ray.report.reading import StageReader, finite, json_safe
from ultralong_ray.types import sources_of

PLAN_FILE, FAILED_FILE = "plan.json", "failed.json"
CUT_SHORT = "length, after"  # begins the finish reason of such answers (eval/openai_engine.py)
GSM8K, STRICT = "standard/gsm8k", "exact_match,strict-match"  # the metric beside the one that is its score
DOCUMENTS = "perplexity"  # the suite whose scores are losses of documents
EXAMPLES = 4  # samples of a score that the page can show, wrong ones first
EXAMPLE_CHARACTERS = 400  # of each of its texts
FAILED_ARE = "a cell that failed counts 0 for each of its samples; a missing one is left out and counted"


@dataclass
class Score:
    """Samples of one model on one task at one context length, over all depths and shards."""

    model: str
    task: str
    context_length_tokens: int
    points: list[float] = field(default_factory=list)  # of every sample, 0 to 1
    files: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # file -> reason
    num_missing: int = 0
    num_empty: int = 0
    num_cut: int = 0  # answers that a server ended before it was asked to
    by_depth: dict[float, list[float]] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    identities: list[str] = field(default_factory=list)  # depth and question of every sample: equal ones can be paired
    sources: set[str] = field(default_factory=set)  # as types.sources_of says it
    losses: list[float] = field(default_factory=list)  # of documents, in nats per token; empty for questions
    bucket_ends: list[int] = field(default_factory=list)  # positions where the buckets of every document end
    bucket_losses: list[list[float]] = field(default_factory=list)  # [documents, buckets]
    strict: list[float] = field(default_factory=list)  # of GSM8K: 1 where the answer is also written as "#### 18"

    @property
    def suite(self) -> str:
        return self.task.split("/", 1)[0]

    @property
    def percent(self) -> float | None:
        """As the benchmark prints it: RULER and LV-Eval with two decimals, each by its own order of arithmetic."""
        if not self.points:
            return None
        if self.suite == "lveval":
            return round(100 * sum(self.points) / len(self.points), 2)
        value = 100 * (sum(self.points) / len(self.points))
        return round(value, 2) if self.suite == "ruler" else value

    @property
    def strict_percent(self) -> float | None:
        """None where samples have no such metric."""
        if not self.strict or len(self.strict) != len(self.points):
            return None
        return 100 * sum(self.strict) / len(self.strict)

    def loss_facts(self) -> dict[str, Any]:
        """Mean loss of the documents with its interval, and by position; empty for tasks of questions.

        A cell that failed has no loss: it is left out, and a score without any has the loss None.
        """
        if self.suite != DOCUMENTS:
            return {}
        if not self.losses:
            return {"loss": None}
        low, high = resampled(self.losses) or (None, None)
        curve = [sum(bucket) / len(bucket) for bucket in zip(*self.bucket_losses, strict=True)]
        loss = {"loss": sum(self.losses) / len(self.losses), "loss_low": low, "loss_high": high}
        return {**loss, "bucket_end_tokens": self.bucket_ends, "bucket_loss": curve}

    def facts(self) -> dict[str, Any]:
        """For report.json."""
        low, high, kind = interval(self.points) if self.points else (None, None, None)
        return {
            "task": self.task,
            "context_length_tokens": self.context_length_tokens,
            "percent": self.percent,
            "low": None if low is None else 100 * low,
            "high": None if high is None else 100 * high,
            "interval": kind,
            "num_samples": len(self.points),
            "num_failed_cells": len(self.failed),
            "num_missing_samples": self.num_missing,
            "num_empty_answers": self.num_empty,
            "num_cut_answers": self.num_cut,
            "files": self.files,
            "failed": self.failed,
            "examples": self.examples,
            **self.loss_facts(),
        }


def read_scores(reader: StageReader, *, with_passkey: bool = False) -> list[Score]:
    """Scores of all benchmark cells, in the order of the plan's sections; `with_passkey` also of the passkey grid."""
    if not (reader.directory.location / PLAN_FILE).exists():
        return []
    plan, failed = reader.read_json(PLAN_FILE) or {}, reader.read_json(FAILED_FILE) or {}
    scores: dict[tuple[str, str, int], Score] = {}
    first = -1 if with_passkey else 0
    planned = [
        cell for cell in plan.get("cells", []) if cell["section"] >= first and cell["context_length_tokens"] is not None
    ]
    for cell in sorted(planned, key=_place):
        key = (cell["model"], cell["task"], cell["context_length_tokens"])
        score = scores.setdefault(key, Score(*key))
        name = reader.name(cell["file"])
        stored = None if cell["file"] in failed else _stored(reader, cell["file"], score)
        if stored is not None:
            _add(score, stored, name, cell)
        elif cell["file"] in failed:
            score.failed[name] = str(failed[cell["file"]])
            score.identities += [f"{cell['depth_percent']} failed"] * cell["num_samples"]
            score.strict += [0.0] * cell["num_samples"] if score.task == GSM8K else []
            _count(score, [0.0] * cell["num_samples"], cell)
        else:
            score.num_missing += cell["num_samples"]
    for score in scores.values():
        if score.suite == DOCUMENTS and score.losses and not score.failed and not score.num_missing:
            score.sources.add(_documents_asked(score))
    return list(scores.values())


def _documents_asked(score: Score) -> str:
    """As `sources_of` says it of questions: which documents these were, by how they end."""
    digest = hashlib.sha256("\0".join(score.identities).encode()).hexdigest()[:8]
    return f"documents at {score.context_length_tokens} tokens: {digest}"


def _place(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Order of cells: by section and length, then in the order of their samples."""
    return cell["section"], cell["context_length_tokens"], cell["shard"], cell["depth_percent"] or 0.0


def _stored(reader: StageReader, file: str, score: Score) -> dict[str, Any] | None:
    """A cell whose samples all have what `score` is made of, or None with a note."""
    value = reader.read_json(file)
    if value is None:
        return None
    samples = value.get("samples")
    if not isinstance(samples, list) or not samples or not all(map(_is_scored, samples)):
        reader.notes.append(
            f"{reader.name(file)} holds no list of samples with scores from 0 to 1; it counts as missing."
        )
        return None
    if score.suite == DOCUMENTS and not all(map(_has_losses, samples)):
        reader.notes.append(f"{reader.name(file)} holds documents without losses; it counts as missing.")
        return None
    return value


def _has_losses(sample: dict[str, Any]) -> bool:
    """Whether a document has a loss and those of its buckets, all finite."""
    facts = _facts(sample)
    ends, losses = facts.get("bucket_end_tokens"), facts.get("bucket_loss")
    if not isinstance(ends, list) or not isinstance(losses, list) or len(ends) != len(losses):
        return False
    return None not in map(finite, [facts.get("loss"), *ends, *losses])


def _is_scored(sample: Any) -> bool:
    points = finite(sample.get("score")) if isinstance(sample, dict) else None
    return points is not None and 0 <= points <= 1


def _add(score: Score, stored: dict[str, Any], name: str, cell: dict[str, Any]) -> None:
    samples = stored["samples"]
    score.files.append(name)
    score.settings = score.settings or json_safe(stored.get("settings") or {})
    score.identities += [f"{cell['depth_percent']} {s.get('prompt_end')} {s.get('expected')}" for s in samples]
    score.sources |= {source for sample in samples for source in sources_of(_facts(sample))}
    score.num_empty += sum(map(is_empty, samples))
    score.num_cut += sum(map(is_cut_short, samples))
    _count(score, [float(sample["score"]) for sample in samples], cell)
    for sample in samples:
        _add_loss(score, sample)
        _add_strict(score, sample)
    wrong_first = sorted([*score.examples, *(_example(sample, name) for sample in samples)], key=_points)
    # two wrong and two right tell more than four wrong
    score.examples = [*wrong_first[: EXAMPLES // 2], *wrong_first[EXAMPLES // 2 :][-EXAMPLES // 2 :]]


def is_empty(sample: dict[str, Any]) -> bool:
    """Whether the model said nothing."""
    return not str(sample.get("answer", "")).strip()


def is_cut_short(sample: dict[str, Any]) -> bool:
    """Whether a server ended the answer before it was asked to."""
    return str(sample.get("finish_reason", "")).startswith(CUT_SHORT)


def _add_loss(score: Score, sample: dict[str, Any]) -> None:
    """The losses of a document (eval/tasks/perplexity.py); a question has none."""
    if score.suite == DOCUMENTS:
        score.losses.append(float(sample["facts"]["loss"]))
        score.bucket_ends = list(sample["facts"]["bucket_end_tokens"])
        score.bucket_losses.append([float(loss) for loss in sample["facts"]["bucket_loss"]])


def _add_strict(score: Score, sample: dict[str, Any]) -> None:
    metrics = sample.get("metrics")
    points = finite(metrics.get(STRICT)) if isinstance(metrics, dict) else None
    if score.task == GSM8K and points is not None:
        score.strict.append(points)


def _facts(sample: dict[str, Any]) -> dict[str, Any]:
    facts = sample.get("facts")
    return facts if isinstance(facts, dict) else {}


def _points(example: dict[str, Any]) -> float:
    return example["score"]


def _count(score: Score, points: list[float], cell: dict[str, Any]) -> None:
    score.points += points
    if cell["depth_percent"] is not None:
        score.by_depth.setdefault(float(cell["depth_percent"]), []).extend(points)


def _example(sample: dict[str, Any], file: str) -> dict[str, Any]:
    expected = sample.get("expected")
    texts = {
        "prompt_end": sample.get("prompt_end"),
        "answer": sample.get("answer"),
        "expected": " | ".join(map(str, expected)) if isinstance(expected, list) else expected,
    }
    return {
        "file": file,
        "index": sample.get("index"),
        "score": float(sample["score"]),
        "prompt_tokens": sample.get("prompt_tokens"),
        "finish_reason": sample.get("finish_reason"),
        **{name: clipped(text, EXAMPLE_CHARACTERS, keep_end=name == "prompt_end") for name, text in texts.items()},
    }


def clipped(value: Any, characters: int, *, keep_end: bool) -> str:
    """A text with what is too much left out: of prompts the start, of answers the end."""
    text = "" if value is None else str(value)
    if len(text) <= characters:
        return text
    return f"[...] {text[-characters:]}" if keep_end else f"{text[:characters]} [...]"


def mean_loss(means: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """{"loss": the plain mean} of facts that have a loss, None where one of them has none; {} of other facts."""
    losses = [mean["loss"] for mean in means if "loss" in mean]
    if not losses:
        return {}
    return {"loss": None if None in losses else sum(losses) / len(losses)}


def mean_of(scores: Iterable[Score | None]) -> dict[str, Any] | None:
    """The plain mean of the tasks' per cents with its interval; None when one of them is not there."""
    found = list(scores)
    if not found or any(score is None or score.percent is None for score in found):
        return None
    whole: Sequence[Score] = [score for score in found if score is not None]
    low, high = combined([score.points for score in whole])
    percents = [score.percent for score in whole if score.percent is not None]
    return {
        **mean_loss(score.loss_facts() for score in whole),
        "percent": sum(percents) / len(percents),
        "low": 100 * low,
        "high": 100 * high,
        "interval": "combined",
        "num_samples": sum(len(score.points) for score in whole),
        "num_tasks": len(whole),
    }
