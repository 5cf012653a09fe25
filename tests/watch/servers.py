"""A Ray head of its own and a real Prometheus that scrapes it: the parts of the live tests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.machine import PATIENCE_SECONDS, free_ports, http_server, wait_for

ROOT = Path(__file__).resolve().parents[2]
WATCHING = ROOT / "cluster" / "components" / "watching"
SCRAPE_SECONDS = 1


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


@contextmanager
def ray_head(folder: Path, num_cpus: int = 3, variables: dict[str, str] | None = None) -> Iterator[dict[str, str]]:
    """A head that reports its metrics every second; yields the environment that joins it. `folder` must be short.

    `variables`: more of the environment, of the head and of those who join.
    """
    gcs, dashboard, agent, client, metrics = free_ports(5)
    ray = shutil.which("ray", path=os.path.dirname(sys.executable)) or "ray"
    environment = {
        **os.environ,
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "for-this-test-only-" + str(os.getpid()),
        "RAY_metrics_report_interval_ms": "1000",
        "METRICS_RECORD_INTERVAL_S": "1",
        **(variables or {}),
    }
    ports = f"--port {gcs} --dashboard-port {dashboard} --dashboard-agent-listen-port {agent}"
    ports += f" --ray-client-server-port {client} --metrics-export-port {metrics}"
    options = f"--head --block --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 {ports} --num-cpus {num_cpus}"
    with (folder / "head.log").open("w") as log:
        command = [ray, "start", *options.split(), "--disable-usage-stats", "--temp-dir", str(folder)]
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        joined = {**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
        discovery, log = folder / "prom_metrics_service_discovery.json", folder / "head.log"
        wait_for(discovery.exists, PATIENCE_SECONDS, "the head", 0.25, head, lambda: log.read_text()[-3000:])
        yield joined
    finally:
        stop(head)


class Prometheus:
    """A server whose queries are those of its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.began = time.time()

    def get(self, path: str, **parameters: Any) -> Any:
        query = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(query, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)["data"]

    def over_the_run(self, expression: str) -> list[dict[str, Any]]:
        """Series with all their values since the server began."""
        now = time.time()
        step = max(1.0, (now - self.began) / 5000)
        return self.get("query_range", query=expression, start=self.began, end=now, step=step)["result"]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        return {a["labels"]["alertname"] for a in self.get("alerts")["alerts"] if a["state"] == "firing"}


@contextmanager
def prometheus(folder: Path, discovery: Path, rules: dict[str, Any] | None = None) -> Iterator[Prometheus]:
    (port,) = free_ports(1)
    settings: dict[str, Any] = {
        "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": "1s"},
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]}
        ],
    }
    if rules is not None:
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))
        settings["rule_files"] = [str(folder / "rules.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    words = (
        f"--config.file={folder}/prometheus.yml --storage.tsdb.path={folder}/tsdb --web.listen-address=127.0.0.1:{port}"
    )
    answers = Prometheus(port)
    with http_server(["prometheus", *words.split()], f"{answers.url}/-/ready", folder / "prometheus.log"):
        yield answers


def rules() -> dict[str, Any]:
    """The rule file of cluster/, as Prometheus takes it."""
    return yaml.safe_load((WATCHING / "alerts.yaml").read_text())["spec"]
