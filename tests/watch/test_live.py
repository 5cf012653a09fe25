"""A real Prometheus on a small run of the quickstart: every panel has data, and provoked faults fire their alerts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.watch.servers import ROOT, WATCHING, Prometheus, prometheus, ray_head, rules
from ultralong_ray.watch.metrics import METRICS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus (apt-get install prometheus)"),
]

# Not in a run on CPUs that goes well: the plan's memory is known on GPUs, a failure needs a fault.
NOT_HERE = {"ray_ultralong_train_planned_memory_gib", "ray_ultralong_train_failures_total"}


def impatient() -> dict[str, Any]:
    """The rules, which wait seconds where the real ones wait minutes."""
    found = rules()
    for rule in found["groups"][0]["rules"]:
        rule.pop("for", None)
        rule["expr"] = rule["expr"].replace(", 600)", ", 6)")
    found["groups"][0]["interval"] = "1s"
    return found


FAKE = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKE0KEY0ID0TEST",
    "AWS_SECRET_ACCESS_KEY": "fake/secret/access/key/for/a/test/0000",
    "AWS_SESSION_TOKEN": "fake-session-token-for-a-test-0000",
    "HF_TOKEN": "hf_fakeTokenForATest0000000000000000",
    "OPENAI_API_KEY": "sk-fake-key-for-a-test-0000000000",
}


class Cluster:
    """Ray, Prometheus and a working directory."""

    def __init__(self, environment: dict[str, str], workdir: Path, answers: Prometheus) -> None:
        self.environment, self.workdir, self.prometheus = environment, workdir, answers
        self.secrets = {**FAKE, "RAY_AUTH_TOKEN": environment["RAY_AUTH_TOKEN"]}

    def start(self, stages: str, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.watch.small_run", str(self.workdir), stages, *overrides]
        output = (self.workdir.parent / "run.log").open("w")
        return subprocess.Popen(command, env=self.environment, cwd=ROOT, stdout=output, stderr=output, text=True)

    def run(self, stages: str, *overrides: str) -> int:
        return self.start(stages, *overrides).wait(timeout=900)

    @property
    def log(self) -> str:
        return (self.workdir.parent / "run.log").read_text()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """After a small run of the quickstart on it."""
    folder = Path(tempfile.mkdtemp(prefix="rw", dir="/tmp"))  # Ray's sockets want a short path
    (folder / "prometheus").mkdir()
    discovery = folder / "prom_metrics_service_discovery.json"
    try:
        server = prometheus(folder / "prometheus", discovery, impatient())
        with ray_head(folder, variables=FAKE) as environment, server as answers:
            made = Cluster(environment, folder / "work", answers)
            assert made.run("prepare,extend,pretrain,export,evaluate,report") == 0, made.log
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(cluster: Cluster, alert: str) -> None:
    """Wait until `alert` fires."""
    firing = cluster.prometheus.firing
    wait_for(lambda: alert in firing(), PATIENCE_SECONDS, alert, 0.5, said=lambda: cluster.log[-3000:])


@pytest.mark.parametrize("file", sorted((WATCHING / "dashboards").glob("*.json")), ids=lambda file: file.stem)
def test_every_query_of_every_panel_has_data(cluster: Cluster, file: Path) -> None:
    queries = [t["expr"] for panel in json.loads(file.read_text())["panels"] for t in panel["targets"]]
    assert queries
    assert [q for q in queries if not cluster.prometheus.over_the_run(q.replace("$session", ".*"))] == []


def test_every_metric_of_the_table_was_scraped_and_nothing_else(cluster: Cluster) -> None:
    names = {n for n in cluster.prometheus.get("label/__name__/values") if n.startswith("ray_ultralong_")}
    assert names == {metric.exported for metric in METRICS} - NOT_HERE


def test_the_numbers_are_those_of_the_run(cluster: Cluster) -> None:
    last = json.loads(next(cluster.workdir.glob("pretrain-*/metrics.jsonl")).read_text().splitlines()[-1])
    for field, metric in (("step", "step"), ("loss", "loss_nats"), ("tokens", "tokens")):
        (series,) = cluster.prometheus.over_the_run(f"ray_ultralong_train_{metric}")
        assert float(series["values"][-1][1]) == pytest.approx(last[field], rel=1e-5), metric
    (step,) = cluster.prometheus.over_the_run('max by (source) (ray_ultralong_train_step_part_seconds{part="gemm"})')
    assert step["metric"]["source"] == "measured" and float(step["values"][-1][1]) > 0
    (cells,) = cluster.prometheus.over_the_run("ray_ultralong_eval_cells")
    assert float(cells["values"][-1][1]) == 5  # two lengths, two depths, and a perplexity curve
    rows = cluster.prometheus.over_the_run('ray_ultralong_data_rows{work="packed"}')
    assert float(rows[0]["values"][-1][1]) == 16  # sequences


def test_a_good_run_fires_nothing(cluster: Cluster) -> None:
    fired = cluster.prometheus.over_the_run(
        'ALERTS{alertstate="firing",alertname!~"UltralongDiskFilling|UltralongLossSpike"}'
    )
    assert [series["metric"]["alertname"] for series in fired] == []


def test_a_loss_that_is_not_finite_fires(cluster: Cluster) -> None:
    assert cluster.run("pretrain", "--pretrain.learning_rate", "1e30", "--cluster.max_failures", "0") == 1
    assert "is not finite" in cluster.log
    until(cluster, "UltralongNotFinite")


def test_a_spike_and_then_no_progress_fire(cluster: Cluster) -> None:
    """The learning rate rises until the loss jumps; then one rank is frozen, and all wait for it."""
    rising = ["--pretrain.learning_rate", "10", "--pretrain.warmup_steps", "1000", "--pretrain.steps", "400"]
    driver = cluster.start("pretrain", *rising)
    try:
        until(cluster, "UltralongLossSpike")
        assert "UltralongNoProgress" not in cluster.prometheus.firing()
        workers = [p for p in psutil.process_iter(["name"]) if "RayTrainWorker" in (p.info["name"] or "")]
        ours = [p for p in workers if p.environ().get("RAY_AUTH_TOKEN") == cluster.environment["RAY_AUTH_TOKEN"]]
        ours[0].send_signal(signal.SIGSTOP)
        until(cluster, "UltralongNoProgress")
        ours[0].send_signal(signal.SIGKILL)
    finally:
        driver.send_signal(signal.SIGTERM)
        driver.wait(timeout=PATIENCE_SECONDS)


def test_the_disk_of_this_machine_is_what_prometheus_says(cluster: Cluster) -> None:
    (series,) = cluster.prometheus.over_the_run("ray_node_disk_utilization_percentage")
    disk = shutil.disk_usage(os.sep)
    assert float(series["values"][-1][1]) == pytest.approx(100 * disk.used / (disk.used + disk.free), abs=5)


def test_no_credential_is_written_anywhere(cluster: Cluster) -> None:
    """Last: all runs above had them in their environment. Logs, checkpoints, model, report, Ray's own files."""
    found, searched = [], 0
    for file in cluster.workdir.parent.rglob("*"):
        if not file.is_file() or file.is_symlink():
            continue
        data = file.read_bytes()
        searched += 1
        found += [f"{name} in {file}" for name, secret in cluster.secrets.items() if secret.encode() in data]
    assert found == []
    places = {"checkpoint": "work/pretrain-*/checkpoints/*/manifest.json", "report": "work/report-*/report.html"}
    places |= {"model": "work/export-*/**/model.safetensors", "log": "session_*/logs/*.out", "driver": "run.log"}
    assert [name for name, place in places.items() if not list(cluster.workdir.parent.glob(place))] == []
    assert searched > 50
