"""LV-Eval's metrics: F1 behind a gate of keyword recall, plain F1, and ROUGE-L without filler words.

In go an answer, the reference and its keywords; out comes a score from 0 to 1. Follows infinigence/LVEval @ 63e7ae93,
metrics.py and config.py. Its README says that filler words are left out of the F1 as well; its code does not do it.
"""

# ruff: noqa: RUF001  (Chinese punctuation is meant)
from __future__ import annotations

from collections.abc import Sequence

from ultralong_ray.eval.tasks.f1 import chinese_words, f1, normalised, normalised_chinese, overlap
from ultralong_ray.eval.tasks.rouge import rouge_l

ENGLISH_GATE = 0.2  # keyword recall below which an answer scores 0
CHINESE_GATE = 0.4
_ENGLISH = (
    "and to of in her was with for it from is that his he by she they or at because be on are their what "
    "as had were about being this who but have has when which does"
)
_CHINESE = (
    "的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × 根据 小 由 亩 也 要 指 法 "
    "会 元 主要 以及 通过 首先 对 然后 号 以 所 后 丁 包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 "
    "用于 但 使用 让 具有 并 亿元 万元 上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 "
    "带 度"
)
ENGLISH_FILLERS = frozenset(_ENGLISH.split())
CHINESE_FILLERS = frozenset(_CHINESE.split())


def english_f1(prediction: str, reference: str) -> float:
    """Token F1 after SQuAD's normalisation."""
    return f1(normalised(prediction).split(), normalised(reference).split())


def english_gated_f1(prediction: str, reference: str, keywords: str | None) -> float:
    """Token F1, or 0 when too few of the keywords are in the answer. Without keywords: plain F1."""
    if (
        keywords
        and _recall(normalised(prediction).split(), normalised(keywords).split(), ENGLISH_FILLERS) < ENGLISH_GATE
    ):
        return 0.0
    return english_f1(prediction, reference)


def chinese_f1(prediction: str, reference: str) -> float:
    """F1 over jieba's words, normalised; empty ones are left out."""
    return f1(_chinese_tokens(prediction), _chinese_tokens(reference))


def chinese_gated_f1(prediction: str, reference: str, keywords: str | None) -> float:
    """As `english_gated_f1` on jieba's words; without keywords the reference itself stands in."""
    wanted = _chinese_tokens(keywords or reference)
    if _recall(_chinese_tokens(prediction), wanted, CHINESE_FILLERS) < CHINESE_GATE:
        return 0.0
    return chinese_f1(prediction, reference)


def chinese_rouge(prediction: str, reference: str) -> float:
    """ROUGE-L over jieba's words less the filler words. Words are cut twice, as there, the second time with spaces."""
    kept = []
    for text in (prediction, reference):
        twice_cut = chinese_words(" ".join(chinese_words(text)))
        kept.append(" ".join(word for word in map(normalised_chinese, twice_cut) if word not in CHINESE_FILLERS))
    return rouge_l(kept[0], kept[1])


def _chinese_tokens(text: str) -> list[str]:
    return [token for token in map(normalised_chinese, chinese_words(text)) if token]


def _recall(prediction: Sequence[str], keywords: Sequence[str], fillers: frozenset[str]) -> float:
    """Share of the keywords found; fillers count in the denominator only, as there.

    Keywords of punctuation alone, on which the official code divides by zero, let every answer pass.
    """
    if not keywords:
        return 1.0
    common = overlap(prediction, keywords)
    return 1.0 * sum(count for word, count in common.items() if word not in fillers) / len(keywords)
