"""Planted benchmark items are found and taken out; near misses are left alone."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.config import BenchmarkConfig, DecontaminateConfig
from ultralong_ray.data import ngrams
from ultralong_ray.data.benchmarks import BenchmarkIndex, index_name, read_index, write_index
from ultralong_ray.data.decontaminate import screen_document, screen_sample
from ultralong_ray.data.ngrams import words
from ultralong_ray.storage import Location
from ultralong_ray.types import Document, StorageOptions, UserError

WORDS = [a + b + c for a in "bdfgk" for b in ("a", "e", "ora", "uni") for c in ("l", "n", "rt", "ss", "m")]
Index = Callable[..., tuple[BenchmarkIndex, DecontaminateConfig]]


def sentence(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """`index(questions, **settings)`: an index of one benchmark that holds these questions."""

    def make(questions: Sequence[str], **settings: Any) -> tuple[BenchmarkIndex, DecontaminateConfig]:
        file = tmp_path / f"bench{len(list(tmp_path.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps({"question": q, "answer": "42"}) + "\n" for q in questions))
        config = DecontaminateConfig(benchmarks=(BenchmarkConfig(name="bench", uri=str(file)),), **settings)
        folder = Location.of(f"{file}.index")
        write_index(config, folder)
        return read_index(folder), config

    return make


def disguised(rng: random.Random, text: str) -> str:
    """The same words with other case, punctuation and white space."""
    spelled = []
    for word in text.split():
        word = rng.choice([str.upper, str.title, str.lower, str])(word)
        spelled.append(word + rng.choice(["", "", ",", ".", "!", " -", "\u2026", ";"]))
    gaps = [rng.choice([" ", "  ", "\n", "\t", "\u00a0", " \u201c"]) for _ in spelled]
    return "".join(word + gap for word, gap in zip(spelled, gaps, strict=True))


def near_miss(rng: random.Random, text: str) -> str:
    """The item with one word in every 12 replaced, so that no 13 in a row are the same."""
    spelled = b" ".join(words(text)).decode().split()
    for i in range(rng.randrange(1, 12), len(spelled), 12):
        spelled[i] = "otherword"
    return " ".join(["otherword", *spelled, "otherword"])


def precision_and_recall(questions: Sequence[str], make_index: Index, filler: Callable[[random.Random], str]) -> None:
    """200 planted items and 200 near misses, half of each in documents and half in chat samples."""
    rng = random.Random(7)
    built, config = make_index(questions)
    found = {True: 0, False: 0}
    for i in range(400):
        planted = i % 2 == 0
        question = rng.choice(questions)
        text = disguised(rng, question) if planted else near_miss(rng, question)
        if i % 4 < 2:
            body = f"{filler(rng)}\n{text}\n{filler(rng)}"
            document, findings = screen_document(built, config, Document("d", "web", body))
            assert document is None or not findings or len(document.text) < len(body)
        else:
            findings = screen_sample(built, config, "s", "general", [text, "an answer"])
        found[planted] += bool(findings)
    assert found[True] / 200 >= 0.99, "recall"
    assert found[True] / (found[True] + found[False]) >= 0.99, "precision"


def test_precision_and_recall_on_made_text(index: Index) -> None:
    rng = random.Random(0)
    questions = [sentence(rng, rng.randint(8, 60)) for _ in range(300)]
    precision_and_recall(questions, index, lambda r: sentence(r, 3000))


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl"])
def test_precision_and_recall_on_published_benchmarks(index: Index, shared_data: Path, name: str) -> None:
    content = (shared_data / "benchmarks" / name).read_bytes()
    lines = (gzip.decompress(content) if name.endswith(".gz") else content).decode().splitlines()
    questions = [next(row[c] for c in ("question", "prompt", "text") if c in row) for row in map(json.loads, lines)]
    # Without short items: a near miss of one item may hold all of a shorter one, and is then rightly found.
    precision_and_recall([q for q in questions if len(words(q)) >= 13], index, lambda r: sentence(r, 500))


def test_a_long_document_loses_the_question_and_its_margin_only(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "PIECE_CHARACTERS", 1000)  # the document is read in many pieces
    rng = random.Random(1)
    question = sentence(rng, 40)
    before, after = sentence(rng, 4000), sentence(rng, 4000)
    built, config = index([question, sentence(rng, 30)])
    document, findings = screen_document(built, config, Document("d", "web", f"{before}. {question.upper()}! {after}"))
    assert document is not None and len(findings) == 1
    first, second = document.text.split("\n\n")
    assert before.startswith(first) and 200 <= len(before) - len(first) < 230
    assert after.endswith(second) and 200 <= len(after) - len(second) < 230
    assert first.split()[-1] in WORDS and second.split()[0] in WORDS  # cut between words
    assert (findings[0].action, findings[0].benchmark) == ("cut", "bench")
    assert findings[0].item.endswith(":0") and findings[0].ngram == " ".join(question.split()[:13])
    again, nothing = screen_document(built, config, document)
    assert again is document and nothing == []


def test_what_would_lose_too_much_is_dropped(index: Index) -> None:
    rng = random.Random(2)
    questions = [sentence(rng, 40) for _ in range(40)]
    built, config = index(questions, cut_margin_characters=0)
    copy = Document("d", "web", "\n".join([sentence(rng, 2000), *questions]))
    document, findings = screen_document(built, config, copy)
    assert document is None and {f.action for f in findings} == {"dropped"}
    assert len(findings) == 1  # the questions stand one after the other
    built, config = index(questions, cut_margin_characters=0, max_cut_share=0.5)
    document, _ = screen_document(built, config, copy)
    assert document is not None and document.text == copy.text.split("\n")[0]
    built, config = index(questions, documents="drop")
    assert screen_document(built, config, Document("d", "web", f"{sentence(rng, 9000)} {questions[3]}"))[0] is None


def test_a_cut_that_brings_a_question_together_is_cut_again(index: Index) -> None:
    rng = random.Random(3)
    inner, outer = sentence(rng, 20), sentence(rng, 20)
    built, config = index([inner, outer], cut_margin_characters=0)
    halves = outer.split()
    text = " ".join([sentence(rng, 500), *halves[:10], inner, *halves[10:], sentence(rng, 500)])
    document, findings = screen_document(built, config, Document("d", "web", text))
    assert document is not None and len(findings) == 2
    assert outer not in " ".join(document.text.split()) and len(words(document.text)) == 1000


def test_mathematics_needs_the_rest_of_the_question_too(index: Index) -> None:
    rng = random.Random(4)
    shared, rest = sentence(rng, 13), sentence(rng, 27)
    question = f"{shared} {rest}"
    built, config = index([sentence(rng, 20), question])
    template = f"{shared} {sentence(random.Random(5), 27)}"
    reworded = " ".join(w if i % 3 else "otherword" for i, w in enumerate(rest.split()))

    def findings(domain: str, prompt: str) -> list[Any]:
        return screen_sample(built, config, "s", domain, [prompt])

    assert findings("general", template) and findings("math", question) and findings("math", f"{shared} {reworded}")
    assert findings("math", template) == []  # 13 words in common and little else
    assert findings("general", template)[0].lcs_share is None
    assert 0.6 < findings("math", f"{shared} {reworded}")[0].lcs_share < 1.0
    # A long text has a long subsequence with anything, so only the question's surroundings count.
    assert findings("math", f"{sentence(rng, 3000)} {template} {sentence(rng, 3000)}") == []


def test_an_item_that_shares_its_opening_with_another_is_judged_by_its_own_rest(index: Index) -> None:
    rng = random.Random(6)
    opening = sentence(rng, 15)
    questions = [f"{opening} {sentence(rng, 25)}" for _ in range(5)]
    built, config = index(questions)
    assert [f.item[-2:] for f in screen_sample(built, config, "s", "math", [questions[3]])] == [":3"]


def test_short_items_must_be_there_as_a_whole(index: Index) -> None:
    rng = random.Random(8)
    ten, seven = sentence(rng, 10), sentence(rng, 7)
    other = " ".join([*ten.split()[:8], "otherword"])
    built, config = index([other, ten, seven])
    assert built.counts["bench"] == {"items": 3, "whole_item": 2, "too_short": 1}
    filler = sentence(rng, 50)
    findings = screen_sample(built, config, "s", "web", [f"{filler} {ten} {filler}"])
    assert [(f.item[-2:], f.ngram) for f in findings] == [(":1", ten)]
    assert screen_sample(built, config, "s", "web", [" ".join([filler, *ten.split()[:9], filler])]) == []
    assert screen_sample(built, config, "s", "web", [f"{filler} {seven} {filler}"]) == []


def test_turns_are_not_joined(index: Index) -> None:
    rng = random.Random(9)
    question = sentence(rng, 16)
    built, config = index([question])
    halves = [" ".join(question.split()[:8]), " ".join(question.split()[8:])]
    assert screen_sample(built, config, "s", "web", halves) == []
    assert screen_sample(built, config, "s", "web", ["hello", f"Question: {question}?"])  # said by the assistant


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    rows = [{"prompt": "one two three four five six seven eight nine", "tests": ["a b c", "d e f g h i j k"], "n": 7}]
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "b.parquet")
    (folder / "c.txt").write_text("aa bb cc dd ee ff gg hh ii jj\n\nkk ll mm nn oo pp qq rr ss tt\n")
    (folder / "README.md").write_text("not an item")
    yield folder


def counts(tmp_path: Path, **benchmark: Any) -> dict[str, int]:
    config = DecontaminateConfig(benchmarks=(BenchmarkConfig(name="b", **benchmark),))
    return write_index(config, Location.of(tmp_path / "index"))["b"]


def test_benchmark_files(tmp_path: Path, files: Path) -> None:
    assert counts(tmp_path, uri=str(files)) == {"items": 4, "whole_item": 4, "too_short": 0}
    settings = {"uri": str(files / "b.parquet"), "columns": ("prompt", "tests"), "id_column": "n"}
    assert counts(tmp_path, **settings) == {"items": 2, "whole_item": 2, "too_short": 0}
    names = json.loads((tmp_path / "index" / "items.json").read_text())["names"]
    assert names == [["b", "7", "prompt"], ["b", "7", "tests"]]


def test_benchmark_files_that_cannot_be_used(tmp_path: Path, files: Path) -> None:
    def message(**benchmark: Any) -> str:
        with pytest.raises(UserError) as error:
            counts(tmp_path, **benchmark)
        return str(error.value)

    assert "no column text; it has prompt, tests, n" in message(uri=str(files / "b.parquet"), columns=("text",))
    assert "is no file or folder" in message(uri=str(files / "nothing.jsonl"))
    assert "is no file or folder" in message(uri=str(files / "README.md"))
    (files / "a.jsonl.gz").write_bytes(b"no gzip")
    assert "a.jsonl.gz cannot be read" in message(uri=str(files))
    (files / "d.jsonl").write_text("\n")
    assert "holds no item" in message(uri=str(files / "d.jsonl"))


def test_settings_that_contradict_each_other() -> None:
    benchmark = BenchmarkConfig(name="b", uri="x.jsonl")
    with pytest.raises(ValueError, match="given more than once"):
        DecontaminateConfig(benchmarks=(benchmark, benchmark))
    with pytest.raises(ValueError, match=r"min_item_words 20 is above decontaminate\.ngram_words 13"):
        DecontaminateConfig(benchmarks=(benchmark,), min_item_words=20)


def test_the_index_has_another_name_when_rules_or_files_change(tmp_path: Path, files: Path) -> None:
    def name(**settings: Any) -> str:
        config = DecontaminateConfig(benchmarks=(BenchmarkConfig(name="b", uri=str(files)),), **settings)
        return index_name(config, StorageOptions())

    first = name()
    assert first == name() and first != name(min_item_words=9)
    (files / "c.txt").write_text("another text altogether\n")
    assert name() != first


def test_a_benchmark_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "bench.jsonl"
    config = DecontaminateConfig(benchmarks=(BenchmarkConfig(name="bench", uri=str(file)),))
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"question": sentence(random.Random(0), 40)}).encode())
    assert write_index(config, Location.of(tmp_path / "index"))["bench"]["items"] == 1
    file.write_bytes(b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    with pytest.raises(UserError, match=r"bench\.jsonl cannot be read .*recursion"):
        write_index(config, Location.of(tmp_path / "index"))
