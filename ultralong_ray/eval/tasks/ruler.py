"""RULER: thirteen tasks at any token budget, with the model's own tokenizer, and NVIDIA's own metrics.

In go a task's name, `Prompts`, a length, a seed and a sample's index; out comes a `Sample` that is a function of these
alone, so that samples can be made anywhere. Texts follow NVIDIA/RULER @ c3f5e3b4 (scripts/synthetic.yaml,
scripts/data/synthetic/*.py), metrics scripts/eval/synthetic/constants.py.

What differs from NVIDIA's generator, each for a reason:
- Every sample has its own random numbers and is filled to the budget; NVIDIA fits the first sample and shortens later
  ones in steps of 10 documents, 500 words or 25 lines.
- Solved examples (vt, cwe) stand in the user's message; for cwe NVIDIA repeats the whole chat template.
- Where a budget is too short for NVIDIA's form, a smaller one is used and `facts["reduced"]` says so.
- No needle repeats the key or value of another one that is asked for.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ultralong_ray.eval.tasks.budget import DoesNotFit, fill
from ultralong_ray.eval.tasks.haystack import Haystack
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.ruler_needles import Draft, NeedleSettings, needle_draft
from ultralong_ray.eval.tasks.ruler_questions import QuestionPool, question_draft
from ultralong_ray.eval.tasks.ruler_tracking import DEMONSTRATION_TOKENS, NUM_HOPS, solved, tracking_draft
from ultralong_ray.eval.tasks.ruler_words import (
    LONG_REPEATS,
    NUM_COMMON,
    SHORT_REPEATS,
    SHORTEST_REPEATS,
    Repeats,
    coded_text_draft,
    coded_vocabulary,
    common_words_draft,
)
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.words import Words
from ultralong_ray.types import UserError

NEEDLE_TASKS: dict[str, NeedleSettings] = {
    "niah_single_1": NeedleSettings("noise"),
    "niah_single_2": NeedleSettings("essay"),
    "niah_single_3": NeedleSettings("essay", values="uuids"),
    "niah_multikey_1": NeedleSettings("essay", num_keys=4),
    "niah_multikey_2": NeedleSettings("needle"),
    "niah_multikey_3": NeedleSettings("needle", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleSettings("essay", num_values=4),
    "niah_multiquery": NeedleSettings("essay", num_queries=4),
}
MAX_NEW_TOKENS = {**dict.fromkeys(NEEDLE_TASKS, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
RULER_TASKS = tuple(MAX_NEW_TOKENS)  # in the order of NVIDIA's tables
EFFECTIVE_SCORE = 85.6  # per cent, of Llama-2-7B at 4K: the longest length at or above it is "effective"
LONG_LISTS_FROM_TOKENS = 4096  # cwe has shorter examples and fewer repeats below
WORDS_PER_CODED_WORD = 50  # budget tokens per word of fwe's vocabulary
LEAST_CODED_WORDS = 27  # the fourth rank appears once
MAX_QUESTIONS_TRIED = 100  # before a length is called too short
NEARLY_FULL = 0.95  # of the budget, below which a word list was too short


@dataclass(frozen=True)
class RulerData:
    """What RULER's texts are made from. A task whose data is None cannot be made."""

    words: Words
    essay: Haystack | None = None
    squad: QuestionPool | None = None
    hotpotqa: QuestionPool | None = None


@dataclass(frozen=True)
class _Making:
    """Everything one sample depends on."""

    task: str
    prompts: Prompts
    data: RulerData
    length_tokens: int
    seed: int
    index: int
    fixed_order: bool

    def rng(self, purpose: str = "") -> random.Random:
        """A new generator at its start: a sample is built again for every number of units that is tried."""
        return random.Random(f"{self.seed}/{self.task}/{self.length_tokens}/{self.index}/{purpose}")

    @property
    def shuffle_seed(self) -> int:
        return self.seed if self.fixed_order else self.rng("order").getrandbits(32)

    def sample(self, draft: Draft, **facts: Any) -> Sample:
        metric = "string_match_part" if self.task.startswith("qa_") else "string_match_all"
        return Sample(
            task=f"ruler/{self.task}",
            index=self.index,
            context=draft.context,
            question=draft.question,
            answer_prefix=draft.answer_prefix,
            references=draft.answers,
            max_new_tokens=MAX_NEW_TOKENS[self.task],
            metric=metric,
            facts={**draft.facts, **facts},
        )

    def filled(self, draft: Callable[[int], Draft], *, least: int, most: int | None = None, **facts: Any) -> Sample:
        return fill(
            lambda units: self.sample(draft(units), **facts), self.prompts, self.length_tokens, least=least, most=most
        )


def ruler_sample(
    task: str,
    prompts: Prompts,
    data: RulerData,
    *,
    length_tokens: int,
    index: int,
    seed: int = 42,
    fixed_order: bool = True,
) -> Sample:
    """Sample `index` of a task, filled to `length_tokens` of prompt, answer prefix and `max_new_tokens`.

    `fixed_order`: NVIDIA shuffles documents, listed words and needles by the seed alone, so that with equally many
    documents the right one has the same place in every sample. False shuffles each sample anew.

    Raises: UserError for an unknown task or missing data; DoesNotFit when the length is too short.
    """
    if task not in MAX_NEW_TOKENS:
        raise UserError(f"RULER has no task {task!r}; its tasks are {', '.join(RULER_TASKS)}")
    making = _Making(task, prompts, data, length_tokens, seed, index, fixed_order)
    if task in NEEDLE_TASKS:
        return _needles(making, NEEDLE_TASKS[task])
    return {"vt": _tracking, "cwe": _common_words, "fwe": _coded_text, "qa_1": _question, "qa_2": _question}[task](
        making
    )


def _needles(making: _Making, settings: NeedleSettings) -> Sample:
    data = making.data
    if settings.haystack == "essay" and data.essay is None:
        raise UserError(
            f"ruler/{making.task} needs a haystack text; name a text file (NVIDIA's are Paul Graham's essays)"
        )
    facts: dict[str, Any] = {"words": data.words.source}
    if settings.haystack == "essay" and data.essay is not None:
        facts |= {"haystack": data.essay.source, "haystack_words": len(data.essay.words)}
    num_keys = max(settings.num_keys, settings.num_queries)
    needles = num_keys * settings.num_values
    if settings.keys == "words" and len(data.words.keys) <= num_keys:  # and one for the other lines
        raise UserError(
            f"ruler/{making.task} needs {num_keys + 1} different pairs of an adjective and a noun, and "
            f"{data.words.source} has {len(data.words.keys)}; name longer lists of words"
        )
    return making.filled(
        lambda units: needle_draft(settings, units, making.rng(), making.shuffle_seed, data.words, data.essay),
        least=1 if settings.haystack == "essay" else needles,
        **facts,
    )


def _tracking(making: _Making) -> Sample:
    """A solved example of at most 500 tokens (a third of a short budget) comes first; without room it is left out."""

    def problem(units: int, purpose: str, letters: int) -> Draft:
        numpy_rng = np.random.RandomState(making.rng("values" + purpose).getrandbits(32))
        return tracking_draft(units, making.rng(purpose), numpy_rng, name_letters=letters)

    def example_sample(units: int) -> Sample:
        return replace(making.sample(problem(units, "example", 3)), max_new_tokens=0)

    plain = Prompts(making.prompts.tokenizer, chat_template=False)
    least = NUM_HOPS + 1
    try:
        room = min(DEMONSTRATION_TOKENS, making.length_tokens // 3)
        lines = fill(example_sample, plain, room, least=least).context.count("\n") - least - 1
        example = solved(problem(lines, "example", 3))

        def with_example(units: int) -> Draft:
            draft = problem(units, "", 5)
            return replace(draft, context=example + draft.context)

        return making.filled(with_example, least=least)
    except DoesNotFit:
        return making.filled(lambda units: problem(units, "", 5), least=least, reduced="no solved example")


def _common_words(making: _Making) -> Sample:
    words = making.data.words
    pool = words.common_pool(making.seed)
    most = words.most_distinct(pool)

    def attempt(repeats: Repeats, **facts: Any) -> Sample:
        def draft(units: int) -> Draft:
            return common_words_draft(units, making.rng(), making.shuffle_seed, words, pool, repeats)

        return making.filled(
            draft, least=NUM_COMMON, most=most, words=words.source, from_dictionary=bool(words.dictionary), **facts
        )

    official = LONG_REPEATS if making.length_tokens >= LONG_LISTS_FROM_TOKENS else SHORT_REPEATS
    if most < official.example_words:
        raise UserError(
            f"ruler/cwe needs {official.example_words} different words for its example, and {words.source} has {most}; "
            f"name longer lists of words, or a dictionary"
        )
    smaller = [repeats for repeats in (SHORT_REPEATS, SHORTEST_REPEATS) if repeats != official]
    sample = _first_that_fits(
        lambda: attempt(official),
        *(lambda repeats=repeats: attempt(repeats, reduced="fewer repeats, shorter example") for repeats in smaller),
    )
    if sample.facts["distinct_words"] == most and sample.facts["length_tokens"] < NEARLY_FULL * making.length_tokens:
        raise UserError(
            f"ruler/cwe at {making.length_tokens} tokens needs more than the {most} words of {words.source}; name a "
            f"dictionary of one word a line (NVIDIA's has 370,101)"
        )
    return sample


def _coded_text(making: _Making) -> Sample:
    size = max(5, (making.length_tokens - MAX_NEW_TOKENS["fwe"]) // WORDS_PER_CODED_WORD)
    vocabulary = coded_vocabulary(size, making.rng(), making.shuffle_seed)
    return making.filled(
        lambda units: coded_text_draft(units, vocabulary, making.shuffle_seed), least=LEAST_CODED_WORDS
    )


def _question(making: _Making) -> Sample:
    """Question `index` of the pool; where its paragraphs alone are too long, the next one that fits."""
    pool = making.data.squad if making.task == "qa_1" else making.data.hotpotqa
    if pool is None:
        form = "SQuAD (dev-v2.0)" if making.task == "qa_1" else "HotpotQA (dev, distractor)"
        raise UserError(f"ruler/{making.task} needs questions; name a file in the form of {form}")

    def attempt(number: int, only_needed: bool) -> Sample:
        question = pool.questions[number]
        reduced = only_needed and set(question.needed) != set(question.gold)
        facts: dict[str, Any] = {"reduced": "only the paragraphs that the answer needs"} if reduced else {}
        return making.filled(
            lambda units: question_draft(
                pool, number, units, making.rng(), making.shuffle_seed, only_needed=only_needed
            ),
            least=len(question.needed if only_needed else question.gold),
            questions_from=pool.source,
            **facts,
        )

    tried = min(len(pool.questions), MAX_QUESTIONS_TRIED)
    numbers = [(making.index + step) % len(pool.questions) for step in range(tried)]
    later = [lambda number=number: attempt(number, True) for number in numbers]
    return _first_that_fits(lambda: attempt(numbers[0], False), *later)


def _first_that_fits(*attempts: Callable[[], Sample]) -> Sample:
    for attempt in attempts[:-1]:
        try:
            return attempt()
        except DoesNotFit:
            continue
    return attempts[-1]()


def postprocess(prediction: str) -> str:
    """RULER's clean-up (scripts/eval/evaluate.py): control characters become newlines, the ends are stripped."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def matches(prediction: str, references: Sequence[str]) -> list[float]:
    """1.0 for every reference that stands in the cleaned prediction, case aside: `3085` contains `308`."""
    cleaned = postprocess(prediction).lower()
    return [1.0 if reference.lower() in cleaned else 0.0 for reference in references]


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references found, 0 to 1."""
    found = matches(prediction, references)
    return sum(found) / len(found)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 when any reference is found, else 0."""
    return max(matches(prediction, references))


def ruler_mean(scores: Sequence[float]) -> float:
    """Mean over the rows of a task as RULER prints it: per cent with two decimals."""
    return round(sum(scores) / len(scores) * 100, 2)
