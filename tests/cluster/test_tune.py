"""Four trials of a small quickstart at once on one machine; one is killed, and the search is submitted again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.clusters import ROOT, Head, head
from ultralong_ray.recipe import load_recipe
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import StageDirectory
from ultralong_ray.train.events import read_events
from ultralong_ray.tune.trials import plan_trials

pytestmark = pytest.mark.slow

SECTION = """
[tune]
stop_early = false
trials_at_once = 4

[tune.search]
"pretrain.learning_rate" = [1e-4, 4e-4]
"pretrain.mask_documents" = [false, true]
"""
SMALL = [
    *("--model.base", str(ROOT / "jobs/models/tiny-512")),  # the driver is no job with a working directory
    *("--evaluate", "null", "--cluster.num_workers", "1", "--cluster.max_failures", "0"),
    *("--prepare.sequence_length", "512", "--prepare.token_budget", "8192", "--prepare.holdout_sequences", "0"),
    *("--model.target_context_length", "512", "--corpus.sources.0.max_megabytes", "1", "--pretrain.steps", "120"),
    *("--pretrain.global_batch_sequences", "1", "--pretrain.sequence_parallel_degree", "1", "--sft", "null"),
    *("--pretrain.checkpoint_every_steps", "10"),
]


@pytest.fixture
def cluster() -> Iterator[Head]:
    with head(6) as started:
        yield started


def start(cluster: Head, recipe: Path, workdir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/tune.py", str(recipe), "--workdir", str(workdir), *SMALL]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.gcs}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def processes(cluster: Head, title: bytes) -> list[Path]:
    """/proc folders of this cluster's workers that Ray has named after `title`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            named = (place / "cmdline").read_bytes().startswith(b"ray::" + title)
            if named and str(cluster.folder).encode() in (place / "environ").read_bytes():
                found.append(place)
        except OSError:
            continue
    return found


def kill_one_in_training(cluster: Head, stages: list[StageDirectory]) -> StageDirectory | None:
    """Kill the training process of a trial that has a checkpoint and is not through; the trial's stage."""
    for stage in stages:
        if stage.done or not any(event["event"] == "checkpoint" for event in read_events(stage.location)):
            continue
        for place in processes(cluster, b"RayTrainWorker"):
            if any(os.readlink(file).startswith(stage.location.path) for file in (place / "fd").iterdir()):
                os.kill(int(place.name), signal.SIGKILL)
                return stage
    return None


def test_a_killed_trial_is_resumed_and_the_table_completes(cluster: Head, tmp_path: Path) -> None:
    path, workdir = tmp_path / "recipe.toml", tmp_path / "work"
    path.write_text((ROOT / "jobs/recipes/quickstart.toml").read_text() + SECTION)
    recipe = load_recipe(str(path), ["--workdir", str(workdir), *SMALL])
    folder = stage_directory(recipe, "tune").location
    stages = [stage_directory(trial.recipe, "pretrain") for trial in plan_trials(recipe)]
    driver = start(cluster, path, workdir)
    killed, most = None, 0
    while killed is None or most < 4:
        assert driver.poll() is None, driver.communicate()[0][-6000:]
        most = max(most, len(processes(cluster, b"ImplicitFunc")))  # so Tune calls a trial
        killed = killed or kill_one_in_training(cluster, stages)
        time.sleep(0.1)
    output = driver.communicate(timeout=1200)[0]
    assert driver.returncode == 2 and "1 of 4 trials are not over; submit again" in output, output[-6000:]
    assert sorted(states(folder)) == ["done", "done", "done", "failed"]
    assert "Submitted again the run makes one more attempt from step " in output
    again = start(cluster, path, workdir)
    output = again.communicate(timeout=1200)[0]
    assert again.returncode == 0 and "4 trials, 3 of them over" in output, output[-6000:]
    assert states(folder) == ["done"] * 4
    rows = json.loads((folder / "tune.json").read_bytes())["trials"]
    assert all(row["steps"] == 120 and len(row["curve"]["loss"]) == 120 for row in rows)
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    resumed = {stage.fingerprint: stage.summary()["resumed_from_step"] for stage in stages}
    assert resumed.pop(killed.fingerprint) >= 10  # it went on from its checkpoint
    assert set(resumed.values()) == {0}


def states(folder: Any) -> list[str]:
    return [row["status"] for row in json.loads((folder / "tune.json").read_bytes())["trials"]]
