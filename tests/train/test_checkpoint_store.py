"""Checkpoints in an object store that dies: waited for, nothing lost, and no half is taken for a checkpoint.

A server that speaks S3 stands behind a proxy that cuts every connection for a while (30 s with ULTRALONG_SLOW_TESTS=1),
first while a state is uploaded, then while it is loaded.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fault_proxy
from tests.data.test_real_corpus_s3 import SERVER, ceph
from tests.fault_proxy import FaultProxy
from tests.machine import PATIENCE_SECONDS, wait_for
from tests.train.made_engine import about, made_engine, same, save, state_of, step, world_of_one, writer_of
from ultralong_ray import object_store
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import committed, forget_others, load_newest, uncommitted
from ultralong_ray.types import StorageOptions

BUCKET = "s3://ultralong-test"
IDENTITY = {"seed": 1}


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    with world_of_one(tmp_path):
        yield


def root_behind(proxy: FaultProxy, max_attempts: int = 12) -> Location:
    options = StorageOptions(endpoint=proxy.endpoint, path_style=True, max_attempts=max_attempts)
    return Location(f"{BUCKET}/{uuid.uuid4().hex}/checkpoints", options)


def dies_at(proxy: FaultProxy, word: bytes, requests: float = math.inf, seconds: float = 0.0) -> None:
    """The store goes away at the first request for a state with this method: for so many more, and for so long."""

    def fault(number: int, line: bytes) -> fault_proxy.Fault:
        if not (line.startswith(word) and b"state-" in line):
            return None
        proxy.faults = lambda number, line: None
        proxy.refusals_left, proxy.down_until = requests, time.monotonic() + seconds
        return "reset"

    proxy.refused, proxy.faults = 0, fault


@pytest.mark.parametrize("seconds", [0.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_store_that_dies_during_upload_and_load_costs_time_alone(proxy: FaultProxy, seconds: float) -> None:
    root, engine = root_behind(proxy), made_engine(64)
    writer, saved = writer_of(engine, root)
    save(writer, 1)
    step(engine)
    taken = state_of(engine)
    dies_at(proxy, b"P")  # PUT and POST
    began = time.monotonic()
    writer.take(about(2))
    writer.start()

    def step_while_away() -> bool:
        step(engine)
        return proxy.refused > 0 and time.monotonic() > began + seconds

    wait_for(step_while_away, PATIENCE_SECONDS, "a request to the store that is away")
    assert writer.committed_step() == 1, "the loop goes on while the store is away"
    proxy.refusals_left = 0
    writer.wait()
    assert [found.step for found in saved] == [1, 2] and uncommitted(root) == []
    other = made_engine(64)
    dies_at(proxy, b"GET", 1, seconds)
    restored = load_newest(other, root, IDENTITY)
    assert proxy.refused
    assert restored is not None and (restored.step, restored.passed_over) == (2, ())
    assert same(taken, state_of(other))


def test_a_store_that_stays_away_stops_the_run_and_leaves_no_checkpoint(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "LONGEST_WAIT_SECONDS", 0.05)
    root, engine = root_behind(proxy, max_attempts=2), made_engine()
    writer, _ = writer_of(engine, root)
    save(writer, 1)
    good = state_of(engine)
    step(engine)
    (root / f"step-00000002-{writer.attempt}" / "part-00000.json").write_bytes(b"{}")  # it got so far
    dies_at(proxy, b"P")
    writer.take(about(2))
    writer.start()
    with pytest.raises(RuntimeError, match="checkpoint of step 2 could not be written by rank 0"):
        writer.wait()
    proxy.refusals_left = 0
    assert [name[:13] for name in committed(root)] == ["step-00000001"]
    assert [name[:13] for name in uncommitted(root)] == ["step-00000002"]
    again = made_engine()
    restored = load_newest(again, root, IDENTITY)
    assert restored is not None and restored.step == 1 and same(good, state_of(again))
    writer, saved = writer_of(again, root)
    save(writer, 2)
    forget_others(root, saved[0].name, 2, None)
    assert uncommitted(root) == [] and [name[:13] for name in committed(root)] == ["step-00000002", "step-00000001"]


def test_a_reader_that_meets_a_cut_answer_reads_again(proxy: FaultProxy) -> None:
    root, engine = root_behind(proxy), made_engine(64)
    writer, _ = writer_of(engine, root)
    save(writer, 1)
    cuts = threading.Semaphore(3)
    proxy.faults = lambda number, line: "cut" if b"GET" in line and cuts.acquire(blocking=False) else None
    restored = load_newest(engine, root, IDENTITY)
    assert proxy.injected and restored is not None and restored.passed_over == ()


class Gateway:
    """Ceph's RADOS Gateway, killed and started again; what it stores stays with the other daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pid_file = folder, folder / "run" / "rgw.p"

    def dies_for(self, seconds: float, after_seconds: float) -> None:
        def die() -> None:
            os.kill(int(self.pid_file.read_text()), signal.SIGKILL)
            time.sleep(seconds)
            command = ["radosgw", "-c", str(self.folder / "ceph.conf"), "-n", "client.admin", "-f"]
            log = (self.folder / "log" / "rgw.out").open("ab")
            self.pid_file.write_text(str(subprocess.Popen(command, stdout=log, stderr=log).pid))

        threading.Timer(after_seconds, die).start()


@pytest.mark.slow
@pytest.mark.skipif(not (SERVER.is_file() and shutil.which("radosgw")), reason="no Ceph here")
def test_a_real_server_killed_for_30_seconds_during_upload_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in (("ACCESS_KEY_ID", "ak"), ("SECRET_ACCESS_KEY", "sk"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with ceph(tmp_path / "ceph") as endpoint:
        gateway = Gateway(tmp_path / "ceph")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="checkpoints")
        root = Location("s3://checkpoints/run/checkpoints", StorageOptions(endpoint=endpoint, plain_checksums=True))
        engine = made_engine(2000)  # 96 MB of state
        writer, saved = writer_of(engine, root)
        save(writer, 1)
        step(engine)
        taken = state_of(engine)
        gateway.dies_for(30.0, after_seconds=min(0.3, saved[0].written_seconds / 3))
        began = time.monotonic()
        writer.take(about(2))
        writer.start()
        while time.monotonic() < began + 20:
            step(engine)
            assert writer.committed_step() == 1
        writer.wait()
        assert time.monotonic() - began > 30 and [found.step for found in saved] == [1, 2]
        assert uncommitted(root) == []
        gateway.dies_for(30.0, after_seconds=0.05)
        began, other = time.monotonic(), made_engine(2000)
        restored = load_newest(other, root, IDENTITY)
        assert time.monotonic() - began > 25
        assert restored is not None and (restored.step, restored.passed_over) == (2, ())
        assert same(taken, state_of(other))
