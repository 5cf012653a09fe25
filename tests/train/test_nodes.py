"""A host that is lost and a link that is cut, on nodes that are separate hosts (hosts.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.train.faults import open_gate
from tests.train.hosts import Hosts, namespaces_permitted
from tests.train.made_jobs import write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.status import describe_run

STEPS = 12
JOB: dict[str, Any] = {
    "steps": STEPS,
    "global_batch_sequences": 8,
    "checkpoint_every_steps": 1,
    "sequence_parallel_degree": 2,
    "hang_timeout_seconds": 15,
    "cluster": {"num_workers": 2, "max_failures": 5},
    "env": {"GLOO_SOCKET_IFNAME": "eth0"},
}


pytestmark = pytest.mark.skipif(not namespaces_permitted(), reason="network namespaces need root and iproute2")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        yield made
    finally:
        made.close()


def started(hosts: Hosts, folder: Path, stage: str) -> tuple[subprocess.Popen[Any], Location]:
    """A run on h0 and h1, one rank on each, that has done two steps."""
    write_inputs(folder)
    hosts.add_node(1)
    hosts.add_node(1)
    open_gate(folder / "gate", 3)  # the host is lost in the third step, or behind it, and never too late
    driver = hosts.start_driver(0, folder, stage, {**JOB, "gate": str(folder / "gate")})
    place = Location.of(folder / stage)
    wait_for(lambda: len(read_metrics(place)) >= 2, PATIENCE_SECONDS, "step 2", process=driver)
    return driver, place


def finished(driver: subprocess.Popen[Any], folder: Path, stage: str) -> None:
    """All steps are done, each once."""
    assert driver.wait(PATIENCE_SECONDS) == 0, (folder / f"{stage}.log").read_text()[-3000:]
    assert [record.step for record in read_metrics(Location.of(folder / stage))] == list(range(1, STEPS + 1))


def told(place: Location, host: str) -> dict[str, Any]:
    """The breakdown that names `host`."""
    found = [event for event in read_events(place) if event["event"] == "breakdown"]
    assert found, read_events(place)
    assert any(host in f"{event['node']} {event['cause']}" for event in found), found
    return found[0]


@pytest.mark.slow
def test_a_node_is_removed_in_mid_step_and_a_new_one_joins(hosts: Hosts, tmp_path: Path) -> None:
    driver, place = started(hosts, tmp_path, "removed")
    hosts.kill(1)
    open_gate(tmp_path / "gate", STEPS)
    hosts.add_node(1)
    finished(driver, tmp_path, "removed")
    told(place, hosts.address(1))
    status = describe_run(place)
    assert "done" in status and f"left: {_name(place, 0, hosts.address(1))}" in status
    assert f"came: {_name(place, -1, hosts.address(2))}" in status


@pytest.mark.slow
def test_a_cut_link_is_found_named_and_survived(hosts: Hosts, tmp_path: Path) -> None:
    driver, place = started(hosts, tmp_path, "cut")
    hosts.cut(1)
    open_gate(tmp_path / "gate", STEPS)
    hosts.add_node(1)
    finished(driver, tmp_path, "cut")
    told(place, hosts.address(1))
    assert "done" in describe_run(place)


def _name(place: Location, attempt: int, address: str) -> str:
    begins = [event for event in read_events(place) if event["event"] in ("start", "resume")]
    return next(node for node in begins[attempt]["nodes"] if address in node)


def test_the_hosts_are_apart(hosts: Hosts) -> None:
    """What the tests above rest on: two hosts reach each other until the cable is out."""
    hosts.add_host()
    hosts.add_host()
    server = f"import socket; s = socket.create_server(('{hosts.address(0)}', 7000)); s.accept()"
    listening = subprocess.Popen(hosts.inside(0, [sys.executable, "-c", server]))
    hosts.processes.append(listening)
    wait_for(lambda: psutil.pid_exists(listening.pid), 5, "the server")
    reach = (
        f"import socket, time\nfor _ in range(99):\n  try: socket.create_connection(('{hosts.address(0)}', 7000), 2)"
    )
    reach += "; break\n  except ConnectionRefusedError: time.sleep(0.1)\nelse: raise SystemExit(1)"
    hosts.run(1, [sys.executable, "-c", reach])
    hosts.cut(1)
    with pytest.raises(AssertionError, match=r"TimeoutError|timed out|unreachable"):
        hosts.run(1, [sys.executable, "-c", reach])
