"""[[evaluate.tasks]]: which benchmark, at which lengths, on whose data. One section a kind, told apart by `kind`.

A section says what work it asks for (`works`: task, context length, depth) and which files it reads (`paths`); the
evaluation room does the rest. Names are those of `eval/tasks`, which a test compares.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from ultralong_ray.config.base import NonNegative, Positive, PositiveFloat, Section

RulerName = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]
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
Percent = Annotated[float, Field(ge=0, le=100)]
Depths = Annotated[tuple[Percent, ...], Field(min_length=1)]
Paths = tuple[str, ...]


class Work(NamedTuple):
    """One benchmark task at one context length and, where it has one, one depth. `task` is that of its `Sample`s."""

    task: str
    context_length_tokens: int
    depth_percent: float | None


class TaskSection(Section):
    """What all kinds share."""

    context_lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Tokens of prompt, chat template and answer together. Texts from files lose their middle beyond it."""
    chat_template: bool | None = None
    """Default: as evaluate.chat_template."""

    def names_of_tasks(self) -> list[str]:
        """The tasks of this section as samples and cells name them: "ruler/vt", "lveval/cmrc_mixup_16k"."""
        raise NotImplementedError

    def depths(self) -> tuple[float | None, ...]:
        """Depths at which every task is asked; (None,) where a task places its needles itself."""
        return (None,)

    def works(self) -> list[Work]:
        return [
            Work(name, length, depth)
            for name in self.names_of_tasks()
            for length in self.context_lengths
            for depth in self.depths()
        ]

    def paths(self) -> list[tuple[str, str]]:
        """(field, path) of everything that this section reads."""
        return []


class MadeTask(TaskSection):
    """A kind whose samples are made, from seeds, to a token budget."""

    samples_per_cell: Positive
    seed: int = 42


class RulerTask(MadeTask):
    """RULER's thirteen tasks (arXiv 2404.06654). NVIDIA's table has 500 samples per task and length."""

    kind: Literal["ruler"]
    names: Annotated[tuple[RulerName, ...], Field(min_length=1)] = get_args(RulerName)
    haystack: Paths = ()
    """Text files (NVIDIA's: Paul Graham's essays as JSON). Default: made-up sentences, the same everywhere."""
    squad: str | None = None
    """qa_1: a file in the form of SQuAD dev-v2.0. Default: made-up questions with one fact each."""
    hotpotqa: str | None = None
    """qa_2: a file in the form of HotpotQA's dev set, distractor. Default: made-up questions over two facts."""
    words: str | None = None
    """JSON lists noun, adjective, verb. Default: wonderwords 2.2.0 where installed, else about 500 words of our own."""
    dictionary: str | None = None
    """One word a line, or NVIDIA's english_words.json; cwe takes long lists from it."""
    fixed_order: bool = True
    """True: documents and listed words are shuffled by the seed alone, as NVIDIA's generator does."""

    def names_of_tasks(self) -> list[str]:
        return [f"ruler/{name}" for name in self.names]

    def paths(self) -> list[tuple[str, str]]:
        named = [("squad", self.squad), ("hotpotqa", self.hotpotqa), ("words", self.words)]
        named.append(("dictionary", self.dictionary))
        return [("haystack", path) for path in self.haystack] + [(name, path) for name, path in named if path]


class NeedleTask(MadeTask):
    """A needle sentence in a book at a depth. sentence: the sandwich in San Francisco. number: a fresh number."""

    kind: Literal["needle"]
    names: Annotated[tuple[Literal["sentence", "number"], ...], Field(min_length=1)] = ("number",)
    depths_percent: Depths
    haystack: Paths = ()
    """Text files. Default: made-up sentences."""
    num_distractors: Annotated[int, Field(ge=0, le=6)] = 0
    """number: numbers of other cities that stand in the text as well."""

    def names_of_tasks(self) -> list[str]:
        return [f"niah/{name}" for name in self.names]

    def depths(self) -> tuple[float | None, ...]:
        return self.depths_percent

    def paths(self) -> list[tuple[str, str]]:
        return [("haystack", path) for path in self.haystack]


class MultiroundTask(MadeTask):
    """Which of several equal requests of a long conversation got which answer (after MRCR, arXiv 2409.12640)."""

    kind: Literal["multiround"]
    num_needles: Annotated[tuple[Positive, ...], Field(min_length=1)] = (2, 4, 8)
    haystack: Paths = ()
    """Text files that the answers are passages of. Default: made-up sentences."""

    def names_of_tasks(self) -> list[str]:
        return [f"multiround/{count}" for count in self.num_needles]

    def paths(self) -> list[tuple[str, str]]:
        return [("haystack", path) for path in self.haystack]


class ManyshotTask(MadeTask):
    """One text to label behind as many labelled examples as fit (after HELMET, arXiv 2410.02694)."""

    kind: Literal["manyshot"]
    num_labels: Annotated[int, Field(ge=2)] = 8
    """Of made-up examples; files have their own."""
    shown: str | None = None
    """JSON lines with text and label. Default: made-up examples."""
    asked: str | None = None

    @model_validator(mode="after")
    def _both_files_or_none(self) -> ManyshotTask:
        if (self.shown is None) != (self.asked is None):
            raise ValueError("manyshot takes shown and asked together, or neither for made-up examples")
        return self

    def names_of_tasks(self) -> list[str]:
        return ["manyshot/file" if self.shown else f"manyshot/{self.num_labels}"]

    def paths(self) -> list[tuple[str, str]]:
        return [(name, path) for name, path in (("shown", self.shown), ("asked", self.asked)) if path]


class RetrievedTask(MadeTask):
    """A short answer from one of many passages at a depth (after HELMET's RAG tasks)."""

    kind: Literal["retrieved"]
    depths_percent: Depths = (0.0, 50.0, 100.0)
    squad: str | None = None
    """A file in the form of SQuAD. Default: made-up questions."""

    def names_of_tasks(self) -> list[str]:
        return ["retrieved/questions"]

    def depths(self) -> tuple[float | None, ...]:
        return self.depths_percent

    def paths(self) -> list[tuple[str, str]]:
        return [("squad", self.squad)] if self.squad else []


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


Task = Annotated[
    RulerTask
    | StandardTask
    | NeedleTask
    | MultiroundTask
    | ManyshotTask
    | RetrievedTask
    | LvevalTask
    | InfinitebenchTask,
    Field(discriminator="kind"),
]
