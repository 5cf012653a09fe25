"""Every alert rule under promtool: fires on its fault, is silent without it; and each has its page of what to do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.watch.servers import ROOT, WATCHING, rules
from ultralong_ray.watch.metrics import METRICS, table

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (apt-get install prometheus)")
RULES = {rule["alert"]: rule for rule in rules()["groups"][0]["rules"]}
STAGE = '{SessionName="s",stage="pretrain",WorkerId="w"}'
OTHER = '{SessionName="s",stage="pretrain",WorkerId="v"}'
NODE = '{SessionName="s",ip="10.0.0.1"}'
GPU = '{SessionName="s",ip="10.0.0.1",GpuIndex="%d"}'
TRAIN = "ray_ultralong_train_"
NOT_FINITE = 'ray_ultralong_train_failures_total{SessionName="s",stage="pretrain",kind="NotFinite",JobId="%d"}'
LOST = 'ray_ultralong_train_failures_total{SessionName="s",stage="pretrain",kind="RayActorError"}'
RUNNING = {
    f"{TRAIN}step{STAGE}": "5x200",
    f"{TRAIN}planned_steps{STAGE}": "9x200",
    f"{TRAIN}step_seconds{STAGE}": "60x200",
}
PLANNED = f'{TRAIN}planned_memory_gib{{SessionName="s",stage="pretrain",place="device"}}'
HELD = f'{TRAIN}memory_gib{{SessionName="s",stage="pretrain",place="device",rank="%d"}}'

# Alert, what is scraped each minute from time 0 (Prometheus' own shorthand), minute of the look, whether it fires.
CASES: list[tuple[str, dict[str, str], int, bool]] = [
    ("UltralongNoProgress", {**RUNNING, f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200"}, 13, True),
    ("UltralongNoProgress", {**RUNNING, f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200"}, 9, False),
    ("UltralongNoProgress", {**RUNNING, f"{TRAIN}step_timestamp_seconds{STAGE}": "0+60x200"}, 60, False),
    # ten steps of ten minutes
    (
        "UltralongNoProgress",
        {**RUNNING, f"{TRAIN}step_seconds{STAGE}": "600x200", f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200"},
        95,
        False,
    ),
    # the process is gone, with all it said
    (
        "UltralongNoProgress",
        {k: v.replace("x200", "x3") for k, v in {**RUNNING, f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200"}.items()},
        20,
        True,
    ),
    # gone, because it was done
    (
        "UltralongNoProgress",
        {
            f"{TRAIN}step{STAGE}": "9x3",
            f"{TRAIN}planned_steps{STAGE}": "9x3",
            f"{TRAIN}step_seconds{STAGE}": "60x3",
            f"{TRAIN}step_timestamp_seconds{STAGE}": "0x3",
        },
        20,
        False,
    ),
    # before the first step
    (
        "UltralongNoProgress",
        {f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200", f"{TRAIN}planned_steps{STAGE}": "9x200"},
        25,
        False,
    ),
    (
        "UltralongNoProgress",
        {f"{TRAIN}step_timestamp_seconds{STAGE}": "0x200", f"{TRAIN}planned_steps{STAGE}": "9x200"},
        33,
        True,
    ),
    ("UltralongNotFinite", {NOT_FINITE % 1: "_x4 1x100"}, 6, True),
    ("UltralongNotFinite", {NOT_FINITE % 1: "_x4 1x100"}, 25, False),  # for a quarter of an hour
    ("UltralongNotFinite", {NOT_FINITE % 1: "1x100", NOT_FINITE % 2: "_x49 1x50"}, 51, True),  # a second time
    ("UltralongNotFinite", {LOST: "_x4 1x100"}, 6, False),
    ("UltralongTrainingFailed", {LOST: "_x4 1x100"}, 6, True),
    ("UltralongTrainingFailed", {NOT_FINITE % 1: "_x4 1x100"}, 6, False),
    ("UltralongLossSpike", {f"{TRAIN}loss_nats{STAGE}": "2x30 3x10"}, 34, True),
    ("UltralongLossSpike", {f"{TRAIN}loss_nats{STAGE}": "2x30 2.5x10"}, 34, False),
    ("UltralongLossSpike", {f"{TRAIN}loss_nats{STAGE}": "9x30 2x10"}, 34, False),  # it falls
    ("UltralongCheckpointOld", {f"{TRAIN}checkpoint_timestamp_seconds{STAGE}": "0x200"}, 123, True),
    ("UltralongCheckpointOld", {f"{TRAIN}checkpoint_timestamp_seconds{STAGE}": "0x60 3600x140"}, 123, False),
    ("UltralongRestarting", {f"{TRAIN}restarts{STAGE}": "0x10", f"{TRAIN}restarts{OTHER}": "_x11 3x20"}, 20, True),
    ("UltralongRestarting", {f"{TRAIN}restarts{STAGE}": "7x200"}, 100, False),  # long ago
    ("UltralongMemoryAbovePlan", {PLANNED: "60x10", HELD % 0: "50x10", HELD % 1: "70x10"}, 5, True),
    ("UltralongMemoryAbovePlan", {PLANNED: "60x10", HELD % 0: "50x10", HELD % 1: "62x10"}, 5, False),
    ("UltralongGpuIdle", {f"ray_node_gpus_utilization{GPU % i}": "0x60" for i in range(8)}, 16, True),
    ("UltralongGpuIdle", {f"ray_node_gpus_utilization{GPU % i}": "0x60" for i in range(8)}, 14, False),
    (
        "UltralongGpuIdle",
        {f"ray_node_gpus_utilization{GPU % i}": "100x60" if i == 0 else "0x60" for i in range(8)},
        20,
        False,  # one of eight works
    ),
    ("UltralongDiskFilling", {f"ray_node_disk_utilization_percentage{NODE}": "90x10"}, 5, True),
    ("UltralongDiskFilling", {f"ray_node_disk_utilization_percentage{NODE}": "80x10"}, 5, False),
    (
        "UltralongDiskFilling",
        {f"ray_node_disk_utilization_percentage{NODE}": "60x60", f"ray_node_disk_free{NODE}": "1000-5x60"},
        40,
        True,  # full in less than three hours
    ),
    (
        "UltralongDiskFilling",
        {f"ray_node_disk_utilization_percentage{NODE}": "60x60", f"ray_node_disk_free{NODE}": "10000-5x60"},
        40,
        False,
    ),
]


def outcome(tmp: Path, cases: list[tuple[str, dict[str, str], int, bool]], spec: dict[str, Any]) -> str:
    """What promtool says to these cases; empty when all are right."""
    (tmp / "rules.yml").write_text(yaml.safe_dump(spec))
    tests = []
    for alert, series, minute, fires in cases:
        query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) or vector(0)'
        tests.append(
            {
                "name": f"{alert} at minute {minute}",
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [
                    {"expr": query, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": int(fires)}]}
                ],
            }
        )
    document = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp / "tests.yml").write_text(yaml.safe_dump(document))
    done = subprocess.run(["promtool", "test", "rules", str(tmp / "tests.yml")], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@needs_promtool
def test_every_alert_fires_on_its_fault_and_only_then(tmp_path: Path) -> None:
    assert outcome(tmp_path, CASES, rules()) == ""


def test_every_alert_has_both_cases() -> None:
    assert {(alert, fires) for alert, _, _, fires in CASES} == {
        (alert, fires) for alert in RULES for fires in (True, False)
    }


@needs_promtool
def test_a_rule_that_never_fires_would_be_noticed(tmp_path: Path) -> None:
    broken = rules()
    for rule in broken["groups"][0]["rules"]:
        rule["expr"] = f"({rule['expr']}) and on() vector(0) == 1"
    said = outcome(tmp_path, CASES, broken)
    assert [alert for alert in RULES if f"{alert} at minute" not in said and alert not in said] == []


@pytest.mark.parametrize("alert", RULES)
def test_every_alert_has_its_page(alert: str) -> None:
    page, _, anchor = RULES[alert]["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^## (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor == alert.lower() and alert in headings


def test_rules_and_dashboards_use_metrics_that_exist() -> None:
    known = {metric.exported for metric in METRICS}
    texts = [rule["expr"] for rule in RULES.values()]
    for file in (WATCHING / "dashboards").glob("*.json"):
        texts += [target["expr"] for panel in json.loads(file.read_text())["panels"] for target in panel["targets"]]
    used = {name for text in texts for name in re.findall(r"\bray_ultralong_\w+\b", text) if not name.endswith("_")}
    assert len(texts) > 40 and used <= known
    shown = known - used
    assert shown <= {
        "ray_ultralong_train_checkpoint_step",
        "ray_ultralong_train_memory_gib",
        "ray_ultralong_train_planned_memory_gib",
    }


def test_the_page_of_metrics_is_the_table() -> None:
    assert table() in (ROOT / "cluster" / "METRICS.md").read_text()
