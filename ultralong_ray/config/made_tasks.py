"""[[evaluate.tasks]] whose samples are made, from seeds. Names are those of `eval/tasks`, which a test compares."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from ultralong_ray.config.base import Positive
from ultralong_ray.config.task_section import Depths, Paths, TaskSection

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
SkillName = Literal["copying", "arithmetic", "key_value"]
NAMED_WORDS = ("wonderwords", "built in")  # lists that are no file


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
    """JSON lists noun, adjective, verb; or "wonderwords", RULER's own, which has to be installed; or "built in", about
    500 words of our own. Default: wonderwords where installed, else built in: other questions on another machine."""
    dictionary: str | None = None
    """One word a line, or NVIDIA's english_words.json; cwe takes long lists from it."""
    fixed_order: bool = True
    """True: documents and listed words are shuffled by the seed alone, as NVIDIA's generator does."""

    def names_of_tasks(self) -> list[str]:
        return [f"ruler/{name}" for name in self.names]

    def paths(self) -> list[tuple[str, str]]:
        words = None if self.words in NAMED_WORDS else self.words
        named = [("squad", self.squad), ("hotpotqa", self.hotpotqa), ("words", words), ("dictionary", self.dictionary)]
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


class ShortSkillsTask(MadeTask):
    """Copying, sums and key-value recall that fit any window: what an extension must not cost.

    Prompts are as long as their questions: there is no context length.
    """

    kind: Literal["short_skills"]
    names: Annotated[tuple[SkillName, ...], Field(min_length=1)] = get_args(SkillName)
    context_lengths: tuple[Literal[0]] = (0,)  # pyright: ignore[reportIncompatibleVariableOverride]

    def names_of_tasks(self) -> list[str]:
        return [f"short_skills/{name}" for name in self.names]
