"""The failure table's rows that are about a rank or a node, through the trainer on Ray: told, and mended or stopped.

Each run has a driver of its own, as a submitted job has. With ULTRALONG_SLOW_TESTS=1 only.
"""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.train.made_jobs import LENGTH, NUM_SEQUENCES, VOCAB, recipe, write_inputs
from tests.train.small_cluster import SmallCluster
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.failures import Event, breakdowns_in_a_row
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.order import sequences_of_step
from ultralong_ray.train.status import describe_run

pytestmark = pytest.mark.slow
REFUSED = 2  # exit status of a driver that met a UserError


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[SmallCluster]:
    made = SmallCluster(head_cpus=2)
    yield made
    made.close()


@pytest.fixture
def one_cpu() -> Iterator[SmallCluster]:
    """A head to which tests add nodes."""
    made = SmallCluster(head_cpus=1)
    yield made
    made.close()


class Run:
    """A run of two ranks that share each sequence, and what it leaves behind."""

    def __init__(self, cluster: SmallCluster, folder: Path, stage: str) -> None:
        self.cluster, self.folder, self.name, self.stage = cluster, folder, stage, Location.of(folder / stage)

    def start(self, max_failures: int = 3, **changes: Any) -> None:
        fields = {"global_batch_sequences": 2, "checkpoint_every_steps": 1, "sequence_parallel_degree": 2}
        cluster = {"num_workers": 2, "max_failures": max_failures}
        self.driver = self.cluster.start_driver(self.folder, self.name, {**fields, "cluster": cluster, **changes})

    def finish(self) -> int:
        """The driver's exit status."""
        return self.driver.wait(PATIENCE_SECONDS)

    def until(self, step: int) -> None:
        wait_for(lambda: self.alive() and len(read_metrics(self.stage)) >= step, PATIENCE_SECONDS, f"step {step}")

    def alive(self) -> bool:
        assert self.driver.poll() is None, self.log()[-3000:]
        return True

    def event(self, name: str) -> Event:
        """The first event of this name, once there is one."""

        def found() -> Event | None:
            return next((event for event in read_events(self.stage) if event["event"] == name), None)

        return wait_for(lambda: found() or (self.alive() and None), PATIENCE_SECONDS, name)

    def events(self, *names: str) -> list[Event]:
        return [event for event in read_events(self.stage) if event["event"] in names]

    def steps(self) -> list[int]:
        return [record.step for record in read_metrics(self.stage)]

    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text()

    def refusal(self) -> str:
        """What the driver said to its user, on one line."""
        assert self.finish() == REFUSED, self.log()[-3000:]
        return self.log().rsplit("\nerror: ", 1)[1].strip()

    def leave(self) -> None:
        """As `ray job stop`."""
        self.driver.send_signal(signal.SIGTERM)
        assert self.finish() == 128 + signal.SIGTERM, self.log()[-3000:]


def test_a_rank_out_of_memory_is_started_once_more_then_the_run_stops(two_cpus: SmallCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run = Run(two_cpus, tmp_path, "memory")
    run.start(max_failures=-1, fault={"rank": 1, "step": 3, "kinds": ["cuda memory", "host memory"]})
    refusal = run.refusal()
    told = run.events("breakdown")
    assert [(event["kind"], event["rank"], event["step"]) for event in told] == [("memory", 1, 3)] * 2
    assert "CUDA out of memory. Tried to allocate 2.00 GiB (peak" in told[0]["cause"]
    assert "can't allocate memory" in told[1]["cause"] and "the plan predicted nothing" in told[1]["cause"]
    assert "step 3 failed 2 times in a row" in refusal and "keep_attention_rows = 0" in refusal
    assert run.steps() == [1, 2] and read_events(run.stage)[-1]["event"] == "stop"


def test_a_step_that_fails_again_and_again_is_named_with_its_sequences(two_cpus: SmallCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run, seed = Run(two_cpus, tmp_path, "again"), recipe(tmp_path).pretrain.seed
    run.start(max_failures=1, fault={"rank": 1, "step": 3, "kinds": ["error"]})
    refusal, sequences = run.refusal(), sequences_of_step(3, 2, NUM_SEQUENCES, seed)
    assert f"step 3 failed 2 times in a row without a checkpoint in between, on sequences {sequences}" in refusal
    assert re.search(r"last cause: rank 1 on \S+: ValueError: a bad token", refusal)
    run.start(max_failures=1)
    assert run.finish() == 0, run.log()[-3000:]
    assert run.steps() == list(range(1, NUM_SEQUENCES // 2 + 1))
    assert [event["step"] for event in run.events("resume")] == [2, 2]


def test_a_loss_that_is_not_finite_stops_the_run(two_cpus: SmallCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run = Run(two_cpus, tmp_path, "nan")
    run.start(learning_rate=1e30)
    refusal = run.refusal()
    step = run.steps()[-1] + 1
    assert re.match(rf"step {step}: the (loss on ranks|gradient norm).*is not finite, sequences \[\d+, \d+\]", refusal)
    assert last_good_step(refusal) < step
    (told,) = run.events("breakdown")
    assert told["kind"] == "user" and len(run.events("start", "resume")) == 1, "it is not tried again"


def last_good_step(refusal: str) -> int:
    """Of the checkpoint that a refusal names; the one of the step before may be on its way."""
    named = re.search(r"The last good checkpoint is step-(\d{8})-\w+;|There is no checkpoint from before", refusal)
    assert named, refusal
    return int(named[1] or 0)


def one_odd_sequence(folder: Path, odd: int) -> None:
    """Sequences that are all alike but for one."""
    alike, other = np.arange(LENGTH) % VOCAB, np.random.default_rng(0).integers(0, VOCAB, LENGTH)
    write_inputs(folder, [other if number == odd else alike for number in range(NUM_SEQUENCES)])


def test_a_loss_spike_is_told_or_stops_the_run(two_cpus: SmallCluster, tmp_path: Path) -> None:
    odd = 7
    one_odd_sequence(tmp_path, odd)
    steps = 48  # by then all but the odd sequence are learnt
    run = Run(two_cpus, tmp_path, "warn")
    run.start(steps=steps)
    assert run.finish() == 0, run.log()[-3000:]
    spikes = run.events("spike")
    assert spikes and all(odd in spike["sequences"] for spike in spikes)
    assert "times the median" in spikes[0]["cause"] and run.steps() == list(range(1, steps + 1))
    stopped = Run(two_cpus, tmp_path, "stop")
    stopped.start(steps=steps, on_loss_spike="stop")
    refusal = stopped.refusal()
    assert refusal.startswith(f"step {spikes[0]['step']}: loss ") and f"sequences {spikes[0]['sequences']}" in refusal
    assert 0 < last_good_step(refusal) < spikes[0]["step"]
    assert len(stopped.events("start", "resume")) == 1, "it is not tried again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A stage's folder on a disk of its own, of 2 MiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_with_room_it_goes_on(
    two_cpus: SmallCluster, tmp_path: Path, small_disk: Path
) -> None:
    write_inputs(tmp_path)
    run = Run(two_cpus, tmp_path, small_disk.name)
    run.start(steps=24, keep_checkpoints=100)
    refusal = run.refusal()
    assert "no space left" in refusal and str(small_disk) in refusal
    reached = run.steps()[-1]
    assert 0 < reached < 24 and len(run.events("start", "resume")) == 1, "it is not tried again"
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run.start(steps=24, keep_checkpoints=100)
    assert run.finish() == 0, run.log()[-3000:]
    (resume,) = run.events("resume")
    assert 0 < resume["step"] <= reached and run.steps() == list(range(1, 25))


def test_a_frozen_rank_on_a_node_of_its_own_is_named_and_the_run_goes_on(one_cpu: SmallCluster, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    node = one_cpu.add_node(1)
    run = Run(one_cpu, tmp_path, "frozen")
    run.start(steps=3000, checkpoint_every_steps=5, hang_timeout_seconds=10)
    run.until(6)
    (frozen,) = one_cpu.workers("RayTrainWorker", node)
    frozen.suspend()
    stopped = time.time()
    failure = run.event("failure")
    assert failure["kind"] == "hung" and node.node_id[:8] in failure["node"]
    assert f"rank {failure['rank']} gives no sign though its host answers" in failure["cause"]
    seconds = failure["time"] - stopped
    resume = run.event("resume")
    told = run.event("breakdown")
    assert (told["kind"], told["rank"], told["node"]) == ("hung", failure["rank"], failure["node"])
    assert resume["step"] >= told["step"] - 1 - 5
    run.until(told["step"] + 5)
    assert not psutil.pid_exists(frozen.pid)
    run.leave()
    print(f"frozen: told after {seconds:.1f} s, started again after {resume['time'] - stopped:.1f} s")
    print(describe_run(run.stage))


@pytest.mark.parametrize(("max_failures", "grace_seconds"), [(0, 30), (3, 200)])
def test_a_node_drained_by_ray_is_left_in_time(
    one_cpu: SmallCluster, tmp_path: Path, max_failures: int, grace_seconds: int
) -> None:
    """With max_failures 0 the ranks wait for the deadline, at which the node goes; else they leave long before it."""
    write_inputs(tmp_path)
    node = one_cpu.add_node(1)
    run = Run(one_cpu, tmp_path, "drained")
    run.start(max_failures=max_failures, steps=100_000, checkpoint_every_steps=50_000)
    run.until(3)
    one_cpu.add_node(1)
    announced = time.time()
    one_cpu.drain_node(node, grace_seconds)
    interrupted, saved = run.event("interrupted"), run.event("checkpoint")
    assert "Ray announced that a node will be taken away, to ranks 0, 1" in interrupted["cause"]
    assert saved["step"] == interrupted["step"] and interrupted["time"] < announced + grace_seconds
    if not max_failures:
        time.sleep(max(0.0, announced + grace_seconds - time.time()))
        one_cpu.kill_node(node)
    resume = run.event("resume")
    assert resume["step"] == interrupted["step"], "nothing is lost"
    assert not any(node.node_id[:8] in name for name in resume["nodes"]) and len(set(resume["nodes"])) == 2
    assert max_failures == 0 or resume["time"] < announced + grace_seconds
    run.until(resume["step"] + 3)
    assert run.steps() == list(range(1, len(run.steps()) + 1))
    events = read_events(run.stage)
    assert breakdowns_in_a_row(events) == [], "it does not count"
    run.leave()
    print(f"drained: saved after {saved['time'] - announced:.1f} s, elsewhere after {resume['time'] - announced:.1f} s")
    print(describe_run(run.stage))
