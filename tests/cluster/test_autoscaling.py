"""The pipeline on a head without workers: Ray's own autoscaler v2 brings each stage its nodes and takes them back.

The groups and labels mirror cluster/base/raycluster.yaml; a node is a few processes of this machine.
With ULTRALONG_RECORD=FILE the timeline is written there.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import ROOT, Group, Head, head, tool

pytestmark = pytest.mark.slow

QUICKSTART = "jobs/recipes/quickstart.toml"
GROUPS = (
    Group("data", 2, 1, 60.0, {"ultralong-group": "data", "ray-subcluster": "data"}),
    Group("train", 2, 1, 90.0, {"ultralong-group": "train"}),
    Group("eval", 2, 1, 60.0, {"ultralong-group": "eval"}),
)
GROUP_OF_STAGE = {"prepare": "data", "pretrain": "train", "evaluate": "eval"}
SLACK_SECONDS = 15.0  # an idle node is seen, drained and ended; on a busy machine that takes a while
SMALL = [
    *("--sft", "null", "--cluster.node_groups", "true", "--cluster.evaluation_workers", "2"),
    *("--prepare.sequence_length", "1024", "--prepare.token_budget", "8192", "--prepare.holdout_sequences", "0"),
    *("--corpus.sources.0.max_megabytes", "1", "--pretrain.global_batch_sequences", "4"),
    *("--pretrain.micro_batch_sequences", "2", "--evaluate.context_lengths", "[256]"),
    *("--evaluate.depths_percent", "[0, 50]", "--evaluate.samples_per_cell", "1"),
    *("--evaluate.models", '["pretrained"]'),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(0, GROUPS) as started:
        yield started


def submit(cluster: Head, job: str, workdir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [tool("ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"]
    command += ["python", f"jobs/{job}.py", QUICKSTART, "--workdir", str(workdir), *SMALL, *overrides]
    return cluster.run(*command, timeout=2400)


def timeline(samples: list[dict[str, Any]], output: str, began: float) -> dict[str, Any]:
    """When stages ran and nodes were there, in seconds since `began`."""
    nodes: dict[str, dict[str, Any]] = {}
    for sample in samples:
        for name, found in sample["nodes"].items():
            at = round(sample["time"] - began, 1)
            node = nodes.setdefault(name, {"group": found["group"], "joined": at, "longest_idle": 0.0})
            node["left"] = at
            node["longest_idle"] = round(max(node["longest_idle"], found["idle_seconds"]), 1)
    started = [(stage, _seconds(clock, began)) for clock, stage in re.findall(r"(\S+) \[\d/\d\] (\w+): start", output)]
    ends = [at for _, at in started[1:]] + [round(samples[-1]["time"] - began, 1)]
    stages = [{"stage": stage, "from": at, "to": end} for (stage, at), end in zip(started, ends, strict=True)]
    return {"stages": stages, "nodes": list(nodes.values())}


def _seconds(clock: str, began: float) -> float:
    """`clock`: HH:MM:SS of the day on which the run began, or of the next."""
    day = datetime.fromtimestamp(began)
    at = datetime.strptime(clock, "%H:%M:%S").replace(year=day.year, month=day.month, day=day.day).timestamp()
    return round(at - began + (86400 if at < began - 60 else 0), 1)


def record(run: dict[str, Any]) -> None:
    if target := os.environ.get("ULTRALONG_RECORD"):
        what = "Pipeline submitted to a head without workers; autoscaler v2 over processes of one machine"
        limits = {group.name: group.idle_seconds for group in GROUPS}
        where = f"{os.cpu_count()} cores shared with other work, Python {platform.python_version()}, Ray 2.60.0"
        content = {"what": what, "where": where, "unit": "seconds", "idle_timeout": limits, **run}
        Path(target).write_text(json.dumps(content, indent=1) + "\n")


def test_nodes_come_for_their_stage_and_go(cluster: Head, tmp_path: Path) -> None:
    lines = tmp_path / "samples.jsonl"
    sampler = subprocess.Popen(
        [sys.executable, ROOT / "tests/cluster/sample_nodes.py", cluster.gcs],
        env=cluster.environment,
        stdout=lines.open("wb"),
    )
    try:
        began = time.time()
        done = submit(cluster, "pipeline", tmp_path / "work")
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and _last(lines)["nodes"]:
            time.sleep(1)
    finally:
        sampler.terminate()
        sampler.wait()
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    run = timeline(samples, done.stdout, began)
    record(run)
    assert samples[0]["nodes"] == {} and samples[-1]["nodes"] == {}
    spans = {stage["stage"]: (stage["from"], stage["to"]) for stage in run["stages"]}
    for stage, group in GROUP_OF_STAGE.items():
        of_group = [node for node in run["nodes"] if node["group"] == group]
        assert of_group, f"no {group} node came for {stage}"
        assert all(spans[stage][0] <= node["joined"] <= spans[stage][1] for node in of_group), (stage, run)
    assert sum(node["group"] == "train" for node in run["nodes"]) == 2  # both, once, and together
    limits = {group.name: group.idle_seconds + SLACK_SECONDS for group in GROUPS}
    assert all(node["longest_idle"] <= limits[node["group"]] for node in run["nodes"]), run
    _refused_within_a_minute(cluster, tmp_path / "work")


def _last(lines: Path) -> dict[str, Any]:
    return json.loads([line for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")][-1])


def _refused_within_a_minute(cluster: Head, workdir: Path) -> None:
    """Three training nodes where the group has two: the inputs are the pipeline's."""
    more = ["--cluster.num_workers", "3", "--pretrain.global_batch_sequences", "3", "--pretrain.micro_batch_sequences"]
    more += ["1", "--pretrain.sequence_parallel_degree", "1"]
    refused = submit(cluster, "pretrain", workdir, *more)
    output = refused.stdout + refused.stderr
    assert refused.returncode != 0
    assert "pretrain needs 3 x {CPU 1} on nodes labelled ultralong-group=train" in output
    seen = re.search(r"never will have it, seen after (\d+) s: the autoscaler has no group of nodes", output)
    assert seen is not None and int(seen[1]) <= 60, output
    assert "Traceback" not in output
