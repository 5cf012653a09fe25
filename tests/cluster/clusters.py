"""Ray heads for tests, with free ports, a token and a folder of their own, and all their processes stopped again.

A head may have Ray's autoscaler v2, whose nodes are processes of this machine (local_nodes.py, named as an external
provider: Ray's wheel lacks the defaults of its own fake one).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.machine import PATIENCE_SECONDS, free_ports, wait_for

ROOT = Path(__file__).resolve().parents[2]
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # as the provider expects it
PROVIDER = "tests.cluster.local_nodes.LocalNodes"
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Group:
    """A worker group as in cluster/base/raycluster.yaml, its nodes small."""

    name: str
    max_nodes: int
    cpus: int
    idle_seconds: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """A running head, as a client sees it."""

    gcs: str  # host:port
    dashboard: str  # URL
    folder: Path
    environment: dict[str, str] = field(repr=False)  # of a client that may talk to it, token included

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`command` as a client of this head."""
        chosen = {"env": self.environment, "cwd": ROOT, "timeout": 600, **options}
        return subprocess.run(command, capture_output=True, text=True, **chosen)


def tool(name: str) -> str:
    """A program of the environment that runs the tests."""
    return str(Path(sys.executable).with_name(name))


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without another cluster's address, token or bookkeeping."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    python_path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return {**kept, "PATH": path, "PYTHONPATH": python_path, "RAY_DEDUP_LOGS": "0", **more}


@contextmanager
def head(
    num_cpus: int,
    groups: tuple[Group, ...] = (),
    prefix: tuple[str, ...] = (),
    ip: str | None = None,
    options: tuple[str, ...] = (),
    more: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """A head that asks for a token. `groups`: what its autoscaler may start; `prefix`: a command to run it by;
    `options` of ray start; `more`: of its environment.
    """
    from ray.util import get_node_ip_address

    folder = Path(tempfile.mkdtemp(prefix="ulr"))  # short: Ray's socket paths are limited
    address = ip or get_node_ip_address()
    gcs, dashboard, agent, client = free_ports(4)
    environment = clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16), **(more or {}))
    started = {**environment, **(_autoscaler_environment() if groups else {})}
    command = [*prefix, tool("ray"), "start", "--head", "--block", f"--node-ip-address={address}", f"--port={gcs}"]
    command += ["--dashboard-host=0.0.0.0", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}", f"--num-cpus={num_cpus}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", *options]
    if groups:
        (folder / "scaling.json").write_text(json.dumps(_scaling(f"{address}:{gcs}", num_cpus, groups)))
        command.append(f"--autoscaling-config={folder / 'scaling.json'}")
    made = Head(f"{address}:{gcs}", f"http://{address}:{dashboard}", folder, environment)
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=started, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        _await_jobs_api(made, process, prefix)
        yield made
    finally:
        stop_processes(str(folder))
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def _autoscaler_environment() -> dict[str, str]:
    return {
        "AUTOSCALER_UPDATE_INTERVAL_S": "2",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }


def _scaling(gcs: str, head_cpus: int, groups: tuple[Group, ...]) -> dict[str, Any]:
    kinds: dict[str, Any] = {"ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}}
    for group in groups:
        kinds[group.name] = {
            "resources": {"CPU": group.cpus, "object_store_memory": OBJECT_STORE_BYTES},
            "labels": group.labels,
            "min_workers": 0,
            "max_workers": group.max_nodes,
            "idle_timeout_s": group.idle_seconds,
            "node_config": {},
        }
    provider = {"type": "external", "module": PROVIDER, "gcs_address": gcs, "head_node_id": HEAD_ID}
    return {
        "cluster_name": "test",
        "max_workers": sum(group.max_nodes for group in groups),
        "idle_timeout_minutes": 1,
        "provider": {
            **provider,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "auth": {},
        **{f"{where}setup_commands": [] for where in ("", "head_", "worker_")},
        **{f"{where}_start_ray_commands": [] for where in ("head", "worker")},
        **{"initialization_commands": [], "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": []},
    }


def _await_jobs_api(made: Head, process: subprocess.Popen[bytes], prefix: tuple[str, ...]) -> None:
    def lists_jobs() -> bool:
        return made.run(*prefix, tool("ray"), "job", "list", "--address", made.dashboard).returncode == 0

    log = made.folder / "head.log"
    wait_for(lists_jobs, PATIENCE_SECONDS, "the head", 0.5, process, lambda: log.read_text()[-3000:])


def stop_processes(marker: str) -> None:
    """End every process that has `marker`, a folder of this test alone, in its arguments or its environment."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _mentions(pid, marker)]
        for pid in found:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        if not found:
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(_mentions(pid, marker) for pid in found):
            time.sleep(0.2)


def _mentions(pid: int, marker: str) -> bool:
    if pid == os.getpid():
        return False
    try:
        place = Path(f"/proc/{pid}")
        return marker.encode() in (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
    except (OSError, ProcessLookupError):
        return False
