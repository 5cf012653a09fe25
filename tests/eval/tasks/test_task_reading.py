"""Texts, words and questions from files of every form; damage is named with its place."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.eval.tasks.haystack import ends_sentence, load_haystack
from ultralong_ray.eval.tasks.reading import read_rows, read_texts
from ultralong_ray.eval.tasks.ruler_questions import load_hotpotqa, load_squad
from ultralong_ray.eval.tasks.words import load_words
from ultralong_ray.storage import Location
from ultralong_ray.types import UserError


def put(folder: Path, name: str, content: Any) -> Location:
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    (folder / name).write_bytes(data)
    return Location.of(folder / name)


def test_texts_of_every_form(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", None, "b"], "id": [1, 2, 3]}), tmp_path / "t.parquet")
    assert read_texts(Location.of(tmp_path / "t.parquet")) == ["a", "b"]
    assert read_texts(put(tmp_path, "t.json", {"text": "é"})) == ["é"]
    assert read_texts(put(tmp_path, "t.jsonl.gz", gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))) == ["a", "b"]
    assert read_texts(put(tmp_path, "t.md", "# a\nb")) == ["# a\nb"]
    assert read_rows(put(tmp_path, "s.jsonl", '{"text": "a\u2028b"}\n'), ["text"]) == [{"text": "a\u2028b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "{", r"t.json:1: not JSON"),
        ("t.json", {"x": 1}, r't.json: a JSON text must be of the form \{"text"'),
        ("t.jsonl", '{"text": "a"}\n{"tex": "b"}', r"t.jsonl:2: no field 'text' \(fields: tex\)"),
        ("t.txt.gz", b"no gzip", r"t.txt.gz: damaged gzip file"),
        ("t.txt.gz", gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 20, r"t.txt.gz: damaged gzip file \(Error -3"),
        ("t.jsonl", '{"text": "a"}\n{"text": ' + "1" * 5000 + "}", r"t.jsonl:2: JSON that Python does not read"),
        ("t.jsonl", '{"text": ' + "[" * 100_000, r"t.jsonl:1: JSON that Python does not read"),
        ("t.json", '{"text": ' + "1" * 5000 + "}", r"t.json: JSON that Python does not read"),
        ("t.jsonl", r'{"text": "cut \ud83d"}', r"t.jsonl: row 1: field 'text' has half a character, '\\ud83d'"),
        ("t.txt", b"\xff\xfe", r"t.txt:1: not UTF-8 text at byte 0 of the file"),
        ("t.parquet", b"PAR1", r"t.parquet: no Parquet file with a text column"),
        ("t.jsonl", "\n", r"t.jsonl: no rows"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_texts(put(tmp_path, name, content))


def test_haystack_joins_files_and_wants_words(tmp_path: Path) -> None:
    first, second = put(tmp_path, "a.txt", "One.\n\nTwo  three."), put(tmp_path, "b.json", {"text": "Four."})
    haystack = load_haystack([first, second])
    assert haystack.words == ("One.", "Two", "three.", "Four.") and haystack.source == "a.txt, b.json"
    assert haystack.sentence_starts == [0, 1, 3]
    with pytest.raises(UserError, match="no text"):
        load_haystack([put(tmp_path, "c.txt", " \n ")])


@pytest.mark.parametrize(
    ("word", "ends"),
    [("end.", True), ('end."', True), ("why?!", True), ("wait..", False), ("Mr.", False), ("J.", False), ("C.", False)],
)
def test_ends_of_sentences(word: str, ends: bool) -> None:
    assert ends_sentence(word, "Smith") == ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Corn, rye, etc. Smith ate, e.g. oats.", ["Corn, rye, etc.", "Smith ate, e.g.", "oats."]),
        ("The U.S. Army left. Mr. Day of the U.S. He did.", ["The U.S. Army left.", "Mr. Day of the U.S.", "He did."]),
        ("Wait... no. Wait... But why?", ["Wait... no.", "Wait...", "But why?"]),
        ("Plan A. You and J. Smith, in C. But no, p. 7.", ["Plan A.", "You and J. Smith, in C. But no, p. 7."]),
        ("Good.[2] So (it is.)Then he", ["Good.", "[2] So (it is.", ")Then he"]),
        ('Not by U.S.[2] law.)4. So "it is."--Then', ["Not by U.S.[2] law.)4.", 'So "it is."', "--Then"]),
        ('"Is it?" "No." [Yes.] Go.', ['"Is it?"', '"No."', "[Yes.]", "Go."]),
    ],
)
def test_sentences_are_those_of_punkt(tmp_path: Path, text: str, sentences: list[str]) -> None:
    """The expected ones were made with nltk 3.9.1 and its English parameters."""
    haystack = load_haystack([put(tmp_path, "a.txt", text)])
    ends = [*haystack.sentence_starts[1:], len(haystack.words)]
    assert [haystack.text(*span) for span in zip(haystack.sentence_starts, ends, strict=True)] == sentences


def test_words_from_a_file_from_the_package_and_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = {"noun": ["cat"], "adjective": ["red"], "verb": ["go"]}
    words = load_words(put(tmp_path, "w.json", lists), put(tmp_path, "d.txt", "one\ntwo\n"))
    assert words.keys[0] == "red-cat" and words.dictionary == ("one", "two")
    assert load_words(dictionary=put(tmp_path, "d.json", {"0": "one", "1": "two"})).dictionary == ("one", "two")
    with pytest.raises(UserError, match=r'd.json: a JSON dictionary must be of the form {"0": "word"'):
        load_words(dictionary=put(tmp_path, "d.json", ["one"]))
    with pytest.raises(UserError, match="field 'verb' must be a list of words"):
        load_words(put(tmp_path, "w.json", {**lists, "verb": []}))
    with pytest.raises(UserError, match=r"w.json: field 'noun' must be a list of words"):
        load_words(put(tmp_path, "w.json", {**lists, "noun": [1, 2]}))

    def version(name: str) -> str:
        return "3.0.1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"wonderwords 3.0.1 has other words than RULER's; .*wonderwords==2.2.0"):
        load_words()

    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert load_words().source == "built in" and len(load_words().keys) > 20_000
    with pytest.raises(UserError, match=r"words = 'wonderwords': the package is not installed; .*wonderwords==2.2.0"):
        load_words("wonderwords")


def test_words_can_be_named_so_that_every_machine_asks_the_same() -> None:
    pytest.importorskip("wonderwords", reason="the eval extra is not installed")
    assert load_words().source == load_words("wonderwords").source == "wonderwords 2.2.0"
    assert load_words("built in").source == "built in" and len(load_words("built in").nouns) < 200


def test_the_installed_package_has_the_official_words(shared_data: Path) -> None:
    pytest.importorskip("wonderwords", reason="the eval extra is not installed")
    installed, official = load_words(), load_words(Location.of(shared_data / "words/wonderwords_2.2.0.json"))
    assert installed.nouns == official.nouns and installed.verbs == official.verbs
    assert installed.adjectives == official.adjectives


def test_squad_and_hotpotqa_forms(tmp_path: Path) -> None:
    qa = {"question": "q", "answers": [{"text": "a"}, {"text": "b"}]}
    paragraphs = [{"context": "c1", "qas": [qa, {**qa, "is_impossible": True}]}, {"context": "c0", "qas": []}]
    pool = load_squad(put(tmp_path, "s.json", {"data": [{"paragraphs": paragraphs}]}), distractors=["c2"])
    assert pool.paragraphs == ("c0", "c1", "c2") and len(pool.questions) == 1
    assert (pool.questions[0].gold, pool.questions[0].related, pool.questions[0].answers) == ((1,), (0,), ("a", "b"))
    row = {"question": "q", "answer": "a", "context": [["T1", ["x ", "y"]], ["T2", ["z"]], ["T3", ["w"]]]}
    assert load_hotpotqa(put(tmp_path, "h.json", [row])).questions[0].needed == (0, 1)
    named = load_hotpotqa(put(tmp_path, "h.json", [{**row, "supporting_facts": [["T3", 0]]}]))
    assert named.paragraphs == ("T1\nx y", "T2\nz", "T3\nw") and named.questions[0].needed == (2,)


def squad_answers(answers: Any, context: str = "c") -> dict[str, Any]:
    return {"data": [{"paragraphs": [{"context": context, "qas": [{"question": "q", "answers": answers}]}]}]}


def hotpotqa_row(**changes: Any) -> dict[str, Any]:
    return {"question": "q", "answer": "a", "context": [["T", ["s"]]], **changes}


@pytest.mark.parametrize(
    ("load", "value", "message"),
    [
        (load_squad, {"x": 1}, "not in SQuAD's form"),
        (load_squad, {"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}, r"data\[0\].paragraphs\[0\]: a text"),
        (load_squad, {"data": [{"paragraphs": [{"context": "", "qas": [{}]}]}]}, "one of its qas has no `question`"),
        (
            load_squad,
            {"data": [{"paragraphs": [{"context": "", "qas": [{"question": "q", "answers": [{"text": 7}]}]}]}]},
            "one of its answers has no text `text`",
        ),
        (load_squad, {"data": []}, "no answerable question"),
        (load_hotpotqa, {}, "a list of questions is needed"),
        (load_hotpotqa, [{"question": "q"}], "row 0 needs `question`, `answer` and `context`"),
        (load_hotpotqa, [{"question": "q", "answer": 7, "context": []}], "row 0: `question` and `answer` must be text"),
        (load_squad, {"data": [{"paragraphs": [3]}]}, r"data\[0\].paragraphs\[0\]: an object .* not int"),
        (load_squad, {"data": [{"paragraphs": None}]}, r"data\[0\].paragraphs must be a list, not null"),
        (load_squad, squad_answers(None), "`answers` of one of its qas is null and no list"),
        (load_squad, squad_answers({"text": ["x"]}), "`answers` of one of its qas is dict and no list"),
        (load_squad, squad_answers([{"text": " "}]), r"paragraphs\[0\]: one of its answers has .* a blank one"),
        (load_squad, squad_answers([{"text": "x"}], context=" "), "a blank `context` cannot hold answers"),
        (load_hotpotqa, [hotpotqa_row(answer=" ")], "row 0: `question` and `answer` must be text, and not blank"),
        (load_hotpotqa, [hotpotqa_row(context=[])], "row 0: `context` must be a list .* and not empty"),
        (load_hotpotqa, [hotpotqa_row(context=[["T", [1]]])], r"row 0: `context` must be a list of \[title, \[sent"),
        (load_hotpotqa, [hotpotqa_row(context=[["T", "s"]])], r"row 0: `context` must be a list of \[title, \[sent"),
        (load_hotpotqa, [hotpotqa_row(supporting_facts=[3])], "row 0: `supporting_facts` must be a list"),
        (load_hotpotqa, [hotpotqa_row(supporting_facts={"title": ["T"]})], "row 0: `supporting_facts` must be a list"),
        (load_hotpotqa, [{"question": "q", "answer": "a", "context": {"title": ["T"]}}], r"list of \[title, \[sent"),
    ],
)
def test_bad_question_files(tmp_path: Path, load: Any, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(put(tmp_path, "q.json", value))
