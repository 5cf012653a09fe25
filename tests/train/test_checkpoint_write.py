"""Checkpoints beside the steps: what is saved is what was there, at its end or not at all, and errors are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.machine import PATIENCE_SECONDS
from tests.parallel.spawn import run_distributed
from tests.train.made_engine import about, made_engine, same, save, state_of, step, world_of_one, writer_of
from ultralong_ray.config import PretrainConfig
from ultralong_ray.storage import Location
from ultralong_ray.train import checkpoint_write, snapshot
from ultralong_ray.train.checkpoint import committed, forget_others, load_newest, uncommitted
from ultralong_ray.train.snapshot import HostCopy
from ultralong_ray.types import UserError

IDENTITY = {"seed": 1}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    if "two_ranks" in request.node.name:
        yield
        return
    with world_of_one(tmp_path):
        yield


class Gate:
    """Stands before every file that is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: Exception | None = None
        write_file = checkpoint_write.write_file

        def gated(*args: Any) -> Any:
            if threading.current_thread().name == "checkpoint":
                self.reached.set()
                assert self.open.wait(PATIENCE_SECONDS)
                if self.error is not None:
                    raise self.error
            return write_file(*args)

        monkeypatch.setattr(checkpoint_write, "write_file", gated)


@dataclass
class Clock:
    """Stands where the module `time` is; a second takes as long as the test says."""

    now: float

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize("how", ["memory", "disk", "none"])
def test_steps_go_on_while_the_state_of_the_snapshot_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Any
) -> None:
    root, local, engine, gate = Location.of(tmp_path / "root"), tmp_path / "local", made_engine(), Gate(monkeypatch)
    (local / "step-00000001-be0000").mkdir(parents=True)
    writer, saved = writer_of(engine, root, how, local)
    taken = state_of(engine)
    writer.take(about(1))
    writer.start()
    assert gate.reached.wait(PATIENCE_SECONDS)
    step(engine)  # while the thread stands before its first file
    assert not same(taken, state_of(engine)) and committed(root) == [] and writer.committed_step() == 0
    gate.open.set()
    writer.wait()
    assert (writer.known_step, [found.step for found in saved]) == (1, [1])
    files = sorted(file.name for file in (root / saved[0].name).files())
    assert files == ["manifest.json", "random-00000.pt", "state-00000.bin"]
    assert saved[0].num_bytes == sum((root / saved[0].name / name).size() for name in files[1:])
    assert not list(local.iterdir()) or how != "disk"
    other = made_engine()
    restored = load_newest(other, root, IDENTITY)
    assert restored is not None and (restored.step, restored.passed_over) == (1, ())
    assert same(taken, state_of(other))


def test_random_draws_continue_from_the_snapshot(tmp_path: Path) -> None:
    engine = made_engine()
    writer, _ = writer_of(engine, Location.of(tmp_path / "root"))
    writer.take(about(1))
    drawn = torch.rand(3)
    writer.start()
    writer.wait()
    load_newest(engine, Location.of(tmp_path / "root"), IDENTITY)
    assert torch.equal(torch.rand(3), drawn)


def test_a_checkpoint_waits_for_the_one_before_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, engine, gate = Location.of(tmp_path / "root"), made_engine(), Gate(monkeypatch)
    writer, saved = writer_of(engine, root)
    writer.take(about(1))
    writer.start()
    assert gate.reached.wait(PATIENCE_SECONDS)
    clock = Clock(time.perf_counter())
    monkeypatch.setattr(checkpoint_write, "time", clock)
    assert writer.pending is not None
    wait = writer.pending.written.wait

    def waited_for_5_seconds() -> bool:
        clock.now += 5.0
        gate.open.set()
        return wait()

    monkeypatch.setattr(writer.pending.written, "wait", waited_for_5_seconds)
    assert writer.take(about(2)) == pytest.approx(5.0) and [found.step for found in saved] == [1]
    writer.start()
    writer.wait()
    assert saved[0].waited_seconds < saved[1].waited_seconds == saved[1].blocked_seconds == 5.0
    assert [name[:13] for name in committed(root)] == ["step-00000002", "step-00000001"]


@pytest.mark.parametrize("error", [UserError("no space left"), ValueError("a bug")])
def test_what_fails_in_the_thread_is_told_in_the_loop_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    root, engine, gate = Location.of(tmp_path / "root"), made_engine(), Gate(monkeypatch)
    writer, saved = writer_of(engine, root)
    gate.open.set()
    save(writer, 1)
    gate.error = error
    writer.take(about(2))
    assert not writer.failed()
    writer.start()
    assert writer.pending is not None and writer.pending.done.wait(PATIENCE_SECONDS)
    assert writer.failed() and writer.committed_step() == 1
    kind = UserError if isinstance(error, UserError) else RuntimeError
    with pytest.raises(kind, match=rf"checkpoint of step 2 could not be written by rank 0: .*{error}"):
        writer.take(about(3))
    assert [name[:13] for name in committed(root)] == ["step-00000001"] and len(saved) == 1


def one_rank_late_then_failing(folder: Path) -> list[Any]:
    """On two ranks: rank 1 writes late; then rank 1 cannot write at all."""
    import torch.distributed as dist

    root, rank, found = Location.of(folder / "root"), dist.get_rank(), []
    writer, saved = writer_of(made_engine(), root)
    writer.take(about(1))
    if rank == 0:
        writer.start()
        assert writer.pending is not None and writer.pending.written.wait(PATIENCE_SECONDS)
        found.append((committed(root), sorted(file.name for file in (root / writer.pending.name).files())))
    dist.barrier()
    if rank == 1:
        writer.start()
    writer.wait()
    found.append([len(saved), len(committed(root)), writer.known_step])
    writer.take(about(2))
    if rank == 1:
        writer._write = lambda pending: (_ for _ in ()).throw(OSError("the cable is out"))  # type: ignore[method-assign]
    writer.start()
    try:
        writer.wait()
    except RuntimeError as error:
        found.append(str(error))
    found.append(len(committed(root)))
    return found


def test_two_ranks_commit_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = run_distributed(one_rank_late_then_failing, 2, tmp_path)
    names, files = first.pop(0)
    assert names == [] and files == ["part-00000.json", "random-00000.pt", "state-00000.bin"]
    words = "the checkpoint of step 2 could not be written by rank 1: OSError('the cable is out')"
    assert first == [[1, 1, 1], words, 1]
    assert second == [[0, 1, 1], words, 1]
    (folder,) = (path for path in (tmp_path / "root").iterdir() if path.name.startswith("step-00000001"))
    shares = json.loads((folder / "manifest.json").read_text())["parts"]["0.weight"]
    assert [(share["start"], share["numel"]) for share in shares] == [(0, 81), (81, 81)]  # 9 x 18, by two ranks
    assert not list(folder.glob("part-*"))


def test_what_was_cut_short_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    root, engine = Location.of(tmp_path / "root"), made_engine()
    writer, saved = writer_of(engine, root)
    save(writer, 1)
    (root / "step-00000002-70e700" / "state-00000.bin").write_bytes(b"half")
    restored = load_newest(engine, root, IDENTITY)
    assert restored is not None and restored.step == 1
    assert restored.passed_over == ("step-00000002-70e700: it has no manifest.json: its upload was cut short",)
    save(writer, 2)
    forget_others(root, saved[-1].name, 2, None)
    assert uncommitted(root) == [] and len(committed(root)) == 2


def test_an_attempt_that_was_replaced_removes_nothing_of_its_successor(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    for name in (
        "step-00000002-01d000",
        "step-00000004-3e3000",
        "step-00000006-3e3000",
        "step-00000008-3e3000",
        "step-00000003-0f0000",
    ):
        (root / name / "manifest.json").write_bytes(b"{}")
    seen = frozenset({"step-00000003-0f0000"})
    forget_others(root, "step-00000004-01d000", 1, None, seen)  # it comes back after the others went on
    assert committed(root) == ["step-00000008-3e3000", "step-00000006-3e3000", "step-00000004-3e3000"]


@pytest.mark.parametrize("numel", [[30], [1, 6, 7, 8, 2], [7, 7], [3, 4, 14]])
def test_numbers_run_over_the_borders_of_pieces(monkeypatch: pytest.MonkeyPatch, numel: list[int]) -> None:
    monkeypatch.setattr(snapshot, "PIECE_ELEMENTS", 7)
    tensors = [torch.rand(size) for size in numel]
    copy = HostCopy(sum(numel), torch.device("cpu"))
    for _ in range(2):
        copy.fill(tensors)
        assert b"".join(copy.pieces()) == torch.cat(tensors).numpy().tobytes()
    with pytest.raises(ValueError, match="the tensors have"):
        copy.fill(tensors[:-1])


def test_a_snapshot_on_disk_needs_a_folder() -> None:
    with pytest.raises(ValueError, match='"disk" needs local_checkpoint_folder'):
        PretrainConfig(global_batch_sequences=1, learning_rate=1.0, checkpoint_snapshot="disk")
