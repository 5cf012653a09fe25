"""LV-Eval and InfiniteBench from files: official prompts, the cut of the middle, and what a bad line says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ultralong_ray.eval.tasks.budget import DoesNotFit
from ultralong_ray.eval.tasks.cutting import cut_to_window, middle_cut
from ultralong_ray.eval.tasks.infinitebench import (
    CALCULATOR_TURNS,
    INFINITEBENCH_TASKS,
    TEMPLATES,
    infinitebench_sample,
    infinitebench_samples,
)
from ultralong_ray.eval.tasks.lveval import SETS, lveval_prompt, lveval_samples
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.sample import Sample
from ultralong_ray.eval.tasks.score import METRICS, score
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

OFFICIAL_METRICS = {
    "qa_f1_score": "lveval_english_f1",
    "qa_f1_score_with_gold_ans": "lveval_english_gated_f1",
    "qa_f1_zh_score": "lveval_chinese_f1",
    "qa_f1_zh_score_with_gold_ans": "lveval_chinese_gated_f1",
    "rouge_zh_score_blacklist": "lveval_chinese_rouge",
}
BOOK = " ".join(f"word{number}" for number in range(400))
ROW = {"input": "Who?", "context": BOOK, "answers": ["he", "she"], "answer_keywords": "he", "length": 400}


@pytest.fixture
def tiny(tiny_llama: Path) -> Prompts:
    return Prompts(AutoTokenizer.from_pretrained(tiny_llama), chat_template=True)


def write(folder: Path, name: str, *rows: Any) -> Location:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return Location.of(folder)


def test_lveval_prompts_are_official(vectors: Callable[[str], Any]) -> None:
    official = vectors("lveval/prompts.json")
    assert set(official) == set(SETS)
    for name, form in official.items():
        assert "".join(lveval_prompt(name, "CTX", "Q?")) == form["prompt"]
        assert SETS[name].max_new_tokens == form["max_gen"]
        assert SETS[name].metric == OFFICIAL_METRICS[form["metric"]] and SETS[name].metric in METRICS


def test_infinitebench_prompts_and_labels_are_official(vectors: Callable[[str], Any]) -> None:
    rows = [row for row in vectors("infinitebench/prompts.json") if row["model_template"] in TEMPLATES]
    assert len(rows) == 24
    for row in rows:
        sample = infinitebench_sample(row["task"], 0, row["example"], row["model_template"], "here")
        assert sample.context + sample.question == row["prompt"]
        assert sample.max_new_tokens == row["max_new_tokens"]
        assert list(sample.references) == (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])


def test_middle_cut_is_official(vectors: Callable[[str], Any]) -> None:
    for row in vectors("infinitebench/truncate_middle.json"):
        assert middle_cut(list(range(row["n"])), row["max_length"]) == row["result"]


def test_middle_cut_keeps_both_ends() -> None:
    assert middle_cut([0, 1, 2, 3, 4, 5, 6], 3) == [0, 5, 6]
    assert middle_cut([0, 1, 2], 3) == [0, 1, 2]


def test_lveval_rows_become_samples(tmp_path: Path, tiny: Prompts) -> None:
    folder = write(tmp_path, "factrecall_en_16k.jsonl", ROW, {**ROW, "input": "Where?"}, "")
    samples = lveval_samples("factrecall_en", "16k", folder, tiny, length_tokens=10_000)
    assert [sample.index for sample in samples] == [0, 1] and not samples[0].facts["cut"]
    assert samples[0].context == samples[1].context  # two questions about one text share it
    assert score(samples[0], "he") == 1.0 and score(samples[0], "she") == 0.0
    assert len(lveval_samples("factrecall_en", "16k", folder, tiny, length_tokens=10_000, limit=1)) == 1


@pytest.mark.parametrize("length", [400, 401, 1000])
def test_long_rows_lose_their_middle(tmp_path: Path, tiny: Prompts, length: int) -> None:
    row = {"input": "Who?", "context": BOOK, "answer": ["he"]}
    for sample in (
        lveval_samples(
            "factrecall_en", "16k", write(tmp_path, "factrecall_en_16k.jsonl", ROW), tiny, length_tokens=length
        )[0],
        infinitebench_samples(
            "longbook_qa_eng", write(tmp_path, "longbook_qa_eng.jsonl", row), tiny, length_tokens=length
        )[0],
    ):
        text = tiny.text(sample)
        used = sample.prompt_tokens + sample.max_new_tokens
        assert length - 4 <= used <= length and len(tiny.ids(text)) == sample.prompt_tokens
        assert sample.facts["cut"] and sample.facts["whole_prompt_tokens"] > length
        assert "word1 " in text and "word200" not in text and "word399" in text
        assert sample.question and text.count("Who?") == 1


def test_a_cut_text_that_grows_is_cut_again(mark_tokenizer: Any) -> None:
    """Half a word at the cut can take more tokens than were kept of it."""
    sample = Sample("t", 0, "word " * 500, "", "", (), 10, "string_match_all")
    limits = []

    def cut(tokenizer: Any, ids: list[int], limit: int) -> str:
        limits.append(limit)
        return "x " * (limit + 2)

    fitted = cut_to_window(sample, Prompts(mark_tokenizer, chat_template=False), 200, cut)
    assert len(limits) > 1 and 200 - 10 - 4 <= fitted.prompt_tokens <= 200 - 10


def test_no_room_beside_the_template(tmp_path: Path, tiny: Prompts) -> None:
    folder = write(tmp_path, "factrecall_en_16k.jsonl", ROW)
    with pytest.raises(DoesNotFit, match="lveval/factrecall_en_16k: 20 tokens leave no room"):
        lveval_samples("factrecall_en", "16k", folder, tiny, length_tokens=20)


def test_chat_models_get_the_gpt4_prompts(tmp_path: Path, tiny: Prompts) -> None:
    row = {"input": "x", "context": "1 + 2 - 3", "answer": [3, 0]}
    folder = write(tmp_path, "math_calc.jsonl", row)
    chat = infinitebench_samples("math_calc", folder, tiny, length_tokens=40_000)[0]
    plain = infinitebench_samples(
        "math_calc", folder, Prompts(tiny.tokenizer, chat_template=False), length_tokens=40_000
    )[0]
    assert chat.turns == CALCULATOR_TURNS and tiny.text(chat).count("<|end|>") == 4
    assert plain.turns == () and plain.question == "\nValues:"
    assert score(chat, "7, 3, 0") == 1.0 and score(plain, "7, 3, 0") == 0.0


def test_braces_in_a_text_stay_as_they_are() -> None:
    row = {"input": "Is {A} right?", "context": "{input} {}", "options": ["{B}", "b", "c", "d"], "answer": "{B}"}
    sample = infinitebench_sample("longbook_choice_eng", 0, row, "gpt4", "here")
    assert "{input} {}" in sample.context and "Is {A} right?" in sample.question and "A. {B}\n" in sample.question
    assert sample.references == ("{B}", "A")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"factrecall_en_16k.jsonl:2: not JSON"),
        ("[1]", r"factrecall_en_16k.jsonl:2: a JSON object is needed, not list"),
        ('{"input": "x", "context": "y"}', r"factrecall_en_16k.jsonl:2: no field 'answers'"),
        ('{"input": 3, "context": "y", "answers": ["z"]}', r"row 2: field 'input' must be text, not int"),
        ('{"input": "x", "context": "y", "answers": []}', r"row 2: field 'answers' must be a list of texts"),
        ('{"input": "x", "context": "y", "answers": ["z"], "answer_keywords": 1}', r"row 2: field 'answer_keywords'"),
    ],
)
def test_a_bad_lveval_line_is_named(tmp_path: Path, tiny: Prompts, line: str, message: str) -> None:
    folder = write(tmp_path, "factrecall_en_16k.jsonl", ROW, line)
    with pytest.raises(UserError, match=message):
        lveval_samples("factrecall_en", "16k", folder, tiny, length_tokens=10_000)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("code_debug", {"options": ["a", "b"]}, "'options' must be a list of four texts"),
        ("code_debug", {"options": list("abcd"), "answer": "e"}, "answer 'e' is none of the options"),
        ("code_debug", {"options": list("abcd"), "answer": [7, "A"]}, r"answer \[7, 'A'\] is none of the options"),
        ("code_run", {"input": "call it"}, "names no call"),
        ("math_find", {"input": "find"}, "does not say 'The ... number of'"),
        ("math_find", {"input": "The largest number of", "answer": "9"}, "answer '9' must be float"),
        ("passkey", {"answer": 9}, "answer '9' must be str"),
        ("passkey", {"answer": []}, "'answer' is empty"),
        ("passkey", {"context": None}, "'context' must be text"),
    ],
)
def test_a_bad_infinitebench_row_is_named(task: str, changes: dict[str, Any], message: str) -> None:
    row = {"input": "x", "context": "y", "answer": "z", **changes}
    with pytest.raises(UserError, match=f"file: row 7: .*{message}"):
        infinitebench_sample(task, 6, row, "gpt4", "file: row 7")


def test_absent_and_unknown(tmp_path: Path, tiny: Prompts) -> None:
    folder = Location.of(tmp_path)
    with pytest.raises(UserError, match=r"passkey.jsonl: no such file"):
        infinitebench_samples("passkey", folder, tiny, length_tokens=1000)
    with pytest.raises(UserError, match="InfiniteBench has no task 'x'"):
        infinitebench_samples("x", folder, tiny, length_tokens=1000)
    with pytest.raises(UserError, match="LV-Eval has no 'cmrc_mixup' at '8k'"):
        lveval_samples("cmrc_mixup", "8k", folder, tiny, length_tokens=1000)
    assert len(INFINITEBENCH_TASKS) == 12
