"""What one worker computes and where it is stored: passkey cells, cells of benchmarks, perplexity curves. No Ray here.

In go the recipe's `[evaluate]`, a model folder and a cell; out come `<stage>/cells/<model>/...json` (a `CellResult`)
and `<stage>/perplexity/<model>.json`. A stored result is used again only if it is whole and is the one asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.read_tasks import PerplexityTask, StandardTask
from ultralong_ray.config.task_section import Work
from ultralong_ray.config.tasks import Task
from ultralong_ray.eval.engine import Request
from ultralong_ray.eval.making import Maker
from ultralong_ray.eval.passkey import build_prompt, is_right
from ultralong_ray.eval.perplexity import document_rows, holdout_tokens
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.score import score
from ultralong_ray.storage import Location
from ultralong_ray.types import CellResult, PasskeyPrompt, UserError

logger = logging.getLogger(__name__)

PASSKEY = "passkey"
PROMPT_END_CHARACTERS = 400  # of every prompt, kept for a reader
SHORT_TOKENS = 1024  # about, of a question without a context length, for the order of cells and the time left
STOP_AT_NEWLINE = ("\n",)  # of passkeys: what follows the line of the key does not count


@dataclass(frozen=True, slots=True)
class Cell:
    """One work item: samples of a task for one model, or with `context_length_tokens` None its perplexity curve."""

    model: str
    context_length_tokens: int | None
    depth_percent: float | None
    tokens: int  # to run through the model; what is left of them gives the time left
    task: str = PASSKEY
    section: int = -1  # number of its section in evaluate.tasks; -1: the passkey grid
    shard: int = 0
    first_sample: int = 0
    num_samples: int = 0

    @property
    def name(self) -> str:
        if self.context_length_tokens is None:
            return f"perplexity of {self.model}"
        task = "" if self.task == PASSKEY else f" on {self.task}"
        depth = "" if self.depth_percent is None else f", depth {self.depth_percent:g} %"
        shard = f", shard {self.shard}" if self.shard else ""
        length = f" at {self.context_length_tokens} tokens" if self.context_length_tokens else ""
        return f"{self.model}{task}{length}{depth}{shard}"

    @property
    def file(self) -> str:
        """Its result below the stage."""
        if self.context_length_tokens is None:
            return f"perplexity/{self.model}.json"
        if self.task == PASSKEY:
            return f"cells/{self.model}/{self.context_length_tokens}-{self.depth_percent:g}.json"
        depth = "" if self.depth_percent is None else f"-depth{self.depth_percent:g}"
        return f"cells/{self.model}/{self.task}/{self.context_length_tokens}{depth}-shard{self.shard}.json"

    def result_file(self, stage: Location) -> Location:
        return stage / self.file


def grid(config: EvaluateConfig, models: list[str], holdout: Location | None, maker: Maker | None = None) -> list[Cell]:
    """Every work item, longest first, so that the last ones to finish are short. `maker` is asked how many samples
    the sections of evaluate.tasks have.

    Raises: UserError for a benchmark file that is absent or empty.
    """
    cells = [
        Cell(model, length, depth, length * config.samples_per_cell, num_samples=config.samples_per_cell)
        for length in sorted(set(config.context_lengths), reverse=True)
        for model in models
        for depth in sorted(set(config.depths_percent), reverse=True)  # each then reads on from what the last one holds
        if config.passkey
    ]
    if maker is not None:
        cells += [cell for model in models for cell in _task_cells(config, model, maker)]
    if holdout is not None:
        tokens = holdout_tokens(holdout)
        cells += [Cell(model, None, 0.0, tokens) for model in models if tokens]
    return sorted(cells, key=lambda cell: -cell.tokens)


def _task_cells(config: EvaluateConfig, model: str, maker: Maker) -> Iterator[Cell]:
    for number, section in enumerate(config.tasks):
        for work in section.works():
            total, size = maker.num_samples(section, work.task), config.samples_per_shard
            for shard, first in enumerate(range(0, total, size)):
                count = min(size, total - first)
                tokens = count * (work.context_length_tokens or SHORT_TOKENS)
                place = (work.context_length_tokens, work.depth_percent, tokens, work.task)
                yield Cell(model, *place, number, shard, first, count)


def run_cell(engine: Any, config: EvaluateConfig, cell: Cell, maker: Maker, prompts: PromptsOf) -> CellResult:
    """Ask every sample of a cell. `engine` is an `engine.Engine`, `prompts` writes for its model."""
    started = time.monotonic()
    section = config.tasks[cell.section] if cell.section >= 0 else None
    if isinstance(section, StandardTask):
        rows = _standard_rows(engine, section, cell, maker, _chat_template(config, cell))
        return _result(config, cell, rows, started)
    if isinstance(section, PerplexityTask):
        rows = _document_rows(engine, section, cell, maker)
        return _result(config, cell, rows, started)
    if cell.task == PASSKEY:
        asked = _passkey_requests(engine, config, cell)
    else:
        asked = _task_requests(config.tasks[cell.section], cell, maker, prompts(_chat_template(config, cell)))
    rows: list[dict[str, Any]] = []
    judges: list[Callable[[str], float]] = []

    def requests() -> Iterator[Request]:
        for request, row, judge in asked:
            rows.append(row)
            judges.append(judge)
            yield request

    answers = engine.answers(requests())
    for row, judge, answer in zip(rows, judges, answers, strict=True):
        points = judge(answer)
        row |= {"answer": answer, "score": points, "right": points >= 1.0}
    for row, reason in zip(rows, getattr(engine, "finish_reasons", ()), strict=False):
        row["finish_reason"] = reason  # as a server says it
    return _result(config, cell, rows, started)


def _result(config: EvaluateConfig, cell: Cell, rows: list[dict[str, Any]], started: float) -> CellResult:
    assert cell.context_length_tokens is not None
    mean = sum(row["score"] for row in rows) / len(rows)
    seconds = time.monotonic() - started
    place = (cell.model, cell.context_length_tokens, cell.depth_percent)
    return CellResult(*place, mean, rows, seconds, cell.task, cell.shard, cell_settings(config, cell))


def _standard_rows(
    engine: Any, section: StandardTask, cell: Cell, maker: Maker, chat_template: bool
) -> list[dict[str, Any]]:
    """Raises: UserError when lm-evaluation-harness is not installed."""
    try:
        from ultralong_ray.eval.standard import run_standard
    except ImportError as error:
        raise UserError(
            f"evaluate.tasks of kind 'standard' need lm-evaluation-harness ({error}); install the extra with "
            f"pip install 'ultralong-ray[eval]', or remove the section"
        ) from error
    rows, few_shot = maker.standard(section, cell.task)
    chosen = rows[cell.first_sample : cell.first_sample + cell.num_samples]
    return run_standard(engine, section, cell.task.split("/")[1], chosen, few_shot, chat_template=chat_template)


def _document_rows(engine: Any, section: PerplexityTask, cell: Cell, maker: Maker) -> list[dict[str, Any]]:
    assert cell.context_length_tokens is not None
    place = (cell.context_length_tokens, engine.tokenizer, cell.first_sample, cell.num_samples)
    return document_rows(engine, maker.documents(section, *place), cell.first_sample)


PromptsOf = Callable[[bool], Prompts]  # from whether the chat template is used
Asked = tuple[Request, dict[str, Any], Callable[[str], float]]  # the request, what is stored of it, the answer's score


def _chat_template(config: EvaluateConfig, cell: Cell) -> bool:
    own = config.tasks[cell.section].chat_template if cell.section >= 0 else None
    return config.chat_template if own is None else own


def cell_settings(config: EvaluateConfig, cell: Cell) -> dict[str, Any]:
    """What a cell's answers depend on beside the model: stored with it, shown in the report."""
    shared = {
        "chat_template": _chat_template(config, cell),
        "precision": config.precision,
        "engine": config.engine.fingerprint_fields(),
        "decoding": "greedy",
    }
    if cell.section >= 0:
        return {**shared, "section": config.tasks[cell.section].model_dump(mode="json")}
    passkey = {"digits": config.passkey_digits, "max_new_tokens": config.max_new_tokens, "stop": list(STOP_AT_NEWLINE)}
    return {**shared, **passkey, "seed": config.seed}


def _task_requests(section: Task, cell: Cell, maker: Maker, prompts: Prompts) -> Iterator[Asked]:
    assert cell.context_length_tokens is not None
    work = Work(cell.task, cell.context_length_tokens, cell.depth_percent)
    for sample in maker.samples(section, work, prompts, cell.first_sample, cell.num_samples):
        text = prompts.text(sample)
        turns = {"messages": prompts.messages(sample), "answer_prefix": sample.answer_prefix}
        request = Request(text, prompts.ids(text), sample.max_new_tokens, sample.stop, **turns)
        yield request, _stored_part(sample, text, len(request.ids)), lambda answer, sample=sample: score(sample, answer)


def _stored_part(sample: Sample, text: str, prompt_tokens: int) -> dict[str, Any]:
    """What is kept of a sample: a reader sees what was asked, and stored answers can be scored again."""
    return {
        "index": sample.index,
        "prompt_end": text[-PROMPT_END_CHARACTERS:],
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": sample.max_new_tokens,
        "expected": list(sample.references),
        "metric": sample.metric,
        "facts": sample.facts,
    }


def _passkey_requests(engine: Any, config: EvaluateConfig, cell: Cell) -> Iterator[Asked]:
    assert cell.context_length_tokens is not None and cell.depth_percent is not None
    for sample in range(config.samples_per_cell):
        prompt: PasskeyPrompt = build_prompt(
            engine.tokenizer,
            context_length_tokens=cell.context_length_tokens,
            depth_percent=cell.depth_percent,
            sample=sample,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            chat_template=config.chat_template,
            digits=config.passkey_digits,
        )
        row = {
            "prompt_end": prompt.prompt[-PROMPT_END_CHARACTERS:],
            "prompt_tokens": len(prompt.ids),
            "expected": prompt.expected,
        }
        turns = (("user", prompt.message),) if prompt.message else ()
        more = {"messages": turns, "answer_prefix": prompt.answer_prefix}
        request = Request(prompt.prompt, prompt.ids, config.max_new_tokens, STOP_AT_NEWLINE, **more)
        yield request, row, lambda answer, key=prompt.expected: float(is_right(answer, key))


def stored_points(config: EvaluateConfig, cell: Cell, stage: Location) -> list[float] | None:
    """The score of every sample of a finished cell (none for a finished curve), or None where it must be computed."""
    file = cell.result_file(stage)
    if not file.exists():
        return None
    try:
        stored = file.read_json()
        if cell.context_length_tokens is None:
            whole = stored["model"] == cell.model and len(stored["loss"]) == len(stored["bucket_end_tokens"])
            return [] if whole else None
        result = CellResult(**stored)
        found = (result.model, result.task, result.context_length_tokens, result.depth_percent, len(result.samples))
        asked = (cell.model, cell.task, cell.context_length_tokens, cell.depth_percent, cell.num_samples)
        if found == asked:
            return points_of(result)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s) and will be computed again", file, error)
        return None
    logger.warning("%s is of another cell and will be computed again", file)
    return None


def points_of(result: CellResult) -> list[float]:
    return [float(sample["score"]) for sample in result.samples]


def store_cell(result: CellResult, cell: Cell, stage: Location) -> None:
    cell.result_file(stage).write_json(asdict(result))
