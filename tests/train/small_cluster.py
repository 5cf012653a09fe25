"""A Ray cluster of several raylets on this machine and a driver in a process of its own, all to be killed by pid.

Ports are free ones and the session's folder is its own, so several such clusters can run at a time.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
# A node is given up after 3 s without an answer here, after 15 s by default (health_check_* of Ray 2.60).
QUICK = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
# Workers that nobody asked for cost seconds of a small machine.
QUICK |= {"prestart_worker_first_driver": False, "enable_worker_prestart": False}


class SmallCluster:
    """A head of `head_cpus` CPUs, on whose node drivers run, and nodes that can be added and killed."""

    def __init__(self, head_cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self.temp = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # a short path: sockets lie below it
        head = {"num_cpus": head_cpus, "_system_config": QUICK, "include_dashboard": False, "temp_dir": self.temp}
        head["object_store_memory"] = 80 * 2**20
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.address = self.cluster.address
        self.drivers: list[subprocess.Popen[str]] = []

    def add_node(self, cpus: int) -> Any:
        """A new node."""
        return patiently(lambda: self.cluster.add_node(num_cpus=cpus, object_store_memory=80 * 2**20))

    def drain_node(self, node: Any, seconds: int) -> None:
        """Announce, as KubeRay's autoscaler and a cloud's notice of preemption do, that the node goes in `seconds`.

        Whoever announces it takes the node away then; Ray does not.
        """
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "a test", "--deadline-remaining-seconds", str(seconds)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    @staticmethod
    def pid_of(node: Any, process: str = "raylet") -> int:
        return node.all_processes[process][0].process.pid

    def kill_node(self, node: Any) -> None:
        """kill -9 of a raylet; its workers notice and end."""
        os.kill(self.pid_of(node), signal.SIGKILL)

    def workers(self, name: str, node: Any = None) -> list[psutil.Process]:
        """Processes of the actor class `name` on all nodes, or one: children of our raylets whose title holds it."""
        found = []
        for each in self.cluster.list_all_nodes() if node is None else [node]:
            try:
                children = psutil.Process(self.pid_of(each)).children(recursive=True)
                found += [child for child in children if name in " ".join(child.cmdline())]
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    def start_driver(self, folder: Path, stage: str, changes: dict[str, Any]) -> subprocess.Popen[str]:
        log = (folder / f"{stage}.log").open("a")
        command = [sys.executable, str(HERE / "small_driver.py"), self.address, str(folder), stage, json.dumps(changes)]
        driver = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        self.drivers.append(driver)
        return driver

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()
        shutil.rmtree(self.temp, ignore_errors=True)


def patiently(start: Callable[[], Any]) -> Any:
    """What `start` gives. Ray gives a raylet 30 s to come up, which on a busy machine may not do."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return start()
    return start()
