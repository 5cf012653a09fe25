"""Whether the head of a Ray cluster answers; and the wait until a cluster has the nodes that a stage asks for.

Flows in: a recipe and a stage. Flows out: nothing, once the nodes are there; a UserError after cluster.wait_minutes, or
within a minute where no waiting can help. While it waits a placement group stands in for the stage, so that an
autoscaler brings all of its nodes or none; it is removed before the stage takes them.

Read against Ray 2.60. GetClusterStatus holds the nodes and the last answer of autoscaler v2 in one reply. A cluster
that was put together by hand (or by ray.init) has an autoscaler too, one that only watches: it answers alike.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from ultralong_ray.config import Recipe
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)
_PROTOCOL: Any = autoscaler_pb2  # its names are made when it is imported

NEVER_SECONDS = 30.0  # what looks impossible for so long is: an autoscaler has answered several times by then
QUIET_SECONDS = 2.0  # a wait shorter than this is not worth a line
REPEAT_SECONDS = 60.0  # the same line again, as a sign of life
POLL_SECONDS = 0.5
SHOWN = ("CPU", "GPU")
HEAD_SECONDS = 10.0  # for a head that starts again; ray.init alone would try for minutes before it says a word


def silent_head() -> str | None:
    """host:port of the cluster that ray.init would join, where nothing listens at it; else None.

    A head that was killed leaves its address behind on its machine, where only `ray stop` removes it. Raises what Ray
    does for an address that is none.
    """
    if "://" in os.environ.get("RAY_ADDRESS", ""):  # Ray Client, which asks a server of its own
        return None
    address = canonicalize_bootstrap_address(None)  # pyright: ignore[reportArgumentType]  # as ray.init calls it
    if address is None:  # ray.init starts a cluster of its own
        return None
    host, _, port = address.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_SECONDS):
                return None
        except OSError:
            if time.monotonic() - began >= HEAD_SECONDS:
                return address
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a stage cannot start without: `count` bundles of the same resources, on nodes that carry `label`."""

    stage: str
    count: int
    bundle: Mapping[str, float]
    label: Mapping[str, str]

    def __str__(self) -> str:
        labels = ", ".join(f"{key}={value}" for key, value in self.label.items())
        return f"{self.count} x {_resources(self.bundle)}" + (f" on nodes labelled {labels}" if labels else "")


@dataclass(frozen=True, slots=True)
class Node:
    """A node that lives. `group` is the autoscaler's name of its kind; "" where nobody but a person adds nodes."""

    group: str
    labels: Mapping[str, str]
    total: Mapping[str, float]
    available: Mapping[str, float]

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many bundles this node holds when nothing else runs on it."""
        return int(min(self.total.get(name, 0.0) / amount for name, amount in bundle.items()))

    def carries(self, label: Mapping[str, str]) -> bool:
        return all(self.labels.get(key) == value for key, value in label.items())

    @property
    def busy(self) -> bool:
        return any(self.available.get(name, 0.0) < self.total.get(name, 0.0) for name in SHOWN)


@dataclass(frozen=True, slots=True)
class View:
    """The cluster at a moment, as far as waiting is concerned."""

    nodes: tuple[Node, ...]
    starting: Mapping[str, int]  # group -> nodes that are on their way
    failures: tuple[str, ...]  # why nodes could not be started
    refused: bool  # the autoscaler says that it cannot bring nodes for this demand now

    @property
    def by_hand(self) -> bool:
        return not any(node.group for node in self.nodes)

    def __str__(self) -> str:
        kinds = Counter((node.group or "node", _resources(node.total), node.busy) for node in self.nodes)
        parts = [f"{count} x {group} {size}{' in use' * busy}" for (group, size, busy), count in kinds.items()]
        parts += [f"{count} x {group} starting" for group, count in self.starting.items()]
        return ", ".join([*parts, *self.failures]) or "no node"


def _resources(amounts: Mapping[str, float]) -> str:
    shown = [f"{name} {amounts[name]:g}" for name in SHOWN if amounts.get(name)]
    return "{" + ", ".join(shown) + "}"


def demand_of(recipe: Recipe, stage: str) -> Demand | None:
    """What `stage` must have before it starts; None where it runs in the driver alone.

    Training needs all of its workers at once, or the fewest that the recipe allows. Prepare and evaluate start with one
    worker and take more as they come.
    """
    cluster = recipe.cluster
    if stage in ("prepare", "prepare_sft"):
        return Demand(stage, 1, {"CPU": 1.0}, cluster.node_label("data"))
    if stage in ("pretrain", "sft"):
        bundle = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
        return Demand(stage, cluster.min_workers or cluster.num_workers, _asked(bundle), cluster.node_label("train"))
    if stage == "evaluate" and recipe.evaluate is not None:
        bundle = {"CPU": recipe.evaluate.cpus_per_task, "GPU": recipe.evaluate.gpus_per_task}
        return Demand(stage, 1, asked, cluster.node_label("eval")) if (asked := _asked(bundle)) else None
    return None


def _asked(bundle: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in bundle.items() if amount}


def why_never(demand: Demand, view: View) -> str | None:
    """Why waiting cannot help, as the cluster looks now; None where it may."""
    fitting = [node for node in view.nodes if node.carries(demand.label)]
    if sum(node.room(demand.bundle) for node in fitting) >= demand.count:
        return None  # others use the nodes
    if view.by_hand:
        return "nobody adds nodes to this cluster by itself: no autoscaler runs"
    if view.refused and not view.starting and not any(node.busy for node in fitting):
        return "the autoscaler has no group of nodes that could hold it within the group's limits"
    return None


def wait_for_nodes(recipe: Recipe, stage: str) -> None:
    """Return when the cluster can start `stage`; Ray must be initialised.

    Raises UserError when cluster.wait_minutes are over, and after half a minute when no waiting can help.
    """
    demand = demand_of(recipe, stage)
    if demand is None:
        return
    bundles, selectors = [dict(demand.bundle)] * demand.count, [dict(demand.label)] * demand.count
    group = placement_group(bundles, bundle_label_selector=selectors)
    try:
        _wait(group, demand, recipe.cluster.wait_minutes)
    finally:
        remove_placement_group(group)


def _wait(group: PlacementGroup, demand: Demand, limit_minutes: float) -> None:
    began = said = time.monotonic()
    possible, line, told = began, "", False
    while placement_group_table(group)["state"] != "CREATED":
        now, view = time.monotonic(), look(group)
        never = why_never(demand, view)
        possible = now if never is None else possible
        if never is not None and now - possible >= NEVER_SECONDS:
            why = f"and never will have it, seen after {now - began:.0f} s: {never}"
            raise UserError(_refusal(demand, view, why))
        if now - began >= 60 * limit_minutes:
            limit = f"after {limit_minutes:g} minutes (cluster.wait_minutes); submit again to wait on"
            raise UserError(_refusal(demand, view, limit))
        fresh = f"{demand.stage} waits for {demand}; the cluster has {view}"
        if now - began >= QUIET_SECONDS and (fresh != line or now - said >= REPEAT_SECONDS):
            log.info("%s; %.0f s of at most %.0f", fresh, now - began, 60 * limit_minutes)
            said, line, told = now, fresh, True
        time.sleep(POLL_SECONDS)
    if told:
        log.info("%s has its nodes after %.0f s", demand.stage, time.monotonic() - began)


def _refusal(demand: Demand, view: View, why: str) -> str:
    return (
        f"{demand.stage} needs {demand}. The cluster does not have it {why}. It has {view}. "
        f"Add nodes or raise the limits of their group, or ask for less: [cluster] of the recipe"
    )


def room_for(recipe: Recipe, stage: str) -> int:
    """How many times the nodes that are there now could hold `stage` at once."""
    demand = demand_of(recipe, stage)
    if demand is None:
        return 1
    return sum(node.room(demand.bundle) for node in look().nodes if node.carries(demand.label)) // demand.count


def look(group: PlacementGroup | None = None) -> View:
    """Nodes, what is starting, and whether the autoscaler has given up on `group`."""
    name = "no group" if group is None else group.id.hex()
    reply = _PROTOCOL.GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    scaling: Any = reply.autoscaling_state
    starting = Counter[str]()
    for request in scaling.pending_instance_requests:
        starting[request.ray_node_type_name] += request.count
    starting.update(instance.ray_node_type_name for instance in scaling.pending_instances)
    failed = [(launch.ray_node_type_name, launch.reason) for launch in scaling.failed_instance_requests]
    alive = [node for node in reply.cluster_resource_state.node_states if node.status != _PROTOCOL.DEAD]
    return View(
        tuple(
            Node(node.ray_node_type_name, dict(node.labels), dict(node.total_resources), dict(node.available_resources))
            for node in alive
        ),
        starting,
        tuple(f"{kind} could not be started: {reason}" for kind, reason in failed),
        any(name in request.details for request in scaling.infeasible_gang_resource_requests),
    )
