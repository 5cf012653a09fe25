"""What of ours runs inside Ray Train's controller: the account of every breakdown, and the choice of a world size.

Flows in: workers' failures as Ray Train polls them, and the resources that it may use. Flows out: `breakdown` and
`resize` events, and numbers of workers. Ray's elastic policy counts single workers; only some counts fill whole
sequence-parallel groups that share a batch evenly, so `LegalSizes` takes the largest of those. What is left over
stands by in the cluster: it holds no process and no shard, and is taken when it completes a larger legal size.

Read against Ray 2.60 (Ray Train V2): `ElasticScalingPolicy._count_possible_workers` is internal, and so are
`_initialize_and_run_controller`, which is handed the policy that Ray made, and `state`, which knows draining nodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import ray
from ray._private.state import state
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events, record_event
from ultralong_ray.train.failures import (
    BEGINNINGS,
    Event,
    accounts_since_last_breakdown,
    in_words,
    kind_of,
    last_committed_step,
    lost_rank_words,
    most_telling,
    refuse_to_go_on,
    taken_over,
)
from ultralong_ray.train.job import error_file
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)


class BreakdownRecorder(UserCallback):
    """Records every breakdown of the ranks with its most telling cause, and stops a run that fails again and again.

    Runs in the controller, once per breakdown. `sequences_of` gives the packed sequences of a step; `driver` is the
    submission's id.
    """

    def __init__(
        self, stage: Location, max_failures: int, sequences_of: Callable[[int], list[int]], driver: str
    ) -> None:
        self.stage, self.max_failures, self.sequences_of, self.driver = stage, max_failures, sequences_of, driver

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.record(worker_exceptions)

    def record(self, worker_exceptions: dict[int, Exception], driver_cause: str | None = None) -> None:
        """Append a `breakdown` event and log it; where it was one too many, tell ranks that start now to leave.

        `driver_cause` is what the driver saw, where there is no controller to tell.
        """
        try:
            events = read_events(self.stage)
            if (words := taken_over(events, self.driver)) is not None:
                raise UserError(words)  # what happens in the stage now is the other's
            steps = [record.step for record in read_metrics(self.stage)]
            event = breakdown(events, worker_exceptions, driver_cause, steps)
            if event["kind"] == "preempted" and events and events[-1]["event"] == "breakdown":
                return  # while a node is drained the controller sees its dead workers at every look
            record_event(self.stage, "breakdown", **event)
            logger.warning("training broke down in step %s: %s", event["step"], event["cause"])
            if not error_file(self.stage, self.driver).exists():
                refuse_to_go_on(read_events(self.stage), self.max_failures, self.sequences_of)
        except UserError as refusal:
            error_file(self.stage, self.driver).write_bytes(str(refusal).encode())
        except Exception:  # the restart matters more than its record
            logger.exception("a breakdown could not be recorded")


def breakdown(
    events: list[Event], worker_exceptions: dict[int, Exception], driver_cause: str | None, recorded_steps: list[int]
) -> Event:
    """The facts of a `breakdown` event; `recorded_steps` are those in metrics.jsonl."""
    begun = next((event for event in reversed(events) if event["event"] in BEGINNINGS), {})
    nodes = begun.get("nodes", [])
    accounts = accounts_since_last_breakdown(events)
    lost = sorted(
        rank for rank, error in worker_exceptions.items() if kind_of(error) in ("lost", "preempted", "memory")
    )
    if driver_cause is not None:
        accounts.append({"rank": None, "node": None, "kind": "lost", "cause": driver_cause})
    elif lost:
        rank, node, words = lost_rank_words(lost, nodes)
        error = worker_exceptions[lost[0]]
        cause = f"{words} died: {in_words(getattr(error, 'health_check_failure', error))}"
        accounts.append({"rank": rank, "node": node, "kind": kind_of(error), "cause": cause})
    for rank, error in sorted(worker_exceptions.items()):
        if rank not in lost:
            node = nodes[rank] if rank < len(nodes) else None
            accounts.append({"rank": rank, "node": node, "kind": kind_of(error), "cause": in_words(error)})
    told = most_telling(accounts) or {"rank": None, "node": None, "kind": "lost", "cause": "no account"}
    committed = last_committed_step(events)
    steps = [account["step"] for account in accounts if account.get("step") is not None]
    step = max(steps, default=max([committed, *recorded_steps]) + 1)
    facts = {key: told.get(key) for key in ("rank", "node", "kind", "cause")}
    return {**facts, "step": step, "steps_lost": max(0, step - 1 - committed)}


class LegalSizes(ElasticScalingPolicy):
    """Ray's elastic policy over `sizes` alone; a healthy run changes its size only just after a checkpoint."""

    def __init__(self, scaling_config: Any, sizes: tuple[int, ...], stage: Location) -> None:
        super().__init__(scaling_config)
        self.sizes, self.stage = sizes, stage

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        leaving = draining_nodes()  # Ray 2.60 counts these, but puts no new worker on them
        staying = {node: resources for node, resources in reserved_resources.items() if node not in leaving}
        possible = super()._count_possible_workers(staying)
        size = largest_legal(self.sizes, possible)
        if size < possible:
            logger.info("of %d possible workers %d take part: %d stand by", possible, size, possible - size)
        return size

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        reported = any(status.training_report for status in worker_group_status.worker_statuses.values())
        if not reported:
            self._maybe_send_resource_request()
            return NoopDecision()
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            facts = {"workers": worker_group_state.num_workers, "to": decision.num_workers}
            try:
                record_event(self.stage, "resize", **facts)
            except Exception:
                logger.exception("a change of the number of workers could not be recorded")
        return decision


def draining_nodes() -> set[str]:
    """Ids of the nodes that are announced to be taken away."""
    return set(state.get_draining_nodes() or {})


def placement_groups_of_job() -> set[str]:
    """Ids of the placement groups that this driver's job holds; the last four bytes of an id are the job's."""
    job_id = ray.get_runtime_context().get_job_id()
    table = placement_group_table()
    return {key for key, entry in table.items() if key.endswith(job_id) and entry["state"] != "REMOVED"}


def free_placement_groups(but: set[str]) -> None:
    """Remove the placement groups of this job but for those given, which ends the ranks in them.

    Ray keeps a group whose creator, a lost controller, is dead for as long as the job lives. Ray Train has a cleaner,
    which asks the dashboard and so needs one.
    """
    for key in placement_groups_of_job() - but:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(key))))


def largest_legal(sizes: tuple[int, ...], possible: int) -> int:
    """The largest of `sizes` that `possible` workers can make; 0 where there is none."""
    return max((size for size in sizes if size <= possible), default=0)


class ElasticTrainer(TorchTrainer):
    """Ray's trainer, whose elastic policy is `LegalSizes`. With a fixed number of workers nothing differs."""

    def __init__(self, *arguments: Any, sizes: tuple[int, ...], stage: Location, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sizes, self.stage = sizes, stage

    def _initialize_and_run_controller(self, **named: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            named["scaling_policy"] = LegalSizes(self.scaling_config, self.sizes, self.stage)
        return super()._initialize_and_run_controller(**named)
