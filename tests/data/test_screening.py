"""Decontamination and duplicates through both prepare stages on a local Ray."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.data.pipeline import prepare, prepare_sft
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.packed import PackedManifest, PackedReader, read_placements
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import StageDirectory

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "import", "os", "return", "path"]
pytestmark = pytest.mark.usefixtures("local_ray")
RNG = random.Random(0)
QUESTIONS = [" ".join(RNG.choices(WORDS, k=30)) for _ in range(4)]


def made_text(rng: random.Random, num_words: int) -> str:
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(num_words))


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Recipe:
    rng = random.Random(1)
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    documents = [{"id": f"d{i}", "domain": "web", "text": made_text(rng, 400)} for i in range(12)]
    documents[3]["text"] += f"\n{QUESTIONS[0].upper()}\n{made_text(rng, 400)}"  # cut out of it
    documents[7]["text"] = QUESTIONS[1]  # nothing left
    chats = []
    for i in range(30):
        prompt = {4: QUESTIONS[2], 6: made_text(random.Random(8), 20), 9: made_text(random.Random(8), 20).upper()}
        # 11 differs from 2 in one word of 60
        prompt |= {2: made_text(random.Random(9), 60), 11: made_text(random.Random(9), 59) + " fox"}
        messages = [{"role": "user", "content": prompt.get(i, made_text(rng, 20))}]
        messages.append({"role": "assistant", "content": QUESTIONS[3] if i == 20 else made_text(rng, 5)})
        chats.append({"id": f"c{i:02d}", "domain": ("general", "code")[i % 2], "messages": messages})
    for name, rows in (("a", documents[:6]), ("b", documents[6:]), ("chats0", chats[:15]), ("chats1", chats[15:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    train = {"global_batch_sequences": 1, "learning_rate": 1e-4}
    window = {"original_context_length": 512, "base_context_length": 512, "target_context_length": 2048}
    sources = [{"uri": str(tmp_path / f"chats{i}.parquet")} for i in range(2)]
    fields: dict[str, Any] = {
        "name": "test",
        "workdir": str(tmp_path / "work"),
        "model": {"base": str(tokenizer_folder), **window},
        "corpus": {"sources": [{"uri": str(tmp_path / "[ab].parquet")}]},
        "prepare": {"sequence_length": 512, "token_budget": 2048, "short_below_tokens": 0, "num_workers": 2},
        "decontaminate": {"benchmarks": [{"name": "bench", "uri": str(tmp_path / "bench.jsonl")}]},
        "pretrain": train,
        "sft": {
            **train,
            "sources": sources,
            "sequence_length": 2048,
            "max_sample_tokens": 2048,
            "domain_samples": {"general": 10, "code": 12},
            "deduplicate": {},
        },
    }
    return Recipe.model_validate(fields)


def packed_text(stage: StageDirectory, recipe: Recipe) -> str:
    tokenizer, reader = load_tokenizer(recipe.model.base), PackedReader(stage.location)
    manifest = PackedManifest.read(stage.location)
    ids = [reader.read(i, 0, manifest.sequence_length)[0].tolist() for i in range(manifest.num_sequences)]
    return " ".join(tokenizer.decode(sequence) for sequence in ids).lower()


def test_documents_lose_the_benchmark_and_the_report_says_where(recipe: Recipe) -> None:
    # the whole corpus, so that nothing is missing for want of budget
    recipe = recipe.model_copy(update={"prepare": recipe.prepare.model_copy(update={"token_budget": 512 * 29})})
    stage = stage_directory(recipe, "prepare")
    prepare(recipe, stage)
    report = (stage.location / "report.json").read_json()
    expected = {"items": 4, "whole_item": 0, "too_short": 0, "dropped": 1, "cut": 1, "spans": 2}
    assert report["decontamination"] == {
        "file": "contamination.jsonl",
        "dropped": 1,
        "cut": 1,
        "benchmarks": {"bench": expected},
    }
    lines = (stage.location / "contamination.jsonl").read_bytes().decode().splitlines()
    assert [(f["id"], f["action"], f["item"]) for f in map(json.loads, lines)] == [
        ("d3", "cut", "bench.jsonl:0"),
        ("d7", "dropped", "bench.jsonl:1"),
    ]
    assert "d7" not in {p.id for p in read_placements(stage.location)}
    text = packed_text(stage, recipe)
    assert "d3" in {p.id for p in read_placements(stage.location)}
    for question in QUESTIONS:
        assert " ".join(question.split()[:4]) not in text


def test_samples_are_screened_deduplicated_and_mixed(recipe: Recipe) -> None:
    stage = stage_directory(recipe, "prepare_sft")
    prepare_sft(recipe, stage)
    report = (stage.location / "report.json").read_json()
    placed = {p.id for p in read_placements(stage.location)}
    assert len(placed) == 22 and not placed & {"c04", "c20", "c09", "c11"}
    assert report["decontamination"]["dropped"] == 2
    first, second = report["sources"]
    assert {k: first[k] for k in first if k not in ("source", "drawn")} == {
        "read": 15,
        "too_long": 0,
        "contaminated": 1,
        "exact_duplicates": 1,
        "near_duplicates": 1,
    }
    assert (second["read"], second["contaminated"], second["exact_duplicates"]) == (15, 1, 0)
    assert first["drawn"] + second["drawn"] == 22
    assert {d: line["samples"] for d, line in report["domains"].items()} == {"general": 10, "code": 12}


def test_sections_enter_the_fingerprint_of_the_stages_that_read_them(recipe: Recipe) -> None:
    def fingerprint(stage: str, **changes: Any) -> str:
        return stage_directory(recipe.model_copy(update=changes), stage).fingerprint

    assert recipe.decontaminate is not None and recipe.sft is not None
    for stage in ("prepare", "prepare_sft"):
        other = recipe.decontaminate.model_copy(update={"ngram_words": 12})
        assert (
            len({fingerprint(stage), fingerprint(stage, decontaminate=None), fingerprint(stage, decontaminate=other)})
            == 3
        )
    plain = recipe.sft.model_copy(update={"deduplicate": None})
    mixed = recipe.sft.model_copy(update={"domain_samples": {"code": 1}})
    assert len({fingerprint("prepare_sft", sft=sft) for sft in (recipe.sft, plain, mixed)}) == 3
