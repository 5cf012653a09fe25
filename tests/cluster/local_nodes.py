"""The "cloud" of the test cluster's autoscaler: Ray 2.60's fake provider, whose nodes are processes of this machine.

Loaded inside Ray's monitor. Ray's nodes share one session folder here, so each gets a folder of its own for working
directories: a node that unpacks a job's package would otherwise replace it under the feet of the others.
"""

from __future__ import annotations

from functools import partial
from threading import Lock
from typing import Any
from unittest.mock import patch

import ray._private.parameter as parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

_creating = Lock()  # the patch below is the whole process's


class LocalNodes(FakeMultiNodeProvider):
    """Starts nodes one after the other, each with its own runtime environments."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        with _creating:
            folder = f"runtime_resources_{self._next_node_id + 1}"
            with patch.object(parameter, "RayParams", partial(parameter.RayParams, runtime_env_dir_name=folder)):
                super()._create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
