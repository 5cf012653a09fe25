"""MMLU, MMLU-Pro, MATH, GSM8K and HumanEval by lm-evaluation-harness, without a network.

In go an engine and rows of a test; out come the harness's own metrics of every row. Prompts, few-shot examples, stop
texts, answer extraction and metrics are those of the harness's task files, which are read from the installed package;
only the data comes from local files, and HumanEval's programs run in our sandbox and not by the `evaluate` library,
which fetches code from the Hub. A part of a test gives the rows the numbers that they have in the whole test: the
random few-shot examples of a row depend on its place.

Read against lm_eval 0.4.13 (tasks/_yaml_loader.py, api/task.py, api/samplers.py, models/huggingface.py).
"""

# The harness is an optional extra.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# before the libraries are imported, which read them once
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import lm_eval
from jinja2 import TemplateError
from lm_eval.api.model import LM
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from ultralong_ray.config.read_tasks import StandardTask
from ultralong_ray.eval.engine import Engine, Request
from ultralong_ray.eval.sandbox import Limits, run_program
from ultralong_ray.eval.tasks.standard import OTHERS, TEXTS, Row, examples_of
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of data from functions, which is what we want

FEW_SHOT_SEED = 1234  # the harness's default
MAX_NEW_TOKENS = 256  # the harness's default, where a task names none
PROMPT_END_CHARACTERS = 400
DEFINITIONS = {
    "mmlu": "mmlu/default/mmlu_{subject}.yaml",
    "mmlu_pro": "mmlu_pro/mmlu_pro_{subject}.yaml",
    "math": "hendrycks_math/hendrycks_math_algebra.yaml",  # its seven files differ in the name of the data alone
    "gsm8k": "gsm8k/gsm8k.yaml",
    "humaneval": "humaneval/humaneval.yaml",
}
# The metric and filter that count as a row's score; all are stored. GSM8K's strict form wants "#### 18".
SCORES = {
    "mmlu": ("acc", "none"),
    "mmlu_pro": ("exact_match", "custom-extract"),
    "math": ("exact_match", "none"),
    "gsm8k": ("exact_match", "flexible-extract"),
    "humaneval": ("pass@1", "none"),
}


class EngineLM(LM):
    """An engine of ours as a model of the harness. Tokens are joined and split as its Hugging Face model does it."""

    def __init__(self, engine: Engine, max_new_tokens: int | None) -> None:
        """`max_new_tokens` overrules what the tasks say."""
        super().__init__()
        self._engine, self._max_new_tokens = engine, max_new_tokens
        tokenizer = engine.tokenizer
        self._bos = tokenizer.bos_token or tokenizer.eos_token or ""

    def _ids(self, text: str) -> list[int]:
        special = not (self._bos and text.startswith(self._bos))
        return self._engine.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Without the system turns where the template has no such role (Mistral, Gemma), as the harness does it.

        Raises: UserError when the template refuses the others too.
        """

        def rendered(turns: list[dict[str, str]]) -> str:
            return self._engine.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return rendered(chat_history)
        except TemplateError:
            others = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            return rendered(others)
        except TemplateError as error:
            raise UserError(
                f"evaluate.chat_template: the model's chat template refuses the turns of a standard test ({error}); "
                f"set chat_template = false for this task in evaluate.tasks"
            ) from error

    @property
    def tokenizer_name(self) -> str:
        return str(self._engine.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Neighbours of one context are scored together: it is run once for the four choices of a question."""
        pairs = [self._pair(*request.args) for request in requests]
        scores: list[tuple[float, bool]] = []
        while len(scores) < len(pairs):
            context = pairs[len(scores)][0]
            alike = []
            for other, continuation in pairs[len(scores) :]:
                if other != context:
                    break
                alike.append(continuation)
            scores += self._engine.continuation_scores(context, alike)
        return scores

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Spaces at the end of the context go to the continuation, and the whole is tokenised at once."""
        if not context:
            return self._ids(self._bos), self._engine.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        ids = self._ids(stripped)
        return ids, self._ids(stripped + continuation)[len(ids) :]

    def generate_until(self, requests: list[Any]) -> list[str]:
        def asked() -> Iterator[Request]:
            for request in requests:
                text, settings = request.args
                longest = self._max_new_tokens or settings.get("max_gen_toks") or MAX_NEW_TOKENS
                until = settings.get("until") or []
                stop = tuple(mark for mark in ([until] if isinstance(until, str) else until) if mark)
                yield Request(text, self._ids(text), longest, stop, exact=True)

        return self._engine.answers(asked())

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError("no standard test asks for it")


def run_standard(
    engine: Engine,
    section: StandardTask,
    test: str,
    rows: Sequence[Row],
    few_shot: Sequence[dict[str, Any]],
    *,
    chat_template: bool,
) -> list[dict[str, Any]]:
    """What is stored of each row, in order: prompt end, answer, expected, score from 0 to 1, all metrics.

    Raises: UserError for what the engine refuses, and for a sandbox that cannot be closed.
    """
    lm = EngineLM(engine, section.max_new_tokens)
    stored: list[dict[str, Any]] = []
    for subject in dict.fromkeys(row.subject for row in rows):
        own = [row for row in rows if row.subject == subject]
        task = make_task(section, test, own, examples_of(few_shot, subject), chat_template=chat_template)
        results: Any = evaluate(
            lm=lm,
            task_dict={"tasks": {task.task_name: task}, "groups": {}},
            bootstrap_iters=0,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=section.allow_code_execution,
        )
        shots = {"num_fewshot": task.get_config("num_fewshot")}
        stored += [row | shots for row in _stored_rows(engine, test, own, results["samples"][task.task_name])]
    return stored


def make_task(
    section: StandardTask, test: str, rows: Sequence[Row], examples: list[dict[str, Any]], *, chat_template: bool
) -> ConfigurableTask:
    """The harness's task over these rows of one subject, the first of which is row `rows[0].place` of the subject."""
    config = _definition(section, test, rows[0].subject, chat_template)
    if config["num_fewshot"] and not examples:
        logger.warning("%s: no few-shot file in data_folder, so its questions are asked without examples", test)
        config["num_fewshot"] = 0
    if not examples:
        config.pop("fewshot_split", None)
        config["fewshot_config"] = None
    elif (config.get("fewshot_config") or {}).get("sampler", "default") == "default":
        sampler = _later_sampler(rows[0].place, config["num_fewshot"])
        config["fewshot_config"] = {**(config.get("fewshot_config") or {}), "sampler": sampler}
    splits = {config["test_split"]: [row.fields for row in rows]}
    if examples:
        splits[config["fewshot_split"]] = examples
    config["custom_dataset"] = lambda **_: {name: _dataset(test, fields) for name, fields in splits.items()}
    config["metadata"] = {}
    config.pop("dataset_kwargs", None)
    config.pop("training_split", None)
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return task


def _definition(section: StandardTask, test: str, subject: str, chat_template: bool) -> dict[str, Any]:
    """The harness's own task file, with what the recipe changes of it."""
    name = DEFINITIONS[test].format(subject=subject.replace(" ", "_"))
    file = Path(str(lm_eval.__file__)).parent / "tasks" / name
    if test == "humaneval" and chat_template:
        file = file.with_name("humaneval_instruct.yaml")
    if not file.exists():
        raise UserError(
            f"evaluate.tasks: {test} has no subject {subject!r}; correct the field in its test and few-shot files"
        )
    # humaneval's functions ask the Hub for code as soon as they are imported
    config = load_yaml(file, resolve_func=test != "humaneval")
    if test == "humaneval":
        config |= {"metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}]}
        config |= {"filter_list": None, "process_results": _judge_program(section, chat_template)}
    config["num_fewshot"] = section.num_fewshot if test in section.FEW_SHOT else 0
    for key in ("tag", "group", "task_alias", "dataset_path", "dataset_name"):
        config.pop(key, None)
    if test == "mmlu_pro":
        config.pop("process_docs", None)  # picks the subject, which is done here
    config["task"] = f"{test}_{subject}".replace(" ", "_") if subject else test
    return config


def _later_sampler(skip: int, shots: int) -> type[ContextSampler]:
    """Draws what the harness draws for the rows behind the first `skip` ones of a subject."""

    class LaterSampler(ContextSampler):
        def set_rnd(self, rnd: int | None) -> LaterSampler:
            super().set_rnd(rnd)
            for _ in range(skip):
                self.rnd.sample(range(len(self.df)), shots)
            return self

    return LaterSampler


def _dataset(test: str, rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """The fields that the harness reads: what else a file has may be of mixed types, which Arrow refuses."""
    names = (*TEXTS[test], *OTHERS.get(test, ()), *(("cot_content",) if test == "mmlu_pro" else ()))
    return datasets.Dataset.from_list([{name: row.get(name, "") for name in names} for row in rows])


def _judge_program(section: StandardTask, chat_template: bool) -> Any:
    """HumanEval's rule (openai/human-eval, execution.py): prompt, body, tests and the call of the tests run through.

    A chat model closes the code block that its prompt opened, and what follows is no code; a model without a chat
    template is given no block, so that a mark of one in its answer is part of the program, and an error.
    """
    limits = Limits(section.code_seconds, section.code_memory_mib, section.allow_network)

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        body = results[0].split("```", 1)[0] if chat_template else results[0]
        program = f"{doc['prompt']}{body}\n{doc['test']}\ncheck({doc['entry_point']})"
        return {"pass@1": float(run_program(program, limits).passed)}

    return process_results


def _stored_rows(
    engine: Engine, test: str, rows: Sequence[Row], logged: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The harness logs a row once for every filter; those of one row become one."""
    for number, row in enumerate(rows):
        mine = [each for each in logged if each["doc_id"] == number]
        metrics = {f"{name},{each['filter']}": float(each[name]) for each in mine for name in each["metrics"]}
        first, points = mine[0], metrics[",".join(SCORES[test])]
        prompt = first["arguments"][0][0]
        yield {
            "index": row.index,
            "subject": row.subject,
            "prompt_end": prompt[-PROMPT_END_CHARACTERS:],
            "prompt_tokens": len(engine.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]),
            "answer": _answer(first),
            "expected": _expected(test, row, first),
            "score": points,
            "right": points >= 1.0,
            "metrics": metrics,
        }


def _answer(logged: dict[str, Any]) -> str:
    """What the model wrote, or the choice that it finds likeliest."""
    responses = [response[0] for response in logged["resps"]]
    if isinstance(responses[0], str):
        return responses[0]
    likeliest = max(range(len(responses)), key=lambda number: responses[number][0])
    return str(logged["arguments"][likeliest][1]).strip()


def _expected(test: str, row: Row, logged: dict[str, Any]) -> str:
    if test == "mmlu":
        return "ABCD"[row.fields["answer"]]
    return row.fields["test"] if test == "humaneval" else str(logged["target"])
