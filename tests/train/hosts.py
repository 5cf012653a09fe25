"""Nodes as separate hosts: network namespaces on a bridge, each with its own address, and a link that can be cut.

Needs root and iproute2. Every node is `ray start` inside a namespace; a driver runs in the head's or in another one.
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
from pathlib import Path
from typing import Any

from tests.train.small_cluster import HERE, QUICK


def namespaces_permitted() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"t{uuid.uuid4().hex[:6]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


class Hosts:
    """Namespaces h0, h1, ... on a bridge of their own; h0 is the head."""

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex[:5]
        self.network = f"10.{200 + int(self.key[:2], 16) % 50}.{int(self.key[2:4], 16)}"
        self.bridge, self.temp = f"b{self.key}", tempfile.mkdtemp(prefix="r-", dir="/tmp")
        self.names: list[str] = []
        self.processes: list[subprocess.Popen[Any]] = []
        self.head_env: dict[str, str] = {}
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
        self.start_node(number, cpus)
        return number

    def start_node(self, number: int, cpus: int) -> None:
        """Ray on a host that is there: a new one, or one that lost its processes."""
        address = self.address(number)
        options = ["--num-cpus", str(cpus), "--node-ip-address", address, "--object-store-memory", str(80 * 2**20)]
        if number == 0:
            # a file of the head before it, by which, and by processes of all hosts, Ray would take itself for running
            Path(self.temp, "ray_current_cluster").unlink(missing_ok=True)
            options += ["--head", "--port", "6379", "--include-dashboard=false", "--system-config", json.dumps(QUICK)]
            options += ["--temp-dir", self.temp]
        else:
            options += ["--address", f"{self.address(0)}:6379"]
        self.run(number, [str(Path(sys.executable).parent / "ray"), "start", *options])

    def start_redis(self, number: int) -> None:
        """A Redis server on host `number`, in which a head that starts from now on keeps its tables."""
        command = ["redis-server", "--bind", "0.0.0.0", "--port", "6379", "--protected-mode", "no", "--save", ""]
        redis = subprocess.Popen(self.inside(number, [*command, "--dir", self.temp]), stdout=subprocess.DEVNULL)
        self.processes.append(redis)
        self.head_env = {"RAY_REDIS_ADDRESS": f"{self.address(number)}:6379"}

    def address(self, number: int) -> str:
        return f"{self.network}.{number + 10}"

    def run(self, number: int, command: list[str]) -> None:
        env = {**self._env(), **(self.head_env if number == 0 else {})}
        done = subprocess.run(self.inside(number, command), capture_output=True, text=True, env=env)
        assert done.returncode == 0, (command, done.stdout, done.stderr)

    def start_driver(self, number: int, folder: Path, stage: str, changes: dict[str, Any]) -> subprocess.Popen[Any]:
        """A driver on host `number`; its own node runs Ray Train's controller."""
        script = [sys.executable, str(HERE / "small_driver.py"), f"{self.address(0)}:6379"]
        log = (folder / f"{stage}.log").open("a")
        command = self.inside(number, [*script, str(folder), stage, json.dumps(changes)])
        env = {**self._env(), "NODE_ADDRESS": self.address(number)}
        driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
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

    def inside(self, number: int, command: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self.names[number], *command]

    @staticmethod
    def _env() -> dict[str, str]:
        return {**os.environ, "RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0", "RAY_DEDUP_LOGS": "0"}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
