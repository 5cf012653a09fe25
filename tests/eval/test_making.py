"""Sections become samples: made texts are the same everywhere, files are read in slices, every kind answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ultralong_ray.config import EvaluateConfig
from ultralong_ray.config.task_section import Work
from ultralong_ray.config.tasks import Task
from ultralong_ray.eval.making import Maker, check_sections
from ultralong_ray.eval.tasks.made_texts import made_haystack, made_questions, made_two_hop_questions
from ultralong_ray.eval.tasks.prompt import Prompts
from ultralong_ray.eval.tasks.score import score
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

LENGTH = 1536


@pytest.fixture(scope="module")
def prompts(tiny_llama: Path) -> Prompts:
    from transformers import AutoTokenizer

    return Prompts(AutoTokenizer.from_pretrained(tiny_llama), chat_template=True)


def section_of(**fields: Any) -> Any:
    return TypeAdapter(Task).validate_python({"context_lengths": [LENGTH], **fields})


MADE = [
    {"kind": "ruler"},
    {"kind": "needle", "names": ["sentence", "number"], "depths_percent": [50.0], "num_distractors": 2},
    {"kind": "multiround", "num_needles": [2]},
    {"kind": "manyshot", "num_labels": 4},
    {"kind": "retrieved", "depths_percent": [0.0, 100.0]},
    {"kind": "infinitebench", "names": ["passkey", "kv_retrieval", "math_find", "code_run"]},
]


@pytest.mark.parametrize("fields", MADE, ids=lambda fields: fields["kind"])
def test_every_kind_makes_samples_that_fit_without_files(prompts: Prompts, fields: dict[str, Any]) -> None:
    section = section_of(samples_per_cell=2, **fields)
    for work in section.works():
        first, second = Maker({}).samples(section, work, prompts, 0, 2)
        (again,) = Maker({}).samples(section, work, prompts, 1, 1)
        assert second == again and first != second, "a sample is a function of its section and number"
        assert second.task == work.task and second.index == 1
        assert len(prompts.ids(prompts.text(second))) + second.max_new_tokens <= LENGTH
        right = ", ".join(map(str, second.references))
        assert score(second, right) == 1.0 and score(second, "") == 0.0


def test_short_skills_are_short_and_right_answers_count(prompts: Prompts) -> None:
    section = section_of(kind="short_skills", samples_per_cell=3, context_lengths=[0])
    assert [work.task for work in section.works()] == [f"short_skills/{name}" for name in section.names]
    for work in section.works():
        samples = list(Maker({}).samples(section, work, prompts, 0, 3))
        assert len({sample.references for sample in samples}) == 3
        for sample in samples:
            assert sample.references[0] in sample.context or work.task.endswith("arithmetic")
            assert score(sample, f" {sample.references[0]}.") >= 11 / 12 and score(sample, "no idea") == 0.0
    (total,) = Maker({}).samples(section, Work("short_skills/arithmetic", 0, None), prompts, 7, 1)
    assert eval(total.answer_prefix.removesuffix("=")) == int(total.references[0])


def test_too_few_documents_are_refused_before_anything_is_asked(prompts: Prompts, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": "The grass is green. " * size}) for size in (40, 1, 60)))
    maker = Maker({str(file): Location.of(file)})
    fields = {"kind": "perplexity", "name": "grass", "documents": [str(file)], "context_lengths": [32, 64]}
    section = section_of(samples_per_cell=2, **fields)
    found = list(maker.documents(section, 64, prompts.tokenizer, 1, 1))
    whole = prompts.tokenizer("The grass is green. " * 60)["input_ids"]
    assert [ids.tolist() for ids in found] == [whole[:64]]
    check_sections(EvaluateConfig(passkey=False, tasks=(section,)), maker, lambda chat: prompts)
    more = EvaluateConfig(passkey=False, tasks=(section_of(samples_per_cell=3, **fields),))
    with pytest.raises(UserError, match=r"evaluate.tasks.0: perplexity at 64 tokens: .* hold 2 documents"):
        check_sections(more, maker, lambda chat: prompts)


def test_made_questions_have_their_answer_in_the_text_once() -> None:
    pool = made_questions()
    for question in pool.questions[:50]:
        (paragraph,) = (pool.paragraphs[i] for i in question.gold)
        assert question.answers[0] in paragraph
        assert sum(question.answers[0] in text for text in pool.paragraphs) == 1
    two = made_two_hop_questions()
    for question in two.questions[:50]:
        assert len(question.needed) == 2 < len(question.gold) == 10
        assert question.answers[0] not in two.paragraphs[question.needed[0]]
        assert question.answers[0] in two.paragraphs[question.needed[1]]
    assert made_questions() == pool and made_haystack().words[:3] == made_haystack().words[:3]
    assert len(made_haystack().sentence_starts) > 3000


def _rows(folder: Path, count: int) -> Maker:
    rows = [{"input": f"Who is {n}?", "context": "text " * 9, "answers": [f"a{n}"]} for n in range(count)]
    file = folder / "factrecall_en_16k.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return Maker({str(file): Location.of(file)})


def test_files_are_read_in_slices(prompts: Prompts, tmp_path: Path) -> None:
    maker = _rows(tmp_path, 5)
    fields = {"kind": "lveval", "names": ["factrecall_en"], "levels": ["16k"], "data_folder": str(tmp_path)}
    section = section_of(**fields)
    assert maker.num_samples(section, "lveval/factrecall_en_16k") == 5
    assert maker.num_samples(section_of(**fields, samples_per_cell=3), "lveval/factrecall_en_16k") == 3
    found = list(maker.samples(section, Work("lveval/factrecall_en_16k", LENGTH, None), prompts, 3, 2))
    assert [(sample.index, sample.references) for sample in found] == [(3, ("a3",)), (4, ("a4",))]


def test_an_empty_file_is_named(prompts: Prompts, tmp_path: Path) -> None:
    maker = _rows(tmp_path, 0)
    section = section_of(kind="lveval", names=["factrecall_en"], levels=["16k"], data_folder=str(tmp_path))
    with pytest.raises(UserError, match=r"factrecall_en_16k.jsonl: no rows; fetch the file again"):
        maker.num_samples(section, "lveval/factrecall_en_16k")


def test_the_check_names_the_section_and_the_task(prompts: Prompts, tmp_path: Path) -> None:
    broken = tmp_path / "squad.json"
    broken.write_text('{"data": [{}]}')
    good, bad = section_of(kind="ruler", samples_per_cell=1, names=["vt"]), str(broken)
    config = EvaluateConfig(
        passkey=False, tasks=(good, section_of(kind="ruler", samples_per_cell=1, names=["qa_1"], squad=bad))
    )
    with pytest.raises(
        UserError, match=r"evaluate.tasks.1 \(ruler/qa_1 at 1536 tokens\): .*squad.json: not in SQuAD's"
    ):
        check_sections(config, Maker({bad: Location.of(broken)}), lambda chat: prompts)
