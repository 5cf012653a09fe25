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

from tests.data.columns import lengths_of
from ultralong_ray.config import Recipe
from ultralong_ray.data.pipeline import plan_only, prepare, prepare_sft
from ultralong_ray.data.sample import choose_holdout, sample
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.packed import PackedManifest, PackedReader, read_placements
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import UserError

LENGTH = 512
SEQUENCES = 40
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "import", "os", "return", "path"]


@pytest.fixture(scope="module", autouse=True)
def several_packed_files(local_ray: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralong_ray.data.pipeline.TOKENS_PER_FILE", 7 * LENGTH)
        yield


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
    workdir: Path,
    tokenizer_folder: Path,
    uri: Path,
    sft: dict[str, Any] | None = None,
    source: dict[str, Any] | None = None,
    **fields: Any,
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
        "corpus": {"sources": [{"uri": str(uri), **(source or {})}]},
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


def rebuild(folder: Path, texts: dict[str, str], tokenizer_folder: Path) -> Counter[tuple[str, int]]:
    """Assert that every sequence is its documents and separators and nothing else; tokens used per document copy.

    Nothing of the project is used: the two JSON and Parquet files, the source texts, and the tokenizer.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    separator = tokenizer("<s>", add_special_tokens=False)["input_ids"]
    manifest = json.loads((folder / "manifest.json").read_text())
    places = pq.read_table(folder / "documents.parquet").to_pylist()
    stored = []
    for file in manifest["files"]:
        tokens = pq.read_table(folder / file["name"]).column("input_ids").combine_chunks().flatten().to_numpy()
        assert len(tokens) == file["num_sequences"] * manifest["sequence_length"]
        stored.append(tokens)
    found, length = np.concatenate(stored), manifest["sequence_length"]
    assert len(found) == length * manifest["num_sequences"]
    expected, position, meetings = np.full(len(found), -1), 0, 0
    ids: dict[str, list[int]] = {}
    used: Counter[tuple[str, int]] = Counter()
    sequences_of: dict[str, set[tuple[int, int]]] = {}
    for p in places:
        start, end = p["sequence"] * length + p["start"], p["sequence"] * length + p["end"]
        assert p["sequence"] * length <= start < end <= (p["sequence"] + 1) * length
        if p["id"] not in ids:
            ids[p["id"]] = tokenizer(texts[p["id"]], add_special_tokens=False)["input_ids"]
        expected[start:end] = ids[p["id"]][p["document_start"] : p["document_end"]]
        if p["document_start"] == 0 and start > 0:
            assert start - position == len(separator), "documents meet at exactly one separator"
            expected[position:start] = separator
            meetings += 1
        else:
            assert start == position, "a document goes on where it was cut"
        position = end
        used[p["id"], p["copy"]] += end - start
        sequences_of.setdefault(p["id"], set()).add((p["sequence"], p["copy"]))
    expected[position:] = separator[: len(found) - position]
    assert (found == expected).all()
    for pairs in sequences_of.values():
        assert len({sequence for sequence, _ in pairs}) == len(pairs), "no document twice in one sequence"
    assert meetings > 20
    return used


def test_every_sequence_is_rebuilt_from_placements_and_sources(
    prepared: StageDirectory, tokenizer_folder: Path
) -> None:
    used = rebuild(Path(prepared.location.path), {d["id"]: d["text"] for d in rows()}, tokenizer_folder)
    assert PackedManifest.read(prepared.location).num_sequences == SEQUENCES
    # and every copy has exactly the tokens that the sampling gave it
    settings = recipe(Path("/"), tokenizer_folder, Path("/")).prepare
    tokenizer = load_tokenizer(str(tokenizer_folder))
    counted = [(d["id"], d["domain"], len(tokenizer(d["text"])["input_ids"])) for d in rows()]
    lengths = lengths_of(counted)
    separator = len(tokenizer("<s>", add_special_tokens=False)["input_ids"])
    copies = sample(lengths, settings, 0, separator, choose_holdout(lengths, settings))
    columns = zip(copies.row.tolist(), copies.copy.tolist(), copies.num_tokens.tolist(), strict=True)
    assert used == {(counted[row][0], copy): tokens for row, copy, tokens in columns}
    assert max(copy for _, copy in used) >= 1


def test_mix_report_and_holdout(prepared: StageDirectory, tokenizer_folder: Path) -> None:
    report = (prepared.location / "report.json").read_json()
    placed: Counter[str] = Counter()
    for p in read_placements(prepared.location):
        placed[p.domain] += p.end - p.start
    for domain, line in report["domains"].items():
        assert line["tokens_after"] == placed[domain]
        assert placed[domain] / placed.total() == pytest.approx(line["share_before"], abs=0.01)
        assert line["long_share_after"] > line["long_share_before"]
    assert len(report["samples"]) == 3 and all("<s>" in sample["text"] for sample in report["samples"])
    assert report["quarantine"] == {"rows": 300, "bad_rows": 0, "reasons": {}, "skipped_shards": []}
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
    monkeypatch.setattr("ultralong_ray.data.corpus.PART_BYTES", 20_000)
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
    plan_only(settings, stage)
    shards = Location.of(settings.workdir) / "tokens"
    whole = sorted(f.name for f in shards.files() if f.name.endswith(".json"))
    assert len(whole) == 3
    (shards / whole[0]).filesystem.delete_file((shards / whole[0]).path)
    (shards / whole[0].replace(".json", ".ids.1234.tmp")).write_bytes(b"half")
    run(settings)
    assert content(stage) == content(prepared)
    assert shards.files() == []


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


def quarantined(stage: StageDirectory) -> list[tuple[str, int | None, str]]:
    lines = (stage.location / "quarantine.jsonl").read_bytes().splitlines()
    found = [json.loads(line) for line in lines]
    return [(line["shard"].rsplit("/")[-1], line["row"], line["reason"]) for line in found]


def test_bad_rows_are_set_aside_and_named(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ultralong_ray.data.corpus.PART_BYTES", 20_000)  # several parts of either shard
    bad = rows()
    bad[17]["text"], bad[140]["text"], bad[149]["id"] = "", None, None  # type: ignore[typeddict-item]
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(bad[:150]), folder / "a.parquet", row_group_size=40)
    lines = [json.dumps(d) for d in bad[150:]]
    lines[100:100] = ["", "{broken", "[1]"]
    (folder / "b.jsonl").write_text("\n".join(lines))
    settings = recipe(tmp_path, tokenizer_folder, folder, source={"max_bad_rows_share": 0.1})
    stage = run(settings)
    found = quarantined(stage)
    assert found[:3] == [("a.parquet", 17, "text is empty"), ("a.parquet", 140, "text is null"),
                         ("a.parquet", 149, "id is null")]  # fmt: skip
    assert [(shard, row) for shard, row, _ in found[3:]] == [("b.jsonl", 102), ("b.jsonl", 103)]
    report = (stage.location / "report.json").read_json()
    assert report["quarantine"]["bad_rows"] == stage.summary()["bad_rows"] == 5
    assert report["quarantine"]["reasons"]["text is empty"] == 1
    rebuild(Path(stage.location.path), {d["id"]: d["text"] for d in rows()}, tokenizer_folder)


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, tokenizer_folder: Path) -> None:
    bad = rows()
    for i in range(100, 104):
        bad[i]["text"] = ""
    pq.write_table(pa.Table.from_pylist(bad), tmp_path / "bad.parquet")
    settings = recipe(tmp_path, tokenizer_folder, tmp_path / "bad.parquet")
    message = refused(settings)
    assert "4 bad rows of 300 read, max_bad_rows_share 0.01 allows 3" in message
    assert "bad.parquet, row 100: text is empty" in message and "quarantine.jsonl" in message
    assert len(quarantined(stage_directory(settings, "prepare"))) == 4
    settings = recipe(tmp_path, tokenizer_folder, tmp_path / "bad.parquet", source={"max_bad_rows_share": 0.02})
    assert run(settings).summary()["bad_rows"] == 4


def test_bad_shards_stop_the_run_or_are_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows()), folder / "a.parquet")
    (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-9])  # seen before any work
    (folder / "c.jsonl.gz").write_bytes(b"this is no gzip")  # seen by the task that reads it
    assert "b.parquet: cannot be read as parquet" in refused(recipe(tmp_path, tokenizer_folder, folder))
    (folder / "b.parquet").rename(folder / "d.parquet")
    (folder / "d.parquet").unlink()
    assert "c.jsonl.gz: cannot be read as jsonl" in refused(recipe(tmp_path, tokenizer_folder, folder))
    (folder / "b.parquet").write_bytes(b"PAR1")
    stage = run(recipe(tmp_path, tokenizer_folder, folder, source={"on_bad_shard": "skip"}))
    assert [line[:2] for line in quarantined(stage)] == [("b.parquet", None), ("c.jsonl.gz", None)]
    skipped = (stage.location / "report.json").read_json()["quarantine"]["skipped_shards"]
    assert len(skipped) == stage.summary()["skipped_shards"] == 2
    rebuild(Path(stage.location.path), {d["id"]: d["text"] for d in rows()}, tokenizer_folder)


def test_plan_only_packs_nothing_and_is_kept_to(
    prepared: StageDirectory, tmp_path: Path, tokenizer_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(tmp_path, tokenizer_folder, corpus)
    stage = stage_directory(settings, "prepare")
    text = plan_only(settings, stage)
    assert sorted(f.name for f in stage.location.files(recursive=True)) == ["plan.json", "plan.txt"]
    assert "40 sequences of 512 tokens = 20,480 tokens" in text and "300 documents read, 3 held out" in text
    plan = (stage.location / "plan.json").read_json()
    assert not stage.done
    # another budget over the same corpus, and then the stage itself, tokenise nothing again
    shards = Location.of(settings.workdir) / "tokens"
    times = {f.name: f.filesystem.get_file_info(f.path).mtime_ns for f in shards.files()}
    assert times
    other = recipe(tmp_path, tokenizer_folder, corpus, token_budget=LENGTH * 20, keep_tokens=True)
    run(other)
    assert times == {f.name: f.filesystem.get_file_info(f.path).mtime_ns for f in shards.files()}
    run(settings)
    assert content(stage) == content(prepared)
    report = (stage.location / "report.json").read_json()
    assert {key: report[key] for key in plan} == plan
    assert plan_only(settings, stage) == text


def test_documents_already_tokenised_give_the_same_sequences(
    prepared: StageDirectory, tmp_path: Path, tokenizer_folder: Path
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    table = [{**d, "ids": tokenizer(d["text"])["input_ids"]} for d in rows()]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "ids.parquet")
    stage = run(recipe(tmp_path, tokenizer_folder, tmp_path / "ids.parquet", source={"input_ids_column": "ids"}))
    same = [name for name in content(prepared) if name.startswith("/sequences") or name == "/documents.parquet"]
    assert len(same) == 7 and all(content(stage)[name] == content(prepared)[name] for name in same)


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
    assert "1 bad rows of 2 read" in message([CHATS[1], mute])


@pytest.mark.parametrize("name", ["chats.parquet", "chats.jsonl"])
def test_conversations_in_another_column(tmp_path: Path, tokenizer_folder: Path, name: str) -> None:
    """text_column names it. The recipe as the report writes it, with every default, reads the same."""
    chats = [{"id": c["id"], "domain": c["domain"], "conversations": c["messages"]} for c in CHATS]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(chats), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(c) + "\n" for c in chats))
    source = {"uri": str(tmp_path / name)}
    settings = recipe(tmp_path, tokenizer_folder, tmp_path, {"sources": [{**source, "text_column": "conversations"}]})
    written = Recipe.model_validate(settings.model_dump(mode="json"))
    assert prepare_sft(written, stage_directory(written, "prepare_sft"))["documents"] == 39
    by_default = recipe(tmp_path, tokenizer_folder, tmp_path, {"sources": [source]})
    written = Recipe.model_validate(by_default.model_dump(mode="json"))
    with pytest.raises(UserError, match="'messages'; it has id, domain, conversations"):
        prepare_sft(written, stage_directory(written, "prepare_sft"))


def test_conversations_have_no_token_ids(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = {"uri": str(tmp_path), "input_ids_column": "ids"}
    with pytest.raises(ValueError, match=r"sft\.sources[\s\S]*input_ids_column 'ids' is for documents"):
        recipe(tmp_path, tokenizer_folder, tmp_path, {"sources": [source]})
