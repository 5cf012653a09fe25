"""RULER's question answering: a question, its paragraphs, and others to hide them among.

In go files in SQuAD's or HotpotQA's form; out come a `QuestionPool` and `Draft`s. Follows NVIDIA/RULER @ c3f5e3b4,
scripts/data/synthetic/qa.py, draw by draw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.eval.tasks.reading import read_json
from ultralong_ray.eval.tasks.ruler_needles import Draft
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

DEMAND = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
)
INSTRUCTION = DEMAND + "The following are given documents.\n\n"
QUESTION = "\n\n" + DEMAND + "Question: {question}"
ANSWER_PREFIX = " Answer:"


@dataclass(frozen=True, slots=True)
class Question:
    """`gold` are paragraphs that must be shown; `related` are shown before any others. Both index into the pool."""

    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()
    needed: tuple[int, ...] = ()  # the part of `gold` that holds the answer, where it is known


@dataclass(frozen=True)
class QuestionPool:
    """Questions over a pool of distinct paragraphs, sorted. `source` says where they are from."""

    source: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]


def question_draft(
    pool: QuestionPool,
    index: int,
    num_documents: int,
    rng: random.Random,
    shuffle_seed: int,
    *,
    only_needed: bool = False,
) -> Draft:
    """Question `index` with `num_documents` paragraphs, at least those it needs.

    Beyond the pool the paragraphs repeat, as in RULER: from a few hundred thousand tokens on, every paragraph of SQuAD
    stands there more than once. `facts["answer_count"]` says how often the first answer is in the text.
    """
    question = pool.questions[index]
    gold = list(question.needed if only_needed else question.gold)
    related = list(question.related)
    if num_documents < len(pool.paragraphs):
        if num_documents - len(gold) > len(related):
            shown = {*gold, *related}
            others = [i for i in range(len(pool.paragraphs)) if i not in shown]
            chosen = gold + related + rng.sample(others, num_documents - len(gold) - len(related))
        else:
            chosen = gold + rng.sample(related, num_documents - len(gold))
    else:
        chosen = [i % len(pool.paragraphs) for i in range(num_documents)]
    random.Random(shuffle_seed).shuffle(chosen)
    context = "\n\n".join(f"Document {n}:\n{pool.paragraphs[i]}" for n, i in enumerate(chosen, start=1))
    facts = {
        "question": index,
        "documents": num_documents,
        "gold_documents": sorted({n for n, i in enumerate(chosen, start=1) if i in (question.needed or gold)}),
        "answer_count": context.count(question.answers[0]),
    }
    return Draft(
        INSTRUCTION + context, QUESTION.format(question=question.question), ANSWER_PREFIX, question.answers, facts
    )


def load_squad(file: Location, distractors: Sequence[str] = ()) -> QuestionPool:
    """Answerable questions of a file in SQuAD's form (1.1 or 2.0). `distractors` join the pool, which RULER has not.

    Raises: UserError naming the file and the place where the form is broken.
    """
    articles = _articles(read_json(file), file)
    pool = sorted({paragraph["context"] for article in articles for paragraph in article} | set(distractors))
    index = {paragraph: i for i, paragraph in enumerate(pool)}
    questions = []
    for article in articles:
        own = [index[paragraph["context"]] for paragraph in article]
        for paragraph in article:
            gold = index[paragraph["context"]]
            related = tuple(i for i in own if i != gold)
            for qa in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in qa.get("answers", ()))
                if answers and not qa.get("is_impossible", False):
                    questions.append(Question(qa["question"], answers, (gold,), related, (gold,)))
    if not questions:
        raise UserError(f"{file}: no answerable question; a file in the form of SQuAD dev-v2.0 is needed")
    return QuestionPool(file.name, tuple(pool), tuple(questions))


def _articles(value: Any, file: Location) -> list[list[dict[str, Any]]]:
    try:
        articles = [article["paragraphs"] for article in value["data"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not in SQuAD's form (data -> paragraphs -> context, qas): {error!r}") from error
    for number, article in enumerate(articles):
        if not isinstance(article, list):
            raise UserError(f"{file}: data[{number}].paragraphs must be a list, not {_kind(article)}; mend the file")
        for place, paragraph in enumerate(article):
            _check_paragraph(paragraph, f"{file}: data[{number}].paragraphs[{place}]")
    return articles


def _check_paragraph(paragraph: Any, where: str) -> None:
    """Raises: UserError naming `where`."""
    if not isinstance(paragraph, dict):
        raise UserError(f"{where}: an object with `context` and `qas` is needed, not {_kind(paragraph)}; mend the file")
    if not isinstance(paragraph.get("context"), str) or not isinstance(paragraph.get("qas"), list):
        raise UserError(f"{where}: a text `context` and a list `qas` are needed; mend the file")
    if not all(isinstance(qa, dict) and isinstance(qa.get("question"), str) for qa in paragraph["qas"]):
        raise UserError(f"{where}: one of its qas has no `question`; mend the file")
    for qa in paragraph["qas"]:
        answers = qa.get("answers", [])
        if not isinstance(answers, list):
            raise UserError(f"{where}: `answers` of one of its qas is {_kind(answers)} and no list; mend the file")
        if not all(isinstance(answer, dict) and _is_text(answer.get("text")) for answer in answers):
            raise UserError(f"{where}: one of its answers has no text `text`, or a blank one; mend the file")
    if not paragraph["context"].strip() and any(qa.get("answers") for qa in paragraph["qas"]):
        raise UserError(f"{where}: a blank `context` cannot hold answers; mend or remove the paragraph")


def _is_text(value: Any) -> bool:
    """Whether there is something to read: a blank answer would be found in whatever a model says."""
    return isinstance(value, str) and bool(value.strip())


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def load_hotpotqa(file: Location, distractors: Sequence[str] = ()) -> QuestionPool:
    """Questions of a file in the form of HotpotQA's dev set, distractor setting (a list; ten paragraphs each).

    Raises: UserError naming the file and the row where the form is broken.
    """
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: a list of questions is needed, as in hotpot_dev_distractor_v1.json")
    written = [_hotpotqa_paragraphs(row, f"{file}: row {number}") for number, row in enumerate(rows)]
    pool = sorted({paragraph for row in written for paragraph in row} | set(distractors))
    index = {paragraph: i for i, paragraph in enumerate(pool)}
    questions = []
    for row, paragraphs in zip(rows, written, strict=True):
        gold = tuple(index[paragraph] for paragraph in paragraphs)
        questions.append(Question(row["question"], (row["answer"],), gold, (), _supporting(row, gold)))
    return QuestionPool(file.name, tuple(pool), tuple(questions))


def _hotpotqa_paragraphs(row: Any, where: str) -> list[str]:
    """The paragraphs of a row as they are shown. Raises: UserError naming `where` for any of its fields."""
    if not isinstance(row, dict) or not {"question", "answer", "context"} <= set(row):
        raise UserError(f"{where} needs `question`, `answer` and `context`; mend the file")
    if not _is_text(row["question"]) or not _is_text(row["answer"]):
        raise UserError(f"{where}: `question` and `answer` must be text, and not blank; mend the file")
    context, facts = row["context"], row.get("supporting_facts") or []
    if not isinstance(context, list) or not context or not all(map(_is_titled, context)):
        raise UserError(f"{where}: `context` must be a list of [title, [sentences]], and not empty; mend the file")
    if not isinstance(facts, list) or not all(isinstance(f, list) and f and isinstance(f[0], str) for f in facts):
        raise UserError(f"{where}: `supporting_facts` must be a list of [title, number of sentence]; mend the file")
    return [f"{title}\n{''.join(sentences)}" for title, sentences in context]


def _is_titled(paragraph: Any) -> bool:
    if not isinstance(paragraph, list) or len(paragraph) != 2 or not isinstance(paragraph[1], list):
        return False
    return isinstance(paragraph[0], str) and all(isinstance(sentence, str) for sentence in paragraph[1])


def _supporting(row: dict[str, Any], gold: tuple[int, ...]) -> tuple[int, ...]:
    """The paragraphs that the answer needs: those named as supporting, else the two that some copies put first."""
    named = {fact[0] for fact in row.get("supporting_facts") or ()}
    if named:
        return tuple(i for i, (title, _) in zip(gold, row["context"], strict=True) if title in named)
    return gold[:2]
