"""The head is lost with all its processes and comes back with its tables, which lie in Redis: training goes on.

Nodes are network namespaces (hosts.py). The driver, and with it Ray Train's controller, is on a worker node, or on the
head and lost with it. With ULTRALONG_SLOW_TESTS=1 only.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.train.hosts import Hosts, namespaces_permitted
from tests.train.made_jobs import write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.status import describe_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs a Redis server (Debian: redis-server)"),
    pytest.mark.skipif(not namespaces_permitted(), reason="network namespaces need root and iproute2"),
]
JOB: dict[str, Any] = {
    "steps": 100_000,
    "global_batch_sequences": 2,
    "checkpoint_every_steps": 5,
    "sequence_parallel_degree": 2,
    "cluster": {"num_workers": 2, "max_failures": 0},  # any restart would end the run
    "env": {"GLOO_SOCKET_IFNAME": "eth0"},
}


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """A head without CPUs (0), the host of its Redis (1) and two nodes with one CPU (2, 3)."""
    made = Hosts()
    try:
        made.add_host()
        made.start_redis(made.add_host())
        made.start_node(0, 0)
        made.add_node(1)
        made.add_node(1)
        yield made
    finally:
        made.close()


def lose_head(hosts: Hosts) -> None:
    hosts.kill(0)
    time.sleep(3)  # nobody answers for so long at least
    hosts.start_node(0, 0)


def last_step(place: Location) -> int:
    return max((record.step for record in read_metrics(place)), default=0)


def leave(driver: subprocess.Popen[Any], folder: Path, stage: str) -> str:
    """As `ray job stop`; what jobs/status.py then prints. All steps up to the end are there."""
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM, (folder / f"{stage}.log").read_text()[-3000:]
    place = Location.of(folder / stage)
    assert [record.step for record in read_metrics(place)] == list(range(1, last_step(place) + 1))
    return describe_run(place)


def test_training_does_not_notice_that_the_head_is_lost_and_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    driver, place = hosts.start_driver(2, tmp_path, "head", JOB), Location.of(tmp_path / "head")
    wait_for(lambda: last_step(place) >= 2, PATIENCE_SECONDS, "step 2")
    lost_at = last_step(place)
    lose_head(hosts)
    back_at = last_step(place)
    wait_for(lambda: last_step(place) >= back_at + 10 or driver.poll() is not None, PATIENCE_SECONDS, "ten more steps")
    status = leave(driver, tmp_path, "head")
    events = [event["event"] for event in read_events(place) if event["event"] != "checkpoint"]
    assert events == ["submit", "start", "interrupted"], "one attempt"
    print(f"the head was lost after step {lost_at} and back after step {back_at}\n{status}")


def test_a_driver_lost_with_the_head_is_submitted_again_to_the_one_that_came_back(hosts: Hosts, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    place = Location.of(tmp_path / "driver")
    hosts.start_driver(0, tmp_path, "driver", JOB)
    wait_for(lambda: "checkpoint" in [event["event"] for event in read_events(place)], PATIENCE_SECONDS, "a checkpoint")
    lose_head(hosts)
    driver = hosts.start_driver(0, tmp_path, "driver", JOB)

    def resumed() -> int | None:
        assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-3000:]
        return next((event["step"] for event in read_events(place) if event["event"] == "resume"), None)

    step = wait_for(resumed, PATIENCE_SECONDS, "the next attempt")
    assert step > 0 and step % 5 == 0
    wait_for(lambda: last_step(place) >= step + 3 or driver.poll() is not None, PATIENCE_SECONDS, "three more steps")
    print(leave(driver, tmp_path, "driver"))
