"""The shared real corpus read from an S3 server, packed at 128K and 1M tokens per sequence, and written back to it.

Runs with ULTRALONG_SLOW_TESTS=1, for it takes over a minute on two cores. The server is Ceph's RADOS Gateway where the
shared script and the Debian packages are there, moto otherwise.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from tests.conftest import S3_KEYS
from tests.data.conftest import SHARED
from tests.machine import free_ports
from ultralong_ray.config import Recipe
from ultralong_ray.data.pipeline import prepare
from ultralong_ray.packed import PackedReader, read_placements
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import StageDirectory

SERVER = SHARED / "tools" / "s3_server.sh"
BUCKET = "real-corpus"
TOKEN_BUDGET = 16 * 2**20 + 12_345  # not a whole number of sequences
SEPARATOR = "<s>"

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[str]:
    """The endpoint of a RADOS Gateway of one node, with its data in memory."""
    (port,) = free_ports(1)
    try:
        subprocess.run(["bash", str(SERVER), str(folder), str(port)], check=True, timeout=120, capture_output=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        for file in (folder / "run").glob("*.p"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def endpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that speaks S3, with an empty bucket."""
    if not (SHARED / "data" / "corpus").is_dir():
        pytest.skip("the shared sample corpus is not beside this checkout")
    boto3 = pytest.importorskip("boto3", reason="the s3-test extra is not installed")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if SERVER.is_file() and shutil.which("radosgw"):
            address = stack.enter_context(ceph(tmp_path_factory.mktemp("ceph")))
        else:
            address = request.getfixturevalue("s3_server")
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket=BUCKET)
        yield address


@pytest.fixture(scope="module")
def prepared(endpoint: str, local_ray: None) -> dict[int, StageDirectory]:
    """The stage at both lengths; the second finds the tokens of the first."""
    import boto3

    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for file in sorted((SHARED / "data" / "corpus").glob("*.parquet")):
        client.upload_file(str(file), BUCKET, f"corpus/{file.name}")
    return {length: run(recipe(endpoint, length)) for length in (2**17, 2**20)}


def recipe(endpoint: str, length: int) -> Recipe:
    base = str(SHARED / "data" / "tokenizers" / "dolma2-llama3-shaped")
    window = {"original_context_length": 8192, "base_context_length": 131_072, "target_context_length": 2**20}
    value: dict[str, Any] = {
        "name": "real-corpus",
        "workdir": f"s3://{BUCKET}/work",
        "storage": {"endpoint": endpoint, "plain_checksums": True},
        "model": {"base": base, **window},
        "corpus": {"sources": [{"uri": f"s3://{BUCKET}/corpus"}]},
        "prepare": {"sequence_length": length, "token_budget": TOKEN_BUDGET, "keep_tokens": True},
        "pretrain": {"global_batch_sequences": 1, "learning_rate": 1e-5},
    }
    return Recipe.model_validate(value)


def run(settings: Recipe) -> StageDirectory:
    stage = stage_directory(settings, "prepare")
    stage.mark_done(prepare(settings, stage))
    return stage


@pytest.mark.parametrize("length", [2**17, 2**20])
def test_budget_mix_and_long_documents(prepared: dict[int, StageDirectory], length: int) -> None:
    folder = prepared[length].location
    assert folder.uri.startswith("s3://")
    report = (folder / "report.json").read_json()
    assert (report["sequence_length"], report["num_sequences"]) == (length, TOKEN_BUDGET // length)
    domains = report["domains"]
    assert len(domains) == 7
    assert sum(d["documents_before"] for d in domains.values()) == 2551
    placed = {name: 0 for name in domains}
    for p in read_placements(folder):
        placed[p.domain] += p.end - p.start
    for name, d in domains.items():
        share = placed[name] / sum(placed.values())
        assert share == pytest.approx(d["share_before"], abs=0.01), name
        print(f"{length} {name}: {d['share_before']:.2%} -> {share:.2%}, in long documents", end=" ")
        print(f"{d['long_share_before']:.1%} -> {d['long_share_after']:.1%}")
        assert d["long_share_after"] > d["long_share_before"], name


@pytest.mark.parametrize("length", [2**17, 2**20])
def test_sequences_read_back_hold_the_texts(prepared: dict[int, StageDirectory], length: int) -> None:
    """Two sequences over S3 against the bare tokenizer on the local texts."""
    folder = prepared[length].location
    tokenizer = Tokenizer.from_file(str(SHARED / "data" / "tokenizers" / "dolma2-llama3-shaped" / "tokenizer.json"))
    separator = tokenizer.encode(SEPARATOR, add_special_tokens=False).ids
    columns = [pq.read_table(f, columns=["id", "text"]) for f in sorted((SHARED / "data/corpus").glob("*.parquet"))]
    texts = {i: t for c in columns for i, t in zip(c["id"].to_pylist(), c["text"].to_pylist(), strict=True)}
    reader = PackedReader(folder)
    placements = list(read_placements(folder))
    for sequence in (0, TOKEN_BUDGET // length - 1):
        ids, _ = reader.read(sequence, 0, length)
        covered = np.zeros(length, bool)
        for p in (p for p in placements if p.sequence == sequence):
            whole = tokenizer.encode(texts[p.id], add_special_tokens=False).ids
            np.testing.assert_array_equal(ids[p.start : p.end], whole[p.document_start : p.document_end])
            covered[p.start : p.end] = True
        assert set(ids[~covered].tolist()) <= set(separator)
