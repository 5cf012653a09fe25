"""The data room over the S3 protocol through a proxy that fails: nothing lost, nothing doubled, and plain words.

A server that speaks S3 (moto) stands behind a proxy which counts bytes and injects faults; Ray workers read and write
through it with the endpoint of the recipe's [storage].
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import fault_proxy
from tests.data.test_prepare_pipeline import content, recipe, rows, run
from tests.fault_proxy import FaultProxy
from ultralong_ray.config import Recipe, SourceConfig, StorageConfig
from ultralong_ray.data import pipeline
from ultralong_ray.data.corpus import list_parts, list_shards
from ultralong_ray.data.fan_out import TASK_ATTEMPTS
from ultralong_ray.data.rows import DocumentColumns, Quarantine, read_documents
from ultralong_ray.object_store import retried
from ultralong_ray.packed import (
    PackedFile,
    PackedManifest,
    PackedReader,
    chunking,
    file_name,
    write_sequences,
)
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.types import PackedSequence, StorageOptions, UserError

BUCKET = "s3://ultralong-test"


def put_corpus(folder: str) -> None:
    documents = rows()
    for name, part in (("a", documents[:100]), ("b", documents[100:200]), ("c", documents[200:])):
        with Location(f"{BUCKET}/{folder}/{name}.parquet").open_for_write() as sink:
            pq.write_table(pa.Table.from_pylist(part), sink, row_group_size=40)


def through(proxy: FaultProxy, settings: Recipe, workdir: str, corpus: str) -> Recipe:
    """The same recipe, with its corpus and its working directory behind the proxy."""
    value = settings.model_dump()
    value["storage"] = {"endpoint": proxy.endpoint, "path_style": True}
    value["corpus"]["sources"][0]["uri"] = f"{BUCKET}/{corpus}/*.parquet"
    return Recipe.model_validate({**value, "workdir": f"{BUCKET}/{workdir}"})


def data_of(stage: StageDirectory) -> dict[str, bytes]:
    """All files but the last one written, which names the recipe's fingerprint."""
    return {name: value for name, value in content(stage).items() if name != "/_SUCCESS.json"}


def serially(items: Any, work: Callable[[Any], dict[str, Any]], *_: Any) -> list[dict[str, Any]]:
    """What Ray Data does, in this process."""
    return [retried(lambda item=item: work(item), TASK_ATTEMPTS) for item in items]


@pytest.fixture
def undisturbed(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Recipe, dict[str, bytes]]:
    """A recipe over a local corpus, and what it makes of it."""
    monkeypatch.setattr(pipeline, "run_tasks", serially)
    monkeypatch.setattr(pipeline, "TOKENS_PER_FILE", 7 * 512)
    (tmp_path / "corpus").mkdir()
    for name, part in (("a", rows()[:100]), ("b", rows()[100:200]), ("c", rows()[200:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "corpus" / f"{name}.parquet", row_group_size=40)
    settings = recipe(tmp_path, tokenizer_folder, tmp_path / "corpus")
    return settings, data_of(run(settings))


FAULTS: dict[str, Callable[[int, bytes], fault_proxy.Fault]] = {
    "503": lambda number, line: fault_proxy.SLOW_DOWN if number % 19 == 0 else None,
    "reset": lambda number, line: "reset" if number % 17 == 0 else None,
    "cut": lambda number, line: "cut" if number % 7 == 0 and line.startswith(b"GET") else None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_store_that_fails_now_and_then_changes_nothing(
    undisturbed: tuple[Recipe, dict[str, bytes]], proxy: FaultProxy, fault: str
) -> None:
    put_corpus(f"corpus-{fault}")
    settings, expected = undisturbed
    proxy.faults = FAULTS[fault]
    stage = run(through(proxy, settings, f"work-{fault}", f"corpus-{fault}"))
    assert proxy.injected > 10
    proxy.faults = lambda number, line: None
    assert data_of(stage) == expected


def test_a_store_that_is_away_for_a_while_is_waited_for(
    undisturbed: tuple[Recipe, dict[str, bytes]], proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_corpus("corpus-away")
    settings, expected = undisturbed
    work = pipeline.tokenize_part

    def goes_away_once(item: Any) -> dict[str, Any]:
        if not proxy.refused:
            proxy.refusals_left = 2
        return work(item)

    monkeypatch.setattr(pipeline, "tokenize_part", goes_away_once)
    stage = run(through(proxy, settings, "work-away", "corpus-away"))
    assert proxy.refused == 2
    assert data_of(stage) == expected


ANSWERS = {
    "denied": (fault_proxy.DENIED, "access is denied"),
    "expired": (fault_proxy.EXPIRED, "the credentials have expired"),
    "busy": (fault_proxy.SLOW_DOWN, "does not answer"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_the_store_refuses_is_said_plainly(proxy: FaultProxy, kind: str) -> None:
    put_corpus("corpus-refused")
    answer, meaning = ANSWERS[kind]
    storage = StorageConfig(endpoint=proxy.endpoint, max_attempts=2)
    source = SourceConfig(uri=f"{BUCKET}/corpus-refused", storage=storage, on_bad_shard="skip")
    columns = DocumentColumns.of(source)
    (part, *_), _ = list_parts(list_shards(source), columns.names)
    proxy.faults = lambda number, line: answer
    with pytest.raises(UserError, match=meaning):
        list_shards(source)
    proxy.faults = lambda number, line: None
    shards = list_shards(source)
    proxy.faults = lambda number, line: answer if line.startswith(b"GET") else None
    for read in (
        lambda: list_parts(shards, columns.names, skip_bad=True),  # the store's fault is never the shard's
        lambda: list(read_documents(part, columns, Quarantine(part))),
    ):
        with pytest.raises(UserError, match=rf"\.parquet cannot be reached: .*{meaning}"):
            read()


def test_nothing_there(proxy: FaultProxy) -> None:
    storage = StorageConfig(endpoint=proxy.endpoint, max_attempts=2)
    with pytest.raises(UserError, match="nothing is there"):
        list_shards(SourceConfig(uri=f"{BUCKET}/no/such/prefix", storage=storage))
    with pytest.raises(UserError, match="holds no shard"):
        list_shards(SourceConfig(uri=f"{BUCKET}/no/such/*.parquet", storage=storage))
    with pytest.raises(UserError, match=r"no such bucket|nothing is there"):
        list_shards(SourceConfig(uri="s3://no-such-bucket-here/x", storage=storage))


@pytest.mark.parametrize("length", [2**20, 2**18])
def test_a_rank_fetches_its_part_of_a_sequence(proxy: FaultProxy, length: int) -> None:
    """Degree 8: at most 1.3 / 8 of the sequence's bytes, whether a rank's part is one run or two segments."""
    rng = np.random.default_rng(0)
    count = 2**22 // length
    tokens = rng.zipf(1.2, (count, length)).clip(0, 128_000).astype(np.int32)
    folder = Location(f"{BUCKET}/ranks-{length}", StorageOptions(endpoint=proxy.endpoint))
    sequences = [PackedSequence(i, row) for i, row in enumerate(tokens)]
    footer = write_sequences(folder / file_name(0), sequences, length, False)
    size = (folder / file_name(0)).size()
    PackedManifest(length, count, *chunking(length), False, 2**17, (PackedFile(file_name(0), 0, count, footer),)).write(
        folder
    )
    degree, segment = 8, length // 16
    for rank in (0, 3, 7):
        for starts in ((2 * rank, 2 * rank + 1), (rank, 15 - rank)):
            reader = PackedReader(folder)
            before = proxy.bytes_to_client
            for i in starts:
                ids, _ = reader.read(1, i * segment, (i + 1) * segment)
                np.testing.assert_array_equal(ids, tokens[1, i * segment : (i + 1) * segment])
            fetched = proxy.bytes_to_client - before
            # the footer serves all sequences of a file, so this sequence bears its part of it
            own = fetched - footer + footer / count
            assert own <= 1.3 / degree * size / count, (rank, starts, fetched, size / count)
            if length == 2**20:
                assert fetched <= 1.3 / degree * size / count
