"""Token F1 and the text normalisation of SQuAD, as LV-Eval and InfiniteBench use them, for English and Chinese.

Sources: SQuAD's evaluate-v1.1.py; infinigence/LVEval @ 63e7ae93, metrics.py; OpenBMB/InfiniteBench @ 88b3daa6,
src/compute_scores.py. Chinese words come from jieba 0.42.1, an optional package.
"""

# ruff: noqa: RUF001  (Chinese punctuation is meant)
from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Sequence

from ultralong_ray.types import UserError

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】"
    "〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def normalised(text: str) -> str:
    """Lower case; without ASCII punctuation, then without a / an / the; single spaces."""
    without = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


def normalised_chinese(text: str) -> str:
    """Lower case; without ASCII and Chinese punctuation, and without any white space."""
    return "".join(text.lower().translate(_NO_CHINESE_PUNCTUATION).split())


def chinese_words(text: str) -> list[str]:
    """Words by jieba's default mode. Raises: UserError when jieba is not installed."""
    try:
        jieba = importlib.import_module("jieba")
    except ModuleNotFoundError as error:
        raise UserError("Chinese LV-Eval sets are scored on jieba's words; run `pip install jieba==0.42.1`") from error
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text, cut_all=False))


def overlap(first: Sequence[str], second: Sequence[str]) -> Counter[str]:
    """Tokens in common, each as often as in the side that has fewer."""
    return Counter(first) & Counter(second)


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall; 0 when nothing is in common."""
    same = sum(overlap(prediction, reference).values())
    if same == 0:
        return 0.0
    precision, recall = 1.0 * same / len(prediction), 1.0 * same / len(reference)
    return (2 * precision * recall) / (precision + recall)
