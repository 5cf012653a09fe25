"""Many-shot classification: hundreds to millions of tokens of labelled examples, then one text to label.

In go labelled texts, from a file or made up; out comes a `Sample`. The form follows the in-context learning tasks of
HELMET (arXiv 2410.02694; princeton-nlp/HELMET, data.py) in words of our own: labels are numbers that mean nothing
outside the prompt, and every label has about equally many examples. Made-up texts name one of a few nouns per label
among other words; which noun stands for which label can be learned from the examples alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.eval.tasks.budget import fill
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.reading import read_rows, text_field
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.words import Words
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

INSTRUCTION = (
    "Below are texts, each with the number of its label. Learn from them which label a text gets. "
    'For the last text, answer with its label in the form "label: {number}" and nothing else.\n\n'
)
EXAMPLE = "{text}\nlabel: {label}\n\n"
QUESTION = "{text}\n"
ANSWER_PREFIX = "label:"
MAX_NEW_TOKENS = 8
NOUNS_PER_LABEL = 3


@dataclass(frozen=True)
class LabelledTexts:
    """Examples to show and texts to ask about, each (text, label). No text is in both."""

    source: str
    shown: tuple[tuple[str, str], ...]
    asked: tuple[tuple[str, str], ...]


def load_labelled(shown: Location, asked: Location) -> LabelledTexts:
    """Two JSON-lines files with `text` and `label`. Texts that are in both are only asked.

    Raises: UserError for an absent file or a bad line, or when a label is asked for that is never shown.
    """
    tests = _pairs(asked)
    texts = {text for text, _ in tests}
    examples = [(text, label) for text, label in _pairs(shown) if text not in texts]
    unknown = sorted({label for _, label in tests} - {label for _, label in examples})
    if unknown:
        raise UserError(f"{asked}: label {unknown[0]!r} has no example in {shown}; add some or remove its rows")
    return LabelledTexts(shown.name, tuple(examples), tests)


def _pairs(file: Location) -> tuple[tuple[str, str], ...]:
    rows = read_rows(file, ("text", "label"))
    return tuple(
        (text_field(row, "text", f"{file}: row {i}"), str(row["label"])) for i, row in enumerate(rows, start=1)
    )


def made_labelled(words: Words, *, num_labels: int, num_shown: int, num_asked: int, seed: int) -> LabelledTexts:
    """Made-up texts `The old lantern near the quiet mill.`; the first noun decides the label.

    Raises: UserError when there are too few nouns for `num_labels`.
    """
    rng = random.Random(f"{seed}/manyshot/{num_labels}")
    needed = num_labels * NOUNS_PER_LABEL
    if len(words.nouns) < 2 * needed:
        raise UserError(
            f"many-shot: {num_labels} labels need {2 * needed} nouns, {words.source} has {len(words.nouns)}"
        )
    nouns = rng.sample(words.nouns, len(words.nouns))
    deciding, idle = nouns[:needed], nouns[needed:]

    def text(noun: str) -> str:
        return f"The {rng.choice(words.adjectives)} {noun} near the {rng.choice(words.adjectives)} {rng.choice(idle)}."

    pairs: dict[str, str] = {}
    while len(pairs) < num_shown + num_asked:
        place = len(pairs) % needed  # labels and their nouns take turns
        pairs.setdefault(text(deciding[place]), str(place % num_labels))
    listed = list(pairs.items())
    return LabelledTexts("made up", tuple(listed[:num_shown]), tuple(listed[num_shown:]))


def manyshot_sample(data: LabelledTexts, prompts: Prompts, *, length_tokens: int, index: int, seed: int) -> Sample:
    """Text `index` behind as many examples as fit; examples run out before the budget where the data is small.

    Labels are renumbered at random per sample, and examples come in rounds with one of each label.

    Raises: DoesNotFit when one example of each label is too long.
    """
    rng = random.Random(f"{seed}/manyshot/{length_tokens}/{index}")
    by_label: dict[str, list[str]] = {}
    for text, label in data.shown:
        by_label.setdefault(label, []).append(text)
    numbers = dict(zip(sorted(by_label), rng.sample(range(len(by_label)), len(by_label)), strict=True))
    queues = {label: rng.sample(texts, len(texts)) for label, texts in sorted(by_label.items())}
    order: list[tuple[str, int]] = []
    for turn in range(max(map(len, queues.values()))):
        row = [(texts[turn], numbers[label]) for label, texts in queues.items() if turn < len(texts)]
        order += rng.sample(row, len(row))
    asked, label = data.asked[index % len(data.asked)]

    def build(shots: int) -> Sample:
        examples = "".join(EXAMPLE.format(text=text, label=number) for text, number in order[:shots])
        facts: dict[str, Any] = {"shots": shots, "labels": len(numbers), "texts_from": data.source}
        return Sample(
            task=f"manyshot/{len(numbers)}",
            index=index,
            context=INSTRUCTION + examples,
            question=QUESTION.format(text=asked),
            answer_prefix=ANSWER_PREFIX,
            references=(str(numbers[label]),),
            max_new_tokens=MAX_NEW_TOKENS,
            metric="first_number",
            facts=facts,
        )

    return fill(build, prompts, length_tokens, least=min(len(numbers), len(order)), most=len(order))


def first_number(prediction: str, references: Sequence[str]) -> float:
    """1 when the first run of digits is the expected one, else 0; compared as text."""
    match = re.search("[0-9]+", prediction)
    return float(match is not None and match.group() in references)
