"""kill -9 in mid-run: of the driver, of a worker, of the node's processes. The end is the same, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_object_store import serially
from tests.data.test_prepare_pipeline import content, recipe, rows
from tests.machine import PATIENCE_SECONDS, wait_for
from ultralong_ray.config import Recipe
from ultralong_ray.data import pipeline
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location

ROOT = Path(__file__).resolve().parents[2]
PARTS = 10


def start(settings: Recipe, folder: Path, pause_seconds: float) -> subprocess.Popen[bytes]:
    path = folder / "recipe.json"
    path.write_text(settings.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests/data/run_prepare.py"), str(path), str(pause_seconds)]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def shards(settings: Recipe) -> dict[str, int]:
    """Whole token shards and when they were written."""
    files = (Location.of(settings.workdir) / "tokens").files()
    return {f.name: f.info().mtime_ns for f in files if f.name.endswith(".json")}


def tree(process: subprocess.Popen[bytes], *names: str) -> list[psutil.Process]:
    """Processes below a driver whose command holds one of the names."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(name in " ".join(child.cmdline()) for name in names):
                found.append(child)
        except psutil.Error:
            continue
    return found


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The driver and everything that it started."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        try:
            child.kill()
        except psutil.Error:
            continue
    process.wait(30)


@pytest.mark.slow
def test_killed_in_mid_run_and_submitted_again(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(PARTS):
        pq.write_table(pa.Table.from_pylist(rows()[i * 30 : (i + 1) * 30]), corpus / f"{i}.parquet")
    settings = recipe(tmp_path / "a", tokenizer_folder, corpus, num_workers=2)
    (tmp_path / "a").mkdir()

    # the driver alone: the rest of its Ray goes down with it
    process = start(settings, tmp_path, 0.3)
    wait_for(lambda: len(shards(settings)) >= 2, PATIENCE_SECONDS, "two shards", process=process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    psutil.wait_procs(children, timeout=20)
    survived = shards(settings)
    assert 2 <= len(survived) < PARTS

    # the node's processes, driver and all, once the next run has gone further
    process = start(settings, tmp_path, 0.3)
    wait_for(lambda: len(shards(settings)) >= len(survived) + 2, PATIENCE_SECONDS, "two more", process=process)
    kill_all(process)
    further = shards(settings)
    assert survived.items() <= further.items(), "whole shards are not written again"
    assert len(further) < PARTS

    # a worker of the third run, while it works; that run goes on by itself
    process = start(settings, tmp_path, 0.3)
    worker = wait_for(lambda: tree(process, "ray::Map"), PATIENCE_SECONDS, "a worker", process=process)[0]
    worker.kill()
    assert process.wait(PATIENCE_SECONDS) == 0, (tmp_path / "log.txt").read_text()[-3000:]

    monkeypatch.setattr(pipeline, "run_tasks", serially)
    monkeypatch.setattr(pipeline, "TOKENS_PER_FILE", 7 * 512)
    undisturbed = recipe(tmp_path / "b", tokenizer_folder, corpus, num_workers=1)
    stage = stage_directory(undisturbed, "prepare")
    stage.mark_done(pipeline.prepare(undisturbed, stage))
    assert content(stage_directory(settings, "prepare")) == content(stage)
    assert shards(settings) == {}
