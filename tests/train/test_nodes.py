"""Nodes as separate hosts: network namespaces on a bridge, each with its own address, and a link that can be cut.

Needs root and iproute2. Every node is `ray start` inside a namespace; the driver runs in the head's.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.train.made_jobs import write_inputs
from tests.train.small_cluster import HERE, QUICK, wait_for
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.status import describe_run

STEPS = 12
WAIT_SECONDS = 400.0
JOB: dict[str, Any] = {
    "steps": STEPS,
    "global_batch_sequences": 8,
    "checkpoint_every_steps": 1,
    "sequence_parallel_degree": 2,
    "hang_timeout_seconds": 15,
    "cluster": {"num_workers": 2, "max_failures": 5},
    "env": {"GLOO_SOCKET_IFNAME": "eth0"},
}


def namespaces_permitted() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"t{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


pytestmark = pytest.mark.skipif(not namespaces_permitted(), reason="network namespaces need root and iproute2")


class Hosts:
    """Namespaces h0, h1, ... on a bridge of their own; h0 is the head."""

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex[:5]
        self.network = f"10.{200 + int(self.key[:2], 16) % 50}.{int(self.key[2:4], 16)}"
        self.bridge, self.temp = f"b{self.key}", tempfile.mkdtemp(prefix="r-", dir="/tmp")
        self.names: list[str] = []
        self.processes: list[subprocess.Popen[Any]] = []
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("link", "set", self.bridge, "up")

    def add_host(self) -> int:
        """A namespace on the bridge; its number."""
        number = len(self.names)
        name, link = f"n{self.key}{number}", f"v{self.key}{number}"
        self.names.append(name)
        _ip("netns", "add", name)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", link, "master", self.bridge, "up")
        self.run(number, ["ip", "addr", "add", f"{self.address(number)}/24", "dev", "eth0"])
        for device in ("lo", "eth0"):
            self.run(number, ["ip", "link", "set", device, "up"])
        # Ray asks the default route for its own address; without one a driver joins any node
        self.run(number, ["ip", "route", "add", "default", "dev", "eth0"])
        return number

    def add_node(self, cpus: int) -> int:
        """A host with a Ray node; its number."""
        number = self.add_host()
        address = self.address(number)
        options = ["--num-cpus", str(cpus), "--node-ip-address", address, "--object-store-memory", str(80 * 2**20)]
        if number == 0:
            options += ["--head", "--port", "6379", "--include-dashboard=false", "--system-config", json.dumps(QUICK)]
            options += ["--temp-dir", self.temp]
        else:
            options += ["--address", f"{self.address(0)}:6379"]
        self.run(number, [str(Path(sys.executable).parent / "ray"), "start", *options])
        return number

    def address(self, number: int) -> str:
        return f"{self.network}.{number + 10}"

    def run(self, number: int, command: list[str]) -> None:
        done = subprocess.run(self._inside(number, command), capture_output=True, text=True, env=self._env())
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    def start_driver(self, folder: Path, stage: str) -> subprocess.Popen[Any]:
        script = [sys.executable, str(HERE / "small_driver.py"), f"{self.address(0)}:6379"]
        log = (folder / f"{stage}.log").open("a")
        command = self._inside(0, [*script, str(folder), stage, json.dumps(JOB)])
        driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self._env())
        self.processes.append(driver)
        return driver

    def kill(self, number: int) -> None:
        """kill -9 of all that runs on the host, as when it loses its power."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[number]], capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, number: int) -> None:
        """The host's cable: nothing comes through, and nobody is told."""
        _ip("link", "set", f"v{self.key}{number}", "nomaster")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for number in range(len(self.names)):
            self.kill(number)
        time.sleep(0.5)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.temp, ignore_errors=True)

    def _inside(self, number: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[number], *command]

    @staticmethod
    def _env() -> dict[str, str]:
        return {**os.environ, "RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0", "RAY_DEDUP_LOGS": "0"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


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
    driver, place = hosts.start_driver(folder, stage), Location.of(folder / stage)
    wait_for(lambda: len(read_metrics(place)) >= 2, WAIT_SECONDS, "step 2")
    return driver, place


def told(place: Location, host: str) -> dict[str, Any]:
    """The breakdown that names `host`."""
    found = [event for event in read_events(place) if event["event"] == "breakdown"]
    assert found, read_events(place)
    assert any(host in f"{event['node']} {event['cause']}" for event in found), found
    return found[0]


def test_a_node_is_removed_in_mid_step_and_a_new_one_joins(hosts: Hosts, tmp_path: Path) -> None:
    driver, place = started(hosts, tmp_path, "removed")
    hosts.kill(1)
    hosts.add_node(1)
    assert driver.wait(WAIT_SECONDS) == 0, (tmp_path / "removed.log").read_text()[-3000:]
    assert [record.step for record in read_metrics(place)] == list(range(1, STEPS + 1))
    told(place, hosts.address(1))
    status = describe_run(place)
    assert "done" in status and f"left: {_name(place, 0, hosts.address(1))}" in status
    assert f"came: {_name(place, -1, hosts.address(2))}" in status


@pytest.mark.slow
def test_a_cut_link_is_found_named_and_survived(hosts: Hosts, tmp_path: Path) -> None:
    driver, place = started(hosts, tmp_path, "cut")
    hosts.cut(1)
    hosts.add_node(1)
    assert driver.wait(WAIT_SECONDS) == 0, (tmp_path / "cut.log").read_text()[-3000:]
    assert [record.step for record in read_metrics(place)] == list(range(1, STEPS + 1))
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
    listening = subprocess.Popen(hosts._inside(0, [sys.executable, "-c", server]))
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
