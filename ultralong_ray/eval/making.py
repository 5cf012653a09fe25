"""From a section of [[evaluate.tasks]] to the samples of a cell. No torch, no Ray.

In go the section, one of its `Work`s, the rows asked for and the `Prompts` of a model; out come `Sample`s, made one by
one as they are taken. A `Maker` lives as long as its worker and reads every file once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.made_tasks import (
    ManyshotTask,
    MultiroundTask,
    NeedleTask,
    RetrievedTask,
    RulerTask,
    ShortSkillsTask,
)
from ultralong_ray.config.read_tasks import InfinitebenchTask, LvevalTask, PerplexityTask, StandardTask
from ultralong_ray.config.task_section import Work
from ultralong_ray.config.tasks import Task
from ultralong_ray.eval.tasks.haystack import Haystack, load_haystack
from ultralong_ray.eval.tasks.infinitebench import infinitebench_samples
from ultralong_ray.eval.tasks.infinitebench_made import made_sample
from ultralong_ray.eval.tasks.lveval import lveval_samples
from ultralong_ray.eval.tasks.made_texts import built_in_words, made_haystack, made_questions, made_two_hop_questions
from ultralong_ray.eval.tasks.manyshot import LabelledTexts, load_labelled, made_labelled, manyshot_sample
from ultralong_ray.eval.tasks.multiround import multiround_sample
from ultralong_ray.eval.tasks.needle import needle_sample
from ultralong_ray.eval.tasks.perplexity import long_documents
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.reading import read_text
from ultralong_ray.eval.tasks.retrieved import retrieved_sample
from ultralong_ray.eval.tasks.ruler import RulerData, ruler_sample
from ultralong_ray.eval.tasks.ruler_questions import load_hotpotqa, load_squad
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.short_skills import short_skills_sample
from ultralong_ray.eval.tasks.standard import Row, check_examples, few_shot_rows, standard_rows
from ultralong_ray.eval.tasks.words import load_words
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError, sources_of

T = TypeVar("T")
MADE_EXAMPLES_TOKENS = 12  # about, of one made-up many-shot example: how many a length can hold
NUM_ASKED = 200  # made-up texts that many-shot asks about


class Maker:
    """Makes the samples of every section. `files`: the place of every path that a section names."""

    def __init__(self, files: Mapping[str, Location]) -> None:
        self._files = files
        self._kept: dict[Any, Any] = {}

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returned the first time."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def num_samples(self, section: Task, task: str) -> int:
        """Samples that a task has at every length. Raises: UserError for an absent file or one without rows."""
        if isinstance(section, StandardTask):
            return len(self.standard(section, task)[0])
        file = self._rows_file(section, task)
        if file is None:
            assert section.samples_per_cell is not None
            return section.samples_per_cell
        rows = self._once(("rows", file), lambda: sum(bool(line.strip()) for line in read_text(file).split("\n")))
        if rows == 0:
            raise UserError(f"{file}: no rows; fetch the file again")
        return min(rows, section.samples_per_cell or rows)

    def standard(self, section: StandardTask, task: str) -> tuple[list[Row], list[dict[str, Any]]]:
        """Rows of a standard test, and its few-shot examples.

        Raises: UserError for an absent file, a bad line, and a subject with too few examples.
        """
        name, folder = task.split("/", 1)[1], self._files[section.data_folder]

        def read() -> tuple[list[Row], list[dict[str, Any]]]:
            rows, few_shot = standard_rows(name, folder, section.limit), few_shot_rows(name, folder)
            check_examples(name, folder, rows, few_shot, section.num_fewshot)
            return rows, few_shot

        return self._once((section, task), read)

    def documents(
        self, section: PerplexityTask, length_tokens: int, tokenizer: Any, first: int, count: int
    ) -> Iterator[NDArray[np.int32]]:
        """Documents `first` to `first + count - 1` of those that are long enough, cut: each int32 [length_tokens].

        Raises: UserError for an absent or damaged file, and when there are fewer documents of that length.
        """
        files, end = [self._files[path] for path in section.documents], first + count
        yield from islice(long_documents(files, tokenizer, length_tokens=length_tokens, count=end), first, end)

    def _rows_file(self, section: Task, task: str) -> Location | None:
        """The JSON-lines file of a task that is read and not made."""
        name = task.split("/", 1)[1]
        if isinstance(section, LvevalTask | InfinitebenchTask) and section.data_folder:
            return self._files[f"{section.data_folder.rstrip('/')}/{name}.jsonl"]
        return None

    def samples(self, section: Task, work: Work, prompts: Prompts, first: int, count: int) -> Iterator[Sample]:
        """Samples `first` to `first + count - 1` of a work, each a function of the section and its own number.

        Raises: UserError for data that is absent or broken; DoesNotFit when the length is too short.
        """
        file = self._rows_file(section, work.task)
        name, length = work.task.split("/", 1)[1], work.context_length_tokens
        rows: dict[str, Any] = {"length_tokens": length, "first": first, "limit": count}
        if file is not None and isinstance(section, LvevalTask):
            which, _, level = name.rpartition("_")
            yield from lveval_samples(which, level, file.parent, prompts, **rows)
        elif file is not None and isinstance(section, InfinitebenchTask):
            yield from infinitebench_samples(name, file.parent, prompts, template=section.template, **rows)
        else:
            make = self._one(section, work, prompts)
            yield from (make(index) for index in range(first, first + count))

    def _one(self, section: Task, work: Work, prompts: Prompts) -> Callable[[int], Sample]:
        """The function from a sample's number to the sample, for kinds that are made."""
        name = work.task.split("/", 1)[1]
        depth = 50.0 if work.depth_percent is None else work.depth_percent
        common: dict[str, Any] = {"length_tokens": work.context_length_tokens, "seed": getattr(section, "seed", 0)}
        if isinstance(section, RulerTask):
            data, fixed = self._once(section, lambda: self._ruler_data(section)), section.fixed_order
            return lambda i: ruler_sample(name, prompts, data, index=i, fixed_order=fixed, **common)
        if isinstance(section, NeedleTask):
            haystack, others = self._haystack(section.haystack), section.num_distractors if name == "number" else 0
            form: Any = name
            return lambda i: needle_sample(
                form, haystack, prompts, depth_percent=depth, index=i, num_distractors=others, **common
            )
        if isinstance(section, MultiroundTask):
            haystack, words, needles = self._haystack(section.haystack), built_in_words(), int(name)
            return lambda i: multiround_sample(haystack, words, prompts, num_needles=needles, index=i, **common)
        if isinstance(section, ManyshotTask):
            labelled = self._once((section, work), lambda: self._labelled(section, work.context_length_tokens))
            return lambda i: manyshot_sample(labelled, prompts, index=i, **common)
        if isinstance(section, RetrievedTask):
            pool = self._once(
                section, lambda: load_squad(self._files[section.squad]) if section.squad else made_questions()
            )
            return lambda i: retrieved_sample(pool, prompts, depth_percent=depth, index=i, **common)
        if isinstance(section, ShortSkillsTask):
            return lambda i: short_skills_sample(name, built_in_words(), prompts, index=i, seed=section.seed)
        assert isinstance(section, InfinitebenchTask)
        template = section.template
        return lambda i: made_sample(name, prompts, index=i, template=template, depth_percent=depth, **common)

    def _ruler_data(self, section: RulerTask) -> RulerData:
        place = self._files
        return RulerData(
            words=load_words(
                place.get(section.words, section.words) if section.words else None,
                place[section.dictionary] if section.dictionary else None,
            ),
            essay=self._haystack(section.haystack),
            squad=load_squad(place[section.squad]) if section.squad else made_questions(),
            hotpotqa=load_hotpotqa(place[section.hotpotqa]) if section.hotpotqa else made_two_hop_questions(),
        )

    def _haystack(self, paths: tuple[str, ...]) -> Haystack:
        files = [self._files[path] for path in paths]
        return self._once(("haystack", paths), lambda: load_haystack(files) if files else made_haystack())

    def _labelled(self, section: ManyshotTask, length_tokens: int) -> LabelledTexts:
        if section.shown and section.asked:
            return load_labelled(self._files[section.shown], self._files[section.asked])
        shown = max(section.num_labels, length_tokens // MADE_EXAMPLES_TOKENS)
        return made_labelled(
            built_in_words(), num_labels=section.num_labels, num_shown=shown, num_asked=NUM_ASKED, seed=section.seed
        )


def check_sections(config: EvaluateConfig, maker: Maker, prompts_of: Callable[[bool], Prompts]) -> dict[str, set[str]]:
    """Make the first sample of every task at its shortest length, before hours are spent on the others; of documents
    for perplexity all at the greatest length, since there may be too few.

    Returns, by task, what those samples are made from (`sources_of`). Raises: UserError naming the section: its data
    is broken, or its prompt does not fit into the length.
    """
    made_from: dict[str, set[str]] = {}
    for number, section in enumerate(config.tasks):
        prompts = prompts_of(config.chat_template if section.chat_template is None else section.chat_template)
        shortest = min(section.context_lengths)
        if isinstance(section, StandardTask):
            continue  # every row was read when the cells were counted
        if isinstance(section, PerplexityTask):
            _check_documents(section, f"evaluate.tasks.{number}", maker, prompts.tokenizer)
            continue
        for name in section.names_of_tasks():
            work = Work(name, shortest, section.depths()[0])
            try:
                sample = next(iter(maker.samples(section, work, prompts, 0, 1)))
            except UserError as error:
                raise UserError(f"evaluate.tasks.{number} ({name} at {shortest} tokens): {error}") from error
            made_from[name] = sources_of(sample.facts)
    return made_from


def _check_documents(section: PerplexityTask, field: str, maker: Maker, tokenizer: Any) -> None:
    try:
        for _ in maker.documents(section, max(section.context_lengths), tokenizer, 0, section.samples_per_cell):
            pass
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
