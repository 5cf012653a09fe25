"""[[evaluate.tasks]] that read their questions or documents from files. Names are those of `eval/tasks`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from ultralong_ray.config.base import NonNegative, Positive, PositiveFloat
from ultralong_ray.config.task_section import Paths, TaskSection

LvevalName = Literal[
    "hotpotwikiqa_mixup",
    "loogle_SD_mixup",
    "loogle_CR_mixup",
    "loogle_MIR_mixup",
    "multifieldqa_en_mixup",
    "multifieldqa_zh_mixup",
    "factrecall_en",
    "factrecall_zh",
    "cmrc_mixup",
    "lic_mixup",
    "dureader_mixup",
]
Level = Literal[
    "16k",
    "32k",
    "64k",
    "128k",
    "256k",
]
InfinitebenchName = Literal[
    "passkey",
    "number_string",
    "kv_retrieval",
    "longbook_sum_eng",
    "longbook_choice_eng",
    "longbook_qa_eng",
    "longbook_qa_chn",
    "longdialogue_qa_eng",
    "math_find",
    "math_calc",
    "code_run",
    "code_debug",
]
StandardName = Literal["mmlu", "mmlu_pro", "math", "gsm8k", "humaneval"]
MADE_INFINITEBENCH = ("passkey", "number_string", "kv_retrieval", "math_find", "math_calc", "code_run")


class LvevalTask(TaskSection):
    """LV-Eval (arXiv 2402.05136): `data_folder` holds <set>_<level>.jsonl."""

    kind: Literal["lveval"]
    names: Annotated[tuple[LvevalName, ...], Field(min_length=1)] = get_args(LvevalName)
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] = get_args(Level)
    """Lengths of the texts in words (English) or characters (Chinese)."""
    data_folder: str
    samples_per_cell: Positive | None = None
    """The first rows of a file; default: all."""

    def names_of_tasks(self) -> list[str]:
        return [f"lveval/{name}_{level}" for name in self.names for level in self.levels]

    def paths(self) -> list[tuple[str, str]]:
        names = [name.removeprefix("lveval/") for name in self.names_of_tasks()]
        return [("data_folder", f"{self.data_folder.rstrip('/')}/{name}.jsonl") for name in names]


class InfinitebenchTask(TaskSection):
    """InfiniteBench (arXiv 2402.13718): `data_folder` holds <task>.jsonl; without it six tasks are made anew."""

    kind: Literal["infinitebench"]
    names: Annotated[tuple[InfinitebenchName, ...], Field(min_length=1)]
    data_folder: str | None = None
    samples_per_cell: Positive | None = None
    """The first rows of a file; default: all. Made tasks need it."""
    seed: int = 42
    """Of made tasks."""
    template: Literal["gpt4", "yarn-mistral"] | None = None
    """Default: gpt4 with a chat template, yarn-mistral without."""

    @model_validator(mode="after")
    def _made_or_read(self) -> InfinitebenchTask:
        if self.data_folder is None:
            unmade = [name for name in self.names if name not in MADE_INFINITEBENCH]
            if unmade:
                raise ValueError(
                    f"infinitebench/{unmade[0]} needs data_folder, the folder with {unmade[0]}.jsonl; without it can "
                    f"be made {', '.join(MADE_INFINITEBENCH)}"
                )
            if self.samples_per_cell is None:
                raise ValueError("infinitebench without data_folder makes its samples and needs samples_per_cell")
        return self

    def names_of_tasks(self) -> list[str]:
        return [f"infinitebench/{name}" for name in self.names]

    def paths(self) -> list[tuple[str, str]]:
        folder = self.data_folder
        return [("data_folder", f"{folder.rstrip('/')}/{name}.jsonl") for name in self.names] if folder else []


class StandardTask(TaskSection):
    """The paper's standard tests by lm-evaluation-harness; `data_folder` holds <name>/*.jsonl (eval/tasks/standard.py).

    Prompts are as long as their questions: there is no context length.
    """

    FEW_SHOT: ClassVar = ("mmlu", "mmlu_pro", "gsm8k")

    kind: Literal["standard"]
    names: Annotated[tuple[StandardName, ...], Field(min_length=1)]
    data_folder: str
    context_lengths: tuple[Literal[0]] = (0,)  # pyright: ignore[reportIncompatibleVariableOverride]
    limit: Positive | None = None
    """The first rows of every subject, as the harness's --limit; default: all."""
    num_fewshot: NonNegative = 5
    """Worked examples in front of a question of MMLU, MMLU-Pro and GSM8K; MATH and HumanEval have none."""
    max_new_tokens: Positive | None = None
    """Of a written answer; default: as the harness: 2048 (MMLU-Pro), 1024 (HumanEval), 256."""
    allow_code_execution: bool = False
    """HumanEval runs programs that the model wrote, in a sandbox. Nothing runs until this is true."""
    code_seconds: PositiveFloat = 5.0
    """Of one program, by the clock."""
    code_memory_mib: Positive = 1024
    allow_network: bool = False
    """True: run programs even where the kernel grants no system call filter to keep them from the network."""

    @model_validator(mode="after")
    def _code_is_allowed(self) -> StandardTask:
        if "humaneval" in self.names and not self.allow_code_execution:
            raise ValueError(
                "humaneval runs programs that the model wrote; set allow_code_execution = true, or take humaneval out "
                "of names"
            )
        return self

    def names_of_tasks(self) -> list[str]:
        return [f"standard/{name}" for name in self.names]

    def paths(self) -> list[tuple[str, str]]:
        return [("data_folder", self.data_folder)]


class PerplexityTask(TaskSection):
    """Loss on documents, by position: a sample is the start of a document that has as many tokens or more.

    The score of a document is 1 / perplexity, the geometric mean of the probabilities of its tokens.
    """

    kind: Literal["perplexity"]
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = "documents"
    """Of what the documents are, for the report: "books", "code"."""
    documents: Annotated[Paths, Field(min_length=1)]
    """Text, JSON, JSON-lines or Parquet files."""
    samples_per_cell: Positive
    """The first so many documents that are long enough."""

    def names_of_tasks(self) -> list[str]:
        return [f"perplexity/{self.name}"]

    def paths(self) -> list[tuple[str, str]]:
        return [("documents", path) for path in self.documents]
