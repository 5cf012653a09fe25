"""A run killed with SIGKILL at random moments ends bit for bit as the undisturbed one.

    KILLS=20 KILL_SEED=7 KILL_RESULT=kill_schedule.json python -m pytest -s tests/train/test_kill_schedule.py

Without those variables two kills, at the same moments each time. A killed driver is submitted again; all else is left
to the run, which takes no step beyond the one in which the next kill is to come: on a busy machine kills come late.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.parallel.spawn import run_distributed
from tests.train.faults import open_gate
from tests.train.made_jobs import job, weights_of, write_inputs
from tests.train.small_cluster import SmallCluster
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import CHECKPOINTS
from ultralong_ray.train.checkpoint_files import MANIFEST_FILE
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.status import describe_run, restarts_of

STEPS = 12
KINDS = ("worker", "controller", "raylet", "upload", "driver")
JOB: dict[str, Any] = {
    "steps": STEPS,
    "global_batch_sequences": 8,
    "micro_batch_sequences": 1,
    "checkpoint_every_steps": 1,
    "sequence_parallel_degree": 2,
    "cluster": {"num_workers": 2, "max_failures": -1},
}


@dataclass
class Kill:
    kind: str
    at_step: float  # 4.4: in step 5, when step 4 is recorded and 40 % of a second more has passed
    while_starting: bool  # instead: so many seconds after the kill before
    reached_step: int = 0
    seconds_to_next_attempt: float = 0.0
    resumed_from: int = -1


def draw_schedule(kills: int, seed: int) -> list[Kill]:
    """Kinds in turn, shuffled; moments uniform over the run, one in five while the attempt before is still starting."""
    draw = random.Random(seed)
    kinds = [KINDS[i % len(KINDS)] for i in range(kills)]
    draw.shuffle(kinds)
    moments = sorted(draw.uniform(0.0, STEPS - 1.0) for _ in kinds)
    return [
        Kill(kind, round(moment, 2), place > 0 and kind != "upload" and draw.random() < 0.2)
        for place, (kind, moment) in enumerate(zip(kinds, moments, strict=True))
    ]


@pytest.fixture
def cluster() -> Iterator[SmallCluster]:
    made = SmallCluster(head_cpus=1)
    yield made
    made.close()


class KilledRun:
    """One run, its driver, and the node that may be killed."""

    def __init__(self, cluster: SmallCluster, folder: Path) -> None:
        self.cluster, self.folder, self.stage = cluster, folder, Location.of(folder / "killed")
        self.gate, self.uploads = folder / "gate", folder / "gate.uploads"
        open_gate(self.gate, 0)
        self.node = cluster.add_node(1)
        self.submissions = 0
        self.submit()

    def submit(self) -> None:
        self.driver = self.cluster.start_driver(self.folder, "killed", {**JOB, "gate": str(self.gate)})
        self.submissions += 1

    def begun(self) -> int:
        """How many attempts have begun; a driver that ended without the run's end is submitted again."""
        if self.driver.poll() not in (None, 0):
            self.submit()
        return sum(event["event"] in ("start", "resume") for event in read_events(self.stage))

    def last_step(self) -> int:
        return max((record.step for record in read_metrics(self.stage)), default=0)

    def uncommitted(self) -> set[str]:
        root = self.folder / "killed" / CHECKPOINTS
        folders = list(root.iterdir()) if root.is_dir() else []
        return {folder.name for folder in folders if not (folder / MANIFEST_FILE).exists()}

    def moment_of(self, kill: Kill) -> None:
        """Wait for the moment of `kill`."""
        if kill.while_starting:
            time.sleep(10 * (kill.at_step % 1))
            return
        if kill.kind == "upload":
            self.uploads.touch()
            left_behind = self.uncommitted()
            wait_for(lambda: self.uploading(kill, left_behind), PATIENCE_SECONDS, f"an upload for {kill}")
            return
        open_gate(self.gate, int(kill.at_step) + 1)
        wait_for(lambda: self.begun() and self.last_step() >= int(kill.at_step), PATIENCE_SECONDS, f"{kill}")
        time.sleep(kill.at_step % 1)

    def uploading(self, kill: Kill, left_behind: set[str]) -> bool:
        """Whether an upload has begun: of the step of `kill`, or of the next one where kills before it came late."""
        open_gate(self.gate, max(int(kill.at_step), self.last_step()) + 1)
        return bool(self.begun() and self.uncommitted() - left_behind)

    def kill_one(self, name: str) -> bool:
        """One of the processes called `name`, if there is one yet."""
        for process in self.cluster.workers(name)[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
                return True
        return False

    def strike(self, kill: Kill) -> None:
        """Kill at the moment of `kill`."""
        self.moment_of(kill)
        kill.reached_step = self.last_step()
        if kill.kind == "driver":
            self.driver.kill()
            self.driver.wait()
        elif kill.kind == "raylet":
            self.cluster.kill_node(self.node)
            self.node = self.cluster.add_node(1)
        else:
            name = "TrainController" if kill.kind == "controller" else "RayTrainWorker"
            wait_for(lambda: self.kill_one(name), PATIENCE_SECONDS, f"a process for {kill}")
        if kill.kind == "upload":
            open_gate(self.gate, self.last_step())
            self.uploads.unlink()

    def go_through(self, schedule: list[Kill]) -> None:
        wait_for(lambda: self.begun() >= 1, PATIENCE_SECONDS, "the first attempt")
        for place, kill in enumerate(schedule):
            before = self.begun()
            self.strike(kill)
            struck = time.monotonic()
            if place + 1 < len(schedule) and schedule[place + 1].while_starting:
                continue
            wait_for(lambda before=before: self.begun() > before, PATIENCE_SECONDS, f"a start after {kill}")
            kill.seconds_to_next_attempt = round(time.monotonic() - struck, 1)
            begins = [event for event in read_events(self.stage) if event["event"] in ("start", "resume")]
            kill.resumed_from = begins[-1].get("step", 0)
            print(kill, flush=True)
        open_gate(self.gate, STEPS)
        wait_for(lambda: self.begun() and self.driver.poll() == 0, PATIENCE_SECONDS, "the end of the run")


def undisturbed_run(folder: Path) -> int:
    """Two ranks without Ray."""
    import torch

    from ultralong_ray.train.loop import run

    return run(job(folder, "undisturbed", **JOB), torch.device("cpu"), lambda metrics: None)


def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one(cluster: SmallCluster, tmp_path: Path) -> None:
    kills, seed = int(os.environ.get("KILLS", "2")), int(os.environ.get("KILL_SEED", "3"))
    schedule = draw_schedule(kills, seed)
    print(f"seed of the kill schedule: {seed}", *schedule, sep="\n")
    write_inputs(tmp_path)
    began = time.monotonic()
    run = KilledRun(cluster, tmp_path)
    run.go_through(schedule)
    run_distributed(undisturbed_run, 2, tmp_path)
    undisturbed = Location.of(tmp_path / "undisturbed")
    one, other = read_metrics(undisturbed), read_metrics(run.stage)
    assert [record.step for record in other] == list(range(1, STEPS + 1))
    assert [(record.loss, record.grad_norm) for record in one] == [(record.loss, record.grad_norm) for record in other]
    wanted, have = weights_of(undisturbed), weights_of(run.stage)
    assert wanted.keys() == have.keys() and all(np.array_equal(wanted[key], have[key]) for key in wanted)
    events = read_events(run.stage)
    lost = [kill.reached_step - kill.resumed_from for kill in schedule if kill.resumed_from >= 0]
    assert max(lost) <= 1, "more than the step in flight was lost"
    assert sum(event["event"] == "submit" for event in events) == run.submissions
    assert restarts_of(events)
    print(describe_run(run.stage))
    if result := os.environ.get("KILL_RESULT"):
        record = {
            "seed": seed,
            "kills": [asdict(kill) for kill in schedule],
            "steps": STEPS,
            "submissions": run.submissions,
            "losses": [record.loss for record in other],
            "losses_and_weights_bit_identical": True,
            "seconds": round(time.monotonic() - began),
            "machine": f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}",
            "restarts": restarts_of(events),
        }
        Path(result).write_text(json.dumps(record, indent=1) + "\n")
