"""LV-Eval: eleven question sets at five length levels, read from its files.

In go a set, a level and the folder with `<set>_<level>.jsonl`; out come `Sample`s. Prompts and answer lengths are those
of infinigence/LVEval @ 63e7ae93, config.py and prediction.py. Levels count words (English) or characters (Chinese), not
tokens: what is longer than the window loses its middle. Rows without `answer_keywords` (loogle_CR, loogle_MIR) are
scored by plain F1.
"""

# ruff: noqa: RUF001  (Chinese punctuation is meant)
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.eval.tasks.cutting import cut_to_window, decoded_in_halves
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.reading import read_rows, text_field
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

LEVELS = ("16k", "32k", "64k", "128k", "256k")
_ONLY_ANSWER = "Only give me the answer and do not output any other explanation and evidence."
_ONE_PASSAGE = "Questions and answers are only relevant to one passage. " + _ONLY_ANSWER
_SOME_PASSAGES = "Questions and answers are only relevant to some passages. " + _ONLY_ANSWER
_ONE_PASSAGE_ZH = "问题和答案只与其中一篇文章有关。"
_ONLY_ANSWER_ZH = "只需要直接给出问题的答案，不要输出其他任何解释和证据。"


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """`opening` stands before the text, `demand` after it and before the question."""

    metric: str
    opening: str
    demand: str
    chinese: bool = False
    max_new_tokens: int = 64


def _english(metric: str, opening: str, demand: str, max_new_tokens: int = 64) -> QuestionSet:
    return QuestionSet(metric, f"{opening}\n\nArticle: ", f"\n\n{demand}\n\n", max_new_tokens=max_new_tokens)


def _chinese(metric: str, opening: str, demand: str, max_new_tokens: int = 64) -> QuestionSet:
    return QuestionSet(metric, f"{opening}\n\n文章：", f"\n\n{demand}\n\n", True, max_new_tokens)


_LOOGLE = _english(
    "lveval_english_gated_f1",
    f"Please answer the following question based on the given passages. {_ONE_PASSAGE}",
    f"Please answer the following question based on the above passages. {_ONE_PASSAGE}",
)
_MIXUP_OPENING_ZH = f"请根据下面给定的文章回答问题，{_ONE_PASSAGE_ZH}"
_MIXUP_DEMAND_ZH = f"现在请基于上述文章回答下面的问题，{_ONE_PASSAGE_ZH}"
SETS: dict[str, QuestionSet] = {
    "hotpotwikiqa_mixup": _english(
        "lveval_english_gated_f1",
        f"Answer the question based on the given passages. {_SOME_PASSAGES}",
        f"Please answer the following question based on the above passages. {_SOME_PASSAGES}",
    ),
    "loogle_SD_mixup": _LOOGLE,
    "loogle_CR_mixup": _LOOGLE,
    "loogle_MIR_mixup": _LOOGLE,
    "multifieldqa_en_mixup": _LOOGLE,
    "multifieldqa_zh_mixup": _chinese(
        "lveval_chinese_gated_f1",
        f"请阅读以下文章并用中文回答问题，{_ONE_PASSAGE_ZH}{_ONLY_ANSWER_ZH}",
        f"请基于上面的文章回答下面的问题，{_ONE_PASSAGE_ZH}{_ONLY_ANSWER_ZH}",
    ),
    "factrecall_en": _english(
        "lveval_english_f1",
        "Please answer the following questions based on the given article.",
        "Please answer the following questions based on the above article.",
        16,
    ),
    "factrecall_zh": _chinese(
        "lveval_chinese_f1", "请基于给定的文章回答下述问题。", "现在请基于上述文章回答下面的问题。", 16
    ),
    "cmrc_mixup": _chinese("lveval_chinese_gated_f1", _MIXUP_OPENING_ZH, _MIXUP_DEMAND_ZH),
    "lic_mixup": _chinese(
        "lveval_chinese_gated_f1",
        _MIXUP_OPENING_ZH,
        f"请现在基于上述文章回答下面的问题，{_ONE_PASSAGE_ZH}",
    ),
    "dureader_mixup": _chinese("lveval_chinese_rouge", _MIXUP_OPENING_ZH, _MIXUP_DEMAND_ZH),
}


def lveval_prompt(name: str, context: str, question: str) -> tuple[str, str]:
    """(context, question) parts of a prompt; together the official text."""
    form = SETS[name]
    asked = f"问题：{question}\n回答：" if form.chinese else f"Question: {question}\nAnswer:"
    return form.opening + context, form.demand + asked


def lveval_samples(
    name: str,
    level: str,
    folder: Location,
    prompts: Prompts,
    *,
    length_tokens: int,
    first: int = 0,
    limit: int | None = None,
) -> list[Sample]:
    """`limit` rows (None: all) of a set at a level, from row `first` on.

    Raises: UserError for an unknown set or level, an absent file or a bad line; DoesNotFit for a window too short.
    """
    if name not in SETS or level not in LEVELS:
        raise UserError(
            f"LV-Eval has no {name!r} at {level!r}; its sets are {', '.join(SETS)}; its levels {', '.join(LEVELS)}"
        )
    file = folder / f"{name}_{level}.jsonl"
    rows = list(enumerate(read_rows(file, ("input", "context", "answers"))))[first:][:limit]
    samples = [_sample(name, level, index, row, f"{file}: row {index + 1}") for index, row in rows]
    return [cut_to_window(sample, prompts, length_tokens, decoded_in_halves) for sample in samples]


def _sample(name: str, level: str, index: int, row: dict[str, Any], where: str) -> Sample:
    answers, keywords = row["answers"], row.get("answer_keywords")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: field 'answers' must be a list of texts, at least one; mend the line")
    if keywords is not None and not isinstance(keywords, str):
        raise UserError(f"{where}: field 'answer_keywords' must be text, not {type(keywords).__name__}; mend the line")
    context, question = lveval_prompt(name, text_field(row, "context", where), text_field(row, "input", where))
    return Sample(
        task=f"lveval/{name}_{level}",
        index=index,
        context=context,
        question=question,
        answer_prefix="",
        references=tuple(answers),
        max_new_tokens=SETS[name].max_new_tokens,
        metric=SETS[name].metric,
        facts={"keywords": keywords, "words": row.get("length")},
    )


def lveval_mean(scores: Sequence[float]) -> float:
    """Mean over the rows of a set and level as LV-Eval prints it: per cent with two decimals."""
    return round(100 * sum(scores) / len(scores), 2)
