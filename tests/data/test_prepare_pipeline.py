"""The two prepare stages end to end on a local Ray, checked from their files and the source documents alone."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.config import Recipe
from ultralong_ray.data.pipeline import prepare, prepare_sft
from ultralong_ray.data.sample import choose_holdout, sample
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.packed import PackedManifest, PackedReader, read_placements
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import DocumentLength, UserError

LENGTH = 512
SEQUENCES = 40
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "import", "os", "return", "path"]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralong_ray.data.pipeline.TOKENS_PER_FILE", 7 * LENGTH)  # several packed files
        yield
    ray.shutdown()


def rows(seed: int = 0) -> list[dict[str, str]]:
    """300 documents of 3 domains, 1 to some 2,000 words long."""
    rng = random.Random(seed)
    result = []
    for i in range(300):
        domain = rng.choices(["code", "books", "web"], [5, 2, 3])[0]
        words = rng.choices(WORDS, k=min(2000, int(rng.lognormvariate(4.5, 1.2)) + 1))
        result.append({"id": f"{domain}/{i}", "domain": domain, "text": " ".join(words)})
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    documents = rows()
    pq.write_table(pa.Table.from_pylist(documents[:120]), folder / "a.parquet", row_group_size=40)
    pq.write_table(pa.Table.from_pylist(documents[120:220]), folder / "b.parquet")
    (folder / "c.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents[220:]))
    return folder


def recipe(
    workdir: Path, tokenizer_folder: Path, uri: Path, sft: dict[str, Any] | None = None, **fields: Any
) -> Recipe:
    train = {"global_batch_sequences": 1, "learning_rate": 1e-4}
    window = {"original_context_length": 128, "base_context_length": 128, "target_context_length": 8192}
    defaults = {
        "sequence_length": LENGTH,
        "token_budget": LENGTH * SEQUENCES + 100,
        "short_below_tokens": 64,
        "short_keep": 0.3,
        "long_above_tokens": 256,
        "holdout_sequences": 3,
    }
    value = {
        "name": "test",
        "workdir": str(workdir),
        "model": {"base": str(tokenizer_folder), **window},
        "corpus": {"sources": [{"uri": str(uri)}]},
        "prepare": {**defaults, **fields},
        "pretrain": train,
    }
    if sft is not None:
        value["sft"] = {**train, "sequence_length": 256, "max_sample_tokens": 128, **sft}
    return Recipe.model_validate(value)


def run(settings: Recipe) -> StageDirectory:
    stage = stage_directory(settings, "prepare")
    stage.mark_done(prepare(settings, stage))
    return stage


def content(stage: StageDirectory) -> dict[str, bytes]:
    return {f.uri[len(stage.location.uri) :]: f.read_bytes() for f in stage.location.files(recursive=True)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, corpus: Path) -> StageDirectory:
    return run(recipe(tmp_path_factory.mktemp("one"), tokenizer_folder, corpus, num_workers=1))


def rebuild(location: Location, texts: dict[str, str], tokenizer_folder: Path) -> Counter[tuple[str, int]]:
    """Assert that every sequence is its documents and separators and nothing else; tokens used per document copy."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    separator = tokenizer("<s>", add_special_tokens=False)["input_ids"]
    ids = {i: tokenizer(text, add_special_tokens=False)["input_ids"] for i, text in texts.items()}
    manifest, reader = PackedManifest.read(location), PackedReader(location)
    stream = [reader.read(i, 0, LENGTH)[0] for i in range(manifest.num_sequences)]
    assert {len(s) for s in stream} == {LENGTH}
    found = np.concatenate(stream)
    expected = np.full(len(found), -1)
    meetings = 0
    for p in read_placements(location):
        start, end = p.sequence * LENGTH + p.start, p.sequence * LENGTH + p.end
        expected[start:end] = ids[p.id][p.document_start : p.document_end]
    used: Counter[tuple[str, int]] = Counter()
    position = 0
    for p in read_placements(location):
        start = p.sequence * LENGTH + p.start
        if p.document_start == 0 and start > 0:
            assert start - position == len(separator), "documents meet at exactly one separator"
            expected[position:start] = separator
            meetings += 1
        else:
            assert start == position, "a document goes on where it was cut"
        position = p.sequence * LENGTH + p.end
        used[p.id, p.copy] += p.end - p.start
    expected[position:] = separator[: len(found) - position]
    assert meetings > 20
    assert (found == expected).all()
    return used


def test_every_sequence_is_rebuilt_from_placements_and_sources(
    prepared: StageDirectory, tokenizer_folder: Path
) -> None:
    texts = {d["id"]: d["text"] for d in rows()}
    used = rebuild(prepared.location, texts, tokenizer_folder)
    assert PackedManifest.read(prepared.location).num_sequences == SEQUENCES
    # and every copy has exactly the tokens that the sampling gave it
    settings = recipe(Path("/"), tokenizer_folder, Path("/")).prepare
    tokenizer = load_tokenizer(str(tokenizer_folder))
    lengths = [DocumentLength(d["id"], d["domain"], len(tokenizer(d["text"])["input_ids"])) for d in rows()]
    held = {d.id for d in choose_holdout(lengths, settings)}
    separator = len(tokenizer("<s>", add_special_tokens=False)["input_ids"])
    assert used == {(c.id, c.copy): c.num_tokens for c in sample(lengths, settings, 0, separator, held)}


def test_mix_report_and_holdout(prepared: StageDirectory, tokenizer_folder: Path) -> None:
    report = (prepared.location / "report.json").read_json()
    placed: Counter[str] = Counter()
    for p in read_placements(prepared.location):
        placed[p.domain] += p.end - p.start
    for domain, line in report["domains"].items():
        assert line["tokens_after"] == placed[domain]
        assert placed[domain] / placed.total() == pytest.approx(line["share_before"], abs=0.01)
        assert line["long_share_after"] > line["long_share_before"]
    assert "<s>" in report["sample"]["text"]
    tokenizer = load_tokenizer(str(tokenizer_folder))
    texts = {d["id"]: d["text"] for d in rows()}
    with pa.OSFile(f"{prepared.location}/holdout.parquet") as file:
        holdout = pq.read_table(file).to_pylist()
    assert len(holdout) == report["holdout_documents"] == 3
    for row in holdout:
        assert row["input_ids"] == tokenizer(texts[row["id"]])["input_ids"][:LENGTH]
    assert {row["id"] for row in holdout}.isdisjoint(p.id for p in read_placements(prepared.location))


@pytest.mark.parametrize("workers", [2, 4])
def test_output_is_byte_identical_for_any_number_of_workers(
    prepared: StageDirectory,
    tmp_path: Path,
    tokenizer_folder: Path,
    corpus: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # more parts than workers, so that their order of completion varies
    monkeypatch.setattr("ultralong_ray.data.corpus.PART_BYTES", 1)
    again = run(recipe(tmp_path, tokenizer_folder, corpus, num_workers=workers))
    assert sum(name.startswith("/sequences/") for name in content(prepared)) == 6
    assert content(again) == content(prepared)


def test_half_written_stage_is_completed_to_the_same_bytes(
    prepared: StageDirectory, tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    settings = recipe(tmp_path, tokenizer_folder, corpus)
    stage = stage_directory(settings, "prepare")
    (stage.location / "sequences" / "part-00007.parquet").write_bytes(b"from another life")
    (stage.location / "manifest.json.1234.tmp").write_bytes(b"{")
    (stage.location / "tokens" / "source00-x.ids.1234.tmp").write_bytes(b"half")
    run(settings)
    assert content(stage) == content(prepared)


def test_another_seed_gives_other_data(
    prepared: StageDirectory, tmp_path: Path, tokenizer_folder: Path, corpus: Path
) -> None:
    other = run(recipe(tmp_path, tokenizer_folder, corpus, seed=7))
    names = [n for n in content(prepared) if n.startswith("/sequences")]
    assert names and all(content(other)[n] != content(prepared)[n] for n in names)


def test_whole_packing_pads_with_weight_zero(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    fields = {"packing": "whole", "separator": "bos_eos", "token_budget": LENGTH * 20, "holdout_sequences": 0}
    location = run(recipe(tmp_path, tokenizer_folder, corpus, **fields)).location
    reader, tokenizer = PackedReader(location), load_tokenizer(str(tokenizer_folder))
    assert reader.manifest.has_loss_weight
    assert 19 <= reader.manifest.num_sequences <= 20  # 95 % of the budget is enough where nothing is cut
    padding = 0
    for i in range(reader.manifest.num_sequences):
        ids, weight = reader.read(i, 0, LENGTH)
        assert weight is not None
        assert (ids[weight == 0] == tokenizer.pad_token_id).all() and tokenizer.pad_token_id not in ids[weight == 1]
        padding += int((weight == 0).sum())
    assert 0 < padding < 0.25 * LENGTH * 20


def refused(settings: Recipe) -> str:
    with pytest.raises(UserError) as error:
        run(settings)
    assert not stage_directory(settings, "prepare").done
    return str(error.value)


def test_a_bad_row_found_by_a_task_is_told_on_the_driver(tmp_path: Path, tokenizer_folder: Path) -> None:
    bad = rows()
    bad[17]["text"] = ""
    pq.write_table(pa.Table.from_pylist(bad), tmp_path / "bad.parquet")
    settings = recipe(tmp_path, tokenizer_folder, tmp_path / "bad.parquet")
    message = refused(settings)
    assert "bad.parquet: 1 bad row of 300" in message and "row 17: text is empty" in message
    pq.write_table(pa.Table.from_pylist(rows()), tmp_path / "bad.parquet")
    run(settings)  # mended and submitted again


def test_ids_must_be_unique_over_the_corpus(tmp_path: Path, tokenizer_folder: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in rows()[:50]))
    message = refused(recipe(tmp_path, tokenizer_folder, tmp_path / "*.jsonl"))
    assert "50 documents have an id that another one has" in message and "b.jsonl" in message


def test_a_corpus_too_small(tmp_path: Path, tokenizer_folder: Path, corpus: Path) -> None:
    for packing in ("concatenate", "whole"):
        message = refused(recipe(tmp_path, tokenizer_folder, corpus, token_budget=10**8, packing=packing))
        assert "too small for prepare.token_budget 100,000,000" in message


CHATS = [
    {
        "id": f"chat/{i}",
        "domain": ("general", "math")[i % 2],
        "messages": [
            {"role": "user", "content": " ".join(WORDS[: i % 7 + 1])},
            {"role": "assistant", "content": " ".join(WORDS[i % 5 :] * (30 if i == 9 else 1))},
        ],
    }
    for i in range(40)
]


def test_sft_packs_whole_samples_with_targets_on_the_assistant(tmp_path: Path, tokenizer_folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(CHATS[:20]), tmp_path / "a.parquet")
    lines = [{**c, "messages": json.dumps(c["messages"])} for c in CHATS[20:]]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(c) + "\n" for c in lines))
    sources = [{"uri": str(tmp_path / "a.parquet")}, {"uri": str(tmp_path / "b.jsonl")}]
    settings = recipe(tmp_path, tokenizer_folder, tmp_path, {"sources": sources, "num_samples": 30})
    stage = stage_directory(settings, "prepare_sft")
    summary = prepare_sft(settings, stage)
    tokenizer, reader = load_tokenizer(str(tokenizer_folder)), PackedReader(stage.location)
    chats = {c["id"]: c for c in CHATS}
    placements = read_placements(stage.location)
    assert len({p.id for p in placements}) == len(placements) == summary["documents"] == 30
    assert "chat/9" not in {p.id for p in placements}  # longer than max_sample_tokens
    covered = np.zeros((summary["num_sequences"], 256), bool)
    for p in placements:
        ids, weight = reader.read(p.sequence, p.start, p.end)
        messages = chats[p.id]["messages"]
        assert weight is not None and weight[0] == 0
        assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
        assert tokenizer.decode(ids[weight == 1]) == messages[1]["content"] + "<|end|>"
        covered[p.sequence, p.start : p.end] = True
    for i in range(summary["num_sequences"]):
        ids, weight = reader.read(i, 0, 256)
        assert weight is not None
        assert (ids[~covered[i]] == tokenizer.pad_token_id).all() and not weight[~covered[i]].any()
    report = (stage.location / "report.json").read_json()
    assert report["dropped_too_long"] == 1
    assert report["sample"]["targets"].endswith("<|end|>")


def test_sft_refusals(tmp_path: Path, tokenizer_folder: Path) -> None:
    def message(chats: list[Any], **sft: Any) -> str:
        (tmp_path / "c.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
        settings = recipe(
            tmp_path, tokenizer_folder, tmp_path, {"sources": [{"uri": str(tmp_path / "c.jsonl")}], **sft}
        )
        with pytest.raises(UserError) as error:
            prepare_sft(settings, stage_directory(settings, "prepare_sft"))
        return str(error.value)

    assert "hold 39 samples of at most sft.max_sample_tokens 128" in message(CHATS, num_samples=40)
    mute = {**CHATS[0], "messages": [{"role": "user", "content": "hello"}]}
    assert "line 2: messages has no turn of role assistant" in message([CHATS[1], mute])
