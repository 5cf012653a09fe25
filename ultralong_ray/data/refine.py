"""Response refinement: chat samples in, the same samples with answers rewritten by a model behind an endpoint out.

    <workdir>/refine-answers/           every answer as it came, see ultralong_ray/data/refine_answers.py
    <workdir>/refine-<fingerprint>/
        samples/part-NNNNN.parquet      id, domain, messages: a source for [[sft.sources]]
        set_aside.jsonl                 samples without a usable answer: id, domain, reason, detail, answer; and what
                                        of the sources is no sample (bad_row, bad_shard), which has no id
        summary.json                    counts, tokens, cost

No Ray: the work is waiting for a server, and one process holds as many open requests as any endpoint allows. Answers
are kept beside the output, not in it, so that a changed sampling or a changed rule for refusals asks nothing again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.config import Recipe, RefineConfig
from ultralong_ray.data.refine_answers import (
    Answer,
    AnswerLog,
    Request,
    cost_usd,
    fault_of,
    last_assistant_turn,
    make_request,
)
from ultralong_ray.data.refine_samples import ChatSample, Samples
from ultralong_ray.stages import stage_directory, workdir
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)

ANSWERS_FOLDER = "refine-answers"
SAMPLES_PER_FILE = 10_000
PROGRESS_SECONDS = 10.0
# So many refused requests in a row, and none answered before: the requests are wrong, not the samples.
REJECTED_AT_FIRST = 20

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("domain", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("refined", pa.bool_()),
    ]
)

Ask = Callable[[Request], Awaitable[Answer]]


@dataclass(slots=True)
class Progress:
    """What has been asked so far, and why no more shall be."""

    total: int
    known: int = 0  # answered by an earlier run
    answered: int = 0
    rejected_in_a_row: int = 0
    failed_in_a_row: int = 0
    failed: list[str] = field(default_factory=list)  # why, one for each request without an answer
    usd: float = 0.0
    stop: UserError | None = None
    began: float = field(default_factory=time.monotonic)
    reported: float = field(default_factory=time.monotonic)


def refine(recipe: Recipe) -> StageDirectory:
    """Run the [refine] section of a recipe, unless it is done; returns where the result is.

    Raises UserError for a recipe without the section, unreadable sources, a key, address or model that the endpoint
    refuses, a spent budget, and requests that stay without an answer. Answers are kept in all cases.
    """
    if recipe.refine is None:
        raise UserError("the recipe has no [refine] section; its fields: ultralong_ray/config/refine.py")
    directory = stage_directory(recipe, "refine")
    if directory.done:
        log.info("refine is done already: %s", directory.location)
        return directory
    samples = Samples(recipe, recipe.refine)
    answers = AnswerLog(workdir(recipe) / ANSWERS_FOLDER)
    asyncio.run(_ask_endpoint(recipe.refine, samples, answers))
    summary = write_output(samples, answers.read(), recipe.refine, directory.location)
    directory.mark_done(summary)
    log.info("refined %d samples, set aside %s", summary["refined"], summary["set_aside"] or "none")
    log.info("train on them with  [[sft.sources]]  uri = %r", f"{directory.location}/samples")
    return directory


async def _ask_endpoint(config: RefineConfig, samples: Samples, answers: AnswerLog) -> None:
    from ultralong_ray.data.refine_client import ChatClient

    async with ChatClient(config) as client:
        await ask_all(samples, answers, config, client.ask)


async def ask_all(samples: Collection[ChatSample], answers: AnswerLog, config: RefineConfig, ask: Ask) -> Progress:
    """Ask what has not been answered, `concurrency` requests at a time, and keep each answer as it arrives.

    Requests under way are waited for when the run stops early: they are paid for. Raises UserError in that case, and
    when requests stayed without an answer.
    """
    progress = Progress(len(samples))
    known = answers.read()
    keys = {make_request(sample.messages, config).key for sample in samples}
    progress.known = len(keys & known.keys())
    progress.usd = sum(cost_usd(known[key], config) for key in keys & known.keys())
    pending = _pending(samples, set(known), config)
    workers = [_ask_in_turn(pending, answers, config, ask, progress) for _ in range(config.concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        answers.close()
    if progress.stop is not None:
        raise progress.stop
    if progress.failed:
        raise UserError(
            f"refine: {len(progress.failed)} of {progress.total} requests stayed without an answer, the last one: "
            f"{progress.failed[-1]}. Answers are kept: submit again to ask for the rest"
        )
    return progress


def _pending(samples: Iterable[ChatSample], known: set[str], config: RefineConfig) -> Iterator[Request]:
    """Requests without an answer, each once, made as they are needed."""
    for sample in samples:
        request = make_request(sample.messages, config)
        if request.key not in known:
            known.add(request.key)
            yield request


async def _ask_in_turn(
    pending: Iterator[Request], answers: AnswerLog, config: RefineConfig, ask: Ask, progress: Progress
) -> None:
    """One of the workers that share `pending`."""
    from ultralong_ray.data.refine_client import NoAnswer

    for request in pending:
        if config.budget_usd is not None and progress.usd >= config.budget_usd:
            progress.stop = progress.stop or UserError(
                f"refine.budget_usd {config.budget_usd:g}: spent {progress.usd:.4f} on {progress.known} earlier and "
                f"{progress.answered} new answers of {progress.total}. Answers are kept: raise it and submit again"
            )
        if progress.stop is not None:
            return
        try:
            answer = await ask(request)
        except NoAnswer as error:
            _count_failure(str(error), config, progress)
        except UserError as error:
            progress.stop = progress.stop or error
        else:
            answers.append(answer)
            _count_answer(answer, config, progress)


def _count_failure(reason: str, config: RefineConfig, progress: Progress) -> None:
    progress.failed.append(reason)
    progress.failed_in_a_row += 1
    if progress.failed_in_a_row > config.concurrency:
        progress.stop = progress.stop or UserError(
            f"{config.base_url}: {progress.failed_in_a_row} requests in a row stayed without an answer, the last one: "
            f"{reason}. Answers are kept: submit again when the server is well"
        )


def _count_answer(answer: Answer, config: RefineConfig, progress: Progress) -> None:
    progress.answered += 1
    progress.failed_in_a_row = 0
    progress.usd += cost_usd(answer, config)
    progress.rejected_in_a_row = progress.rejected_in_a_row + 1 if answer.fault == "rejected" else 0
    if progress.rejected_in_a_row == progress.answered >= REJECTED_AT_FIRST:
        progress.stop = progress.stop or UserError(
            f"{config.base_url}: the first {progress.answered} requests were all refused, the last one with "
            f"{answer.detail}. Check refine.model, refine.max_completion_tokens and refine.request_fields"
        )
    now = time.monotonic()
    if now - progress.reported >= PROGRESS_SECONDS:
        progress.reported = now
        rate = progress.answered / max(now - progress.began, 1e-9)
        done = progress.known + progress.answered
        line = "asked %d of %d (%d known before), %.1f answers/s, %.0f s left, %.4f USD"
        log.info(line, done, progress.total, progress.known, rate, (progress.total - done) / rate, progress.usd)


def write_output(
    samples: Samples, answers: dict[str, Answer], config: RefineConfig, folder: Location
) -> dict[str, Any]:
    """Write samples, what was set aside and the summary, in the order of the sources; returns the summary."""
    reasons: Counter[str] = Counter()
    used: dict[str, Answer] = {}
    rows: list[dict[str, Any]] = []
    counts = Counter(samples=0, refined=0, files=0)
    (folder / "samples").delete_dir()

    def flush() -> None:
        with (folder / "samples" / f"part-{counts['files']:05d}.parquet").open_for_write() as sink:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink)
        counts["files"] += 1
        rows.clear()

    with (folder / "set_aside.jsonl").open_for_write() as aside:
        for left in samples.left_out:
            reasons[left.reason] += 1
            line = {"id": None, "domain": None, "reason": left.reason, "detail": left.detail, "answer": None}
            aside.write(json.dumps(line).encode() + b"\n")
        for sample in samples:
            counts["samples"] += 1
            answer = answers[make_request(sample.messages, config).key]
            used[answer.key] = answer
            fault = fault_of(answer, config)
            if fault is not None:
                reasons[fault[0]] += 1
                line = {"id": sample.id, "domain": sample.domain, "reason": fault[0], "detail": fault[1]}
                aside.write(json.dumps({**line, "answer": answer.content}).encode() + b"\n")
            else:
                counts["refined"] += 1
                assert answer.content is not None
                sample.messages[last_assistant_turn(sample.messages)]["content"] = answer.content.strip()
            if fault is None or config.keep_original:
                row = {"id": sample.id, "domain": sample.domain, "messages": sample.messages}
                rows.append({**row, "refined": fault is None})
            if len(rows) == SAMPLES_PER_FILE:
                flush()
    if rows or not counts["files"]:
        flush()
    summary = {**_count_tokens(list(used.values()), config), **counts, "set_aside": dict(sorted(reasons.items()))}
    (folder / "summary.json").write_json(summary)
    return summary


def _count_tokens(answers: list[Answer], config: RefineConfig) -> dict[str, Any]:
    return {
        "answers": len(answers),
        "answers_without_usage": sum(a.prompt_tokens is None or a.completion_tokens is None for a in answers),
        "prompt_tokens": sum(a.prompt_tokens or 0 for a in answers),
        "completion_tokens": sum(a.completion_tokens or 0 for a in answers),
        "usd": round(sum(cost_usd(a, config) for a in answers), 6),
        "models": sorted({a.model for a in answers if a.model}),
    }
