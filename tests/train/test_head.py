"""The head's control service dies in mid-run and comes back with its state: training does not notice.

With GCS fault tolerance only; here the state lies in RocksDB (Ray 2.60), on Kubernetes in Redis (components/redis).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.train.made_jobs import write_inputs
from tests.train.small_cluster import SmallCluster, wait_for
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics


def test_training_goes_on_while_the_control_service_is_away(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(tmp_path / "gcs")}
    cluster = SmallCluster(head_cpus=2, env=storage)
    try:
        changes = {"steps": 200, "global_batch_sequences": 8, "checkpoint_every_steps": 1}
        changes |= {"sequence_parallel_degree": 2, "cluster": {"num_workers": 2, "max_failures": 0}}
        driver = cluster.start_driver(tmp_path, "head", changes)
        stage = Location.of(tmp_path / "head")
        wait_for(lambda: len(read_metrics(stage)) >= 2, 400, "step 2")
        head: Any = cluster.cluster.head_node
        head.kill_gcs_server()
        time.sleep(3)
        head.start_gcs_server()
        assert driver.wait(500) == 0, (tmp_path / "head.log").read_text()[-3000:]
        events = [event["event"] for event in read_events(stage)]
        assert events[:2] == ["submit", "start"] and events[-1] == "end" and "breakdown" not in events
        assert [record.step for record in read_metrics(stage)] == list(range(1, 201))
    finally:
        cluster.close()
