"""Scores equal the official ones: on the vectors to the last digit, and on values written out here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ultralong_ray.eval.tasks import lveval_metrics, ruler
from ultralong_ray.eval.tasks.infinitebench_metrics import infinitebench_score
from ultralong_ray.eval.tasks.rouge import rouge_l, rouge_lsum
from ultralong_ray.eval.tasks.ruler import postprocess, ruler_mean, string_match_all, string_match_part
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.score import METRICS, mean_percent, score


def test_ruler_predictions(vectors: Callable[[str], Any]) -> None:
    rows = vectors("ruler/predictions_scored.jsonl")
    assert len(rows) == 293
    for row in rows:
        assert postprocess(row["pred"]) == row["postprocessed"]
        sample = _sample(f"ruler/{row['task']}", row["outputs"], row["metric"])
        assert mean_percent("ruler", [score(sample, row["pred"])]) == row["score"], row
    for row in vectors("ruler/metric_pairs.jsonl"):
        for metric in ("string_match_all", "string_match_part"):
            scores = [
                getattr(ruler, metric)(prediction, references)
                for prediction, references in zip(row["preds"], row["refs"], strict=True)
            ]
            assert ruler_mean(scores) == row[metric], row


def test_infinitebench_predictions(vectors: Callable[[str], Any]) -> None:
    rows = vectors("infinitebench/crafted_scored.jsonl")
    rows += vectors("infinitebench/repo_predictions_sample_scored.jsonl.gz")
    assert len(rows) == 940 and len({row["task"] for row in rows}) == 12
    for row in rows:
        assert infinitebench_score(row["task"], row["prediction"], row["label"], row["model_name"]) == row["score"], row


def test_lveval_english_pairs(vectors: Callable[[str], Any]) -> None:
    rows = [row for row in vectors("lveval/crafted_scored.jsonl") if row["lang"] == "en"]
    assert len(rows) >= 10
    for row in rows:
        answer, reference, keywords, official = row["pred"], row["answer"], row["answer_keywords"], row["scores"]
        assert lveval_metrics.english_f1(answer, reference) == official["qa_f1_score"]
        assert lveval_metrics.english_gated_f1(answer, reference, keywords) == official["qa_f1_score_with_gold_ans"]
        assert rouge_l(answer, reference) == official["rouge_score"]


def test_lveval_chinese_pairs(vectors: Callable[[str], Any]) -> None:
    pytest.importorskip("jieba", reason="the Chinese sets need the package jieba")
    rows = [row for row in vectors("lveval/crafted_scored.jsonl") if row["lang"] == "zh"]
    assert len(rows) >= 5
    for row in rows:
        answer, reference, keywords, official = row["pred"], row["answer"], row["answer_keywords"], row["scores"]
        assert lveval_metrics.chinese_f1(answer, reference) == official["qa_f1_zh_score"]
        assert lveval_metrics.chinese_gated_f1(answer, reference, keywords) == official["qa_f1_zh_score_with_gold_ans"]
        assert lveval_metrics.chinese_rouge(answer, reference) == official["rouge_zh_score_blacklist"]


def test_chinese_without_jieba_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from ultralong_ray.types import UserError

    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match=r"pip install jieba==0\.42\.1"):
        lveval_metrics.chinese_f1("医生", "医生")


def test_ruler_by_hand() -> None:
    assert string_match_all(" It is 12 and\x00AB ", ["12", "ab", "x", "y"]) == 0.5
    assert string_match_part("nothing", ["no", "yes"]) == 1.0  # a substring test, as there
    assert ruler_mean([1.0, 0.0, 1.0]) == 66.67


def test_gate_of_keyword_recall_by_hand() -> None:
    gated = lveval_metrics.english_gated_f1
    assert gated("one b c d", "one b c d", "one two three four five") == 1.0  # recall 0.2 passes
    assert gated("one b c d", "one b c d", "one two three four five six") == 0.0
    assert gated("and of in", "and of in", "and of in") == 0.0  # fillers do not count as found
    assert gated("x", "x", None) == gated("x", "x", "") == 1.0
    assert gated("x", "x", "the ,") == 1.0  # nothing left of the keywords: the official code divides by zero


@pytest.mark.parametrize(
    ("task", "answer", "label", "expected"),
    [
        ("math_find", "3.5", 3, 0.0),  # raises in the official code
        ("math_find", "-7", [7], 1.0),
        ("code_debug", "B.", ["f", "B"], 1.0),
        ("code_debug", "B", ["f", "B"], 0.0),
        ("code_debug", "The answer is: f", ["f", "B"], 1.0),
        ("code_debug", "The answer is:", ["f", "B"], 0.0),
        ("longbook_choice_eng", "Because of C", ["he", "B"], 1.0),
        ("longbook_choice_eng", "the answer is C", ["he", "B"], 0.0),
        ("longdialogue_qa_eng", "It is Tony.", ["TONY"], 1.0),
        ("passkey", "key 00123", "00123", 1.0),
        ("passkey", "key 123", "00123", 0.0),
        ("code_run", "-12.", -12, 1.0),
        ("math_calc", "1, 2, 9", [[1, 2, 3, 4]], 0.5),
        # Python converts no more than 4300 digits: the official code raises
        ("math_calc", "1, 2, 3" + "9" * 5000, [1, 2, 3, 4], 0.5),
        ("math_find", "9" * 5000, 9, 0.0),
        ("longbook_choice_eng", "the answer is .", ["", "D"], 1.0),  # whatever follows begins with an empty option
        ("longbook_qa_eng", "x", [], 0.0),
        ("longbook_qa_chn", "x", [], 0.0),
    ],
)
def test_infinitebench_by_hand(task: str, answer: str, label: Any, expected: float) -> None:
    assert infinitebench_score(task, answer, label, "yarn-mistral") == expected


def test_rouge_by_hand() -> None:
    # reference lines "a b c" and "d e": LCS with "a c x d" are {a, c} and {d}; 3 of 5 and 3 of 4
    assert rouge_lsum("a c\nx d", ["a b c\nd e"]) == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert rouge_lsum("A, c! x-d", ["zzz", "a c x d"]) == 1.0  # the best reference; case and marks aside
    assert rouge_lsum("", ["a"]) == rouge_lsum("!", ["a"]) == 0.0
    # distinct words only: {a, b} of {a, b} and of {a, b, c}
    assert rouge_l("a b a", "a b c") == pytest.approx(0.8)
    assert rouge_l("a a b", "a b a") == pytest.approx(0.5)  # of two equally long subsequences, the one there taken
    assert rouge_l("...", "a") == rouge_l("", "a") == 0.0


def test_a_sample_goes_with_its_metric() -> None:
    sample = _sample("infinitebench/code_debug", ["f", "B"], "infinitebench", template="gpt4")
    assert score(sample, "B: f") == 1.0 and score(sample, "A: g") == 0.0
    assert score(_sample("infinitebench/math_calc", [1, 4], "infinitebench", template="gpt4"), "9, 1, 4") == 1.0
    only_first = _sample("lveval/factrecall_en_16k", ["right", "other"], "lveval_english_f1", keywords=None)
    assert score(only_first, "right") == 1.0 and score(only_first, "other") == 0.0
    assert all(METRICS.values()) and mean_percent("lveval", [0.0, 0.0, 1.0]) == 33.33
    assert mean_percent("infinitebench", [0.0, 0.0, 1.0]) == 100 / 3


def _sample(task: str, references: list[Any], metric: str, **facts: Any) -> Sample:
    return Sample(task, 0, "", "", "", tuple(references), 1, metric, facts=facts)
