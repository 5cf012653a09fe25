"""A driver in a process of its own: the job of tests/train/made_jobs.py on a Ray that it starts. Arguments: folder,
stage, number of steps."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray

from tests.train.made_jobs import recipe
from ultralong_ray.storage import Location, StageDirectory
from ultralong_ray.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


def main(folder: str, name: str, steps: str) -> None:
    logging.basicConfig(level=logging.INFO)
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        _temp_dir=tempfile.mkdtemp(prefix="r-", dir="/tmp"),
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    where = Location.of(folder)
    fields: dict[str, Any] = {"steps": int(steps), "checkpoint_every_steps": 1000, "sequence_parallel_degree": 2}
    task = recipe(Path(folder), cluster={"num_workers": 2}, **fields)
    train(task, "pretrain", where / "packed", where / "model", StageDirectory("pretrain", name, where / name))


if __name__ == "__main__":
    main(*sys.argv[1:])
