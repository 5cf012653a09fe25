"""Answers to scores: one pure function for every metric, and the mean as each benchmark prints it.

In go a `Sample` and a model's answer; out comes a score from 0 to 1. Nothing here needs the model, so stored answers
can be scored again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ultralong_ray.eval.tasks import lveval_metrics
from ultralong_ray.eval.tasks.infinitebench_metrics import infinitebench_score
from ultralong_ray.eval.tasks.lveval import lveval_mean
from ultralong_ray.eval.tasks.manyshot import first_number
from ultralong_ray.eval.tasks.multiround import sequence_ratio
from ultralong_ray.eval.tasks.needle import word_recall
from ultralong_ray.eval.tasks.retrieved import substring_exact_match
from ultralong_ray.eval.tasks.ruler import ruler_mean, string_match_all, string_match_part
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.short_skills import words_repeated

# LV-Eval's evaluation.py looks at the first answer only.
METRICS: dict[str, Callable[[str, Sample], float]] = {
    "string_match_all": lambda answer, sample: string_match_all(answer, sample.references),
    "string_match_part": lambda answer, sample: string_match_part(answer, sample.references),
    "first_number": lambda answer, sample: first_number(answer, sample.references),
    "word_recall": lambda answer, sample: word_recall(answer, sample.references),
    # A model without a chat template begins its answer with a space; MRCR's rule is for messages, which do not.
    "sequence_ratio": lambda answer, sample: sequence_ratio(answer.lstrip(), sample.references, sample.facts["prefix"]),
    "words_repeated": lambda answer, sample: words_repeated(answer, sample.references),
    "substring_exact_match": lambda answer, sample: substring_exact_match(answer, sample.references),
    "lveval_english_f1": lambda answer, sample: lveval_metrics.english_f1(answer, sample.references[0]),
    "lveval_english_gated_f1": lambda answer, sample: lveval_metrics.english_gated_f1(
        answer, sample.references[0], sample.facts["keywords"]
    ),
    "lveval_chinese_f1": lambda answer, sample: lveval_metrics.chinese_f1(answer, sample.references[0]),
    "lveval_chinese_gated_f1": lambda answer, sample: lveval_metrics.chinese_gated_f1(
        answer, sample.references[0], sample.facts["keywords"]
    ),
    "lveval_chinese_rouge": lambda answer, sample: lveval_metrics.chinese_rouge(answer, sample.references[0]),
    "infinitebench": lambda answer, sample: infinitebench_score(
        sample.task.removeprefix("infinitebench/"), answer, list(sample.references), sample.facts["template"]
    ),
}


def score(sample: Sample, answer: str) -> float:
    """0 to 1. `answer` is what the model wrote behind the answer prefix, cut at nothing.

    Raises: UserError when a Chinese LV-Eval set is scored without jieba.
    """
    return METRICS[sample.metric](answer, sample)


def mean_percent(suite: str, scores: Sequence[float]) -> float:
    """Mean of a task's scores in per cent: RULER and LV-Eval round to two decimals, the others do not.

    `suite` is the part of `Sample.task` before the slash. `scores` holds at least one.
    """
    if suite == "ruler":
        return ruler_mean(scores)
    if suite == "lveval":
        return lveval_mean(scores)
    return 100 * sum(scores) / len(scores)
