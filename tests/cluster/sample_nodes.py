"""Writes the worker nodes of a cluster, a JSON line every half second until it is ended: HOST:PORT in, lines out.

{"time": seconds since 1970, "nodes": {id: {"group": ..., "idle_seconds": ...}}}
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2

_PROTOCOL: Any = autoscaler_pb2  # its names are made when it is imported

if __name__ == "__main__":
    client = GcsClient(sys.argv[1])
    while True:
        reply = _PROTOCOL.GetClusterStatusReply()
        reply.ParseFromString(client.get_cluster_status(timeout_s=30))
        nodes = {
            node.node_id.hex()[-8:]: {"group": node.ray_node_type_name, "idle_seconds": node.idle_duration_ms / 1000}
            for node in reply.cluster_resource_state.node_states
            if node.status != _PROTOCOL.DEAD and node.ray_node_type_name != "ray.head.default"
        }
        print(json.dumps({"time": time.time(), "nodes": nodes}), flush=True)
        time.sleep(0.5)
