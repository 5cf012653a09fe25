"""A training driver in a process of its own, as a submitted job is: `python small_driver.py ADDRESS FOLDER STAGE ...`.

Joins the Ray cluster at ADDRESS and trains the job of made_jobs below FOLDER in stage directory STAGE, with changes of
its recipe as JSON in the last argument: {"cluster": {...}, "env": {...} for the workers, "fault": {...} or "gate": path
(faults.py), pretrain fields}.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(address: str, folder: str, stage: str, changes: str) -> None:
    import ray

    from tests.train import faults
    from tests.train.made_jobs import recipe
    from ultralong_ray.storage import Location, StageDirectory
    from ultralong_ray.train import trainer
    from ultralong_ray.types import UserError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    fields = json.loads(changes)
    # RAY_ADDRESS: with several clusters on a machine, what frees a dead controller's workers asks for it (Ray 2.60)
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": address}
    env |= fields.pop("env", {})
    # without its own address a driver joins the head wherever it sees the head's processes, as it does from a namespace
    node = os.environ.get("NODE_ADDRESS")
    ray.init(address, logging_level=logging.WARNING, runtime_env={"env_vars": env}, _node_ip_address=node)
    where = Location.of(folder)
    if fault := fields.pop("fault", None):
        trainer._worker = partial(faults.rank, fault)
    if gate := fields.pop("gate", None):
        trainer._worker = partial(faults.gated_rank, gate)
    try:
        made = recipe(Path(folder), **fields)
        trainer.train(
            made, "pretrain", where / "packed", where / "model", StageDirectory("pretrain", stage, where / stage)
        )
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(*sys.argv[1:])
