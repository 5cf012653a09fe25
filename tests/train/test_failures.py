"""Kinds of failures, when a run is stopped, what a breakdown and a hang are blamed on, and sizes that are legal."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError
from ray.exceptions import OutOfMemoryError as RayOutOfMemoryError
from ray.train import ScalingConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from tests.train.made_jobs import ARCHITECTURE, recipe
from ultralong_ray.flops import ModelShape
from ultralong_ray.storage import Location
from ultralong_ray.train import controller, watchdog
from ultralong_ray.train.bad_steps import SpikeWatch, refuse_broken, refuse_spike
from ultralong_ray.train.batches import accumulation_steps
from ultralong_ray.train.checkpoint_files import MANIFEST_FILE
from ultralong_ray.train.controller import BreakdownRecorder, LegalSizes, breakdown, largest_legal
from ultralong_ray.train.elastic import plans_by_size
from ultralong_ray.train.events import read_events, record_event
from ultralong_ray.train.failures import (
    Superseded,
    accounts_since_last_breakdown,
    breakdowns_in_a_row,
    in_words,
    kind_of,
    memory_words,
    refuse_superseded,
    refuse_to_go_on,
    taken_over,
)
from ultralong_ray.train.job import error_file
from ultralong_ray.train.order import sequences_of_step
from ultralong_ray.train.status import restarts_of
from ultralong_ray.train.watchdog import Account, describe_frame, verdict
from ultralong_ray.types import UserError

SEQUENCES = partial(sequences_of_step, global_batch=2, num_sequences=100, seed=1)


def event(name: str, **facts: Any) -> dict[str, Any]:
    return {"time": 0.0, "event": name, **facts}


def broke(step: int, kind: str = "error", cause: str = "ValueError: x") -> dict[str, Any]:
    return event("breakdown", rank=1, node="n1", step=step, kind=kind, cause=cause, steps_lost=0)


def died() -> Exception:
    return WorkerHealthCheckFailedError("no health", ActorDiedError())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "memory"),
        (WorkerHealthCheckFailedError("x", RayOutOfMemoryError("node running low on memory")), "memory"),
        (died(), "lost"),
        (UserError("no space left"), "user"),
        (RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), "collective"),
        (torch.distributed.DistBackendError("NCCL error: unhandled system error"), "collective"),
        (RuntimeError("shape '[2]' is invalid"), "error"),
        (ValueError("connection reset"), "error"),
    ],
)
def test_kinds(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind


def test_the_words_of_an_error_are_its_first_line_that_says_something() -> None:
    assert in_words(ValueError("\n  \nbad value\nmore")) == "ValueError: bad value"
    assert in_words(ValueError()) == "ValueError: "


def test_the_run_is_stopped_after_failures_without_a_checkpoint_and_names_the_sequences() -> None:
    events = [event("submit"), event("start"), broke(3), event("start"), broke(3)]
    refuse_to_go_on(events, 2, SEQUENCES)
    events += [event("start"), broke(3)]
    with pytest.raises(
        UserError, match=r"step 3 failed 3 times in a row.*sequences \[4, 5\].*rank 1 on n1: ValueError"
    ):
        refuse_to_go_on(events, 2, SEQUENCES)
    refuse_to_go_on(events, -1, SEQUENCES)
    refuse_to_go_on([*events, event("checkpoint", step=3), broke(4)], 2, SEQUENCES)
    events[4] = broke(2)
    with pytest.raises(UserError, match=r"steps \[3, 2, 3\] failed"):
        refuse_to_go_on(events, 2, SEQUENCES)


def test_a_new_submission_has_one_attempt_and_no_more() -> None:
    events = [event("start"), broke(3), broke(3), broke(3), event("stop"), event("submit")]
    refuse_to_go_on(events, 2, SEQUENCES)
    with pytest.raises(UserError, match="step 3 failed 4 times"):
        refuse_to_go_on([*events, event("resume", step=2), broke(3)], 2, SEQUENCES)


def test_lack_of_memory_is_retried_once_whatever_max_failures_says_and_preemption_does_not_count() -> None:
    refuse_to_go_on([broke(1, "memory")], -1, SEQUENCES)
    with pytest.raises(UserError, match="keep_attention_rows = 0"):
        refuse_to_go_on([broke(1, "memory"), broke(1, "memory")], -1, SEQUENCES)
    assert breakdowns_in_a_row([broke(1, "preempted")] * 9 + [broke(2)]) == [broke(2)]
    assert breakdowns_in_a_row([broke(1, "user")]) == []


def test_the_peak_stands_beside_the_plan() -> None:
    plan = {"prediction": {"device_gib": 70.25, "host_rank_gib": 40.0}}
    assert "peak 79.1 GiB; the plan has 70.2 GiB" in memory_words(plan, 79.1)
    assert "predicted nothing" in memory_words({"prediction": None}, 1.0)


def test_a_dead_rank_is_told_before_its_partners_broken_collective() -> None:
    nodes = ["a", "b", "b"]
    accounts = [event("failure", rank=0, node="a", step=7, kind="collective", cause="RuntimeError: gloo")]
    events = [event("start", nodes=nodes), event("checkpoint", step=4), *accounts]
    found = breakdown(events, {0: RuntimeError("gloo"), 1: died(), 2: died()}, None, [5, 6])
    assert (found["rank"], found["node"], found["kind"]) == (1, "b", "lost")
    assert (found["step"], found["steps_lost"]) == (7, 2)
    assert found["cause"].startswith("ranks [1, 2] of b died: ActorDiedError")
    alone = breakdown(events, {0: RuntimeError("gloo broke")}, None, [])
    assert (alone["rank"], alone["kind"]) == (0, "collective")
    told = [*events, event("failure", rank=2, node="b", step=7, kind="hung", cause="hung: rank 2")]
    assert breakdown(told, {1: died()}, None, [])["cause"] == "hung: rank 2"
    controller = breakdown([event("start", nodes=nodes)], {}, "Ray Train's controller died", [1, 2])
    assert (controller["rank"], controller["step"], controller["steps_lost"]) == (None, 3, 2)


def test_the_recorder_tells_ranks_to_leave_when_a_breakdown_was_one_too_many(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    recorder = BreakdownRecorder(stage, 1, SEQUENCES, "mine")
    for attempt in range(2):
        assert not error_file(stage, "mine").exists()
        record_event(stage, "start", nodes=["a", "b"], attempt=str(attempt))
        record_event(stage, "failure", rank=1, node="b", step=6, kind="error", cause="ValueError: odd token")
        recorder.after_exception(None, {1: ValueError("odd token")})
    assert "sequences [10, 11]" in error_file(stage, "mine").read_bytes().decode()
    assert "odd token" in error_file(stage, "mine").read_bytes().decode()
    assert [found["event"] for found in read_events(stage)] == ["start", "failure", "breakdown"] * 2
    assert accounts_since_last_breakdown(read_events(stage)) == []


def two_submissions() -> list[dict[str, Any]]:
    """Events of two that train one stage: the later has begun, then the earlier began again."""
    events = [event("submit", driver="a"), event("start", driver="a", attempt="a1"), event("submit", driver="b")]
    return [*events, *(event("resume", driver=each, attempt=f"{each}2", step=2) for each in "ba")]


def test_of_two_submissions_that_train_one_stage_the_earlier_is_refused_and_the_later_goes_on() -> None:
    events = two_submissions()
    refuse_superseded(events[:3], "a1", "a")  # the other waits for its workers
    for attempt in ("a1", "a2"):
        with pytest.raises(UserError, match=r"another submission trains this stage since 1970-01-01 00:00:00 UTC"):
            refuse_superseded(events, attempt, "a")
    refuse_superseded(events, "b2", "b")
    assert taken_over(events, "b") is None and taken_over(events, "preflight") is None
    with pytest.raises(Superseded):  # by an attempt of its own submission
        refuse_superseded([*events, event("resume", driver="b", attempt="b3", step=2)], "b2", "b")


def test_a_refused_submission_is_told_in_its_own_file_and_leaves_the_account_to_the_other(tmp_path: Path) -> None:
    stage = Location.of(tmp_path)
    for found in two_submissions():
        record_event(stage, found.pop("event"), **{key: value for key, value in found.items() if key != "time"})
    before = read_events(stage)
    BreakdownRecorder(stage, -1, SEQUENCES, "a").after_exception(None, {0: RuntimeError("gloo")})
    assert "another submission trains" in error_file(stage, "a").read_bytes().decode()
    assert read_events(stage) == before and not error_file(stage, "b").exists()
    BreakdownRecorder(stage, -1, SEQUENCES, "b").after_exception(None, {0: RuntimeError("gloo")})
    assert read_events(stage)[-1]["event"] == "breakdown" and not error_file(stage, "b").exists()


def test_a_rank_that_was_cut_off_does_not_speak_for_the_next_attempt() -> None:
    late = event("failure", rank=1, node="b", attempt="old", kind="hung", cause="hung", step=3)
    mine = event("failure", rank=0, node="a", attempt="new", kind="error", cause="ValueError", step=5)
    begun = [event("start", attempt="old"), event("breakdown"), event("resume", attempt="new", step=2)]
    assert accounts_since_last_breakdown([*begun, late, mine]) == [mine]
    assert accounts_since_last_breakdown([*begun, {**mine, "attempt": None}]) == [{**mine, "attempt": None}]


def test_restarts_tell_cause_steps_and_nodes_that_left_and_came() -> None:
    layout = {"world_size": 2}
    lost = {**broke(9, "lost", "ranks [1] of b died"), "rank": 1, "node": "b", "steps_lost": 3}
    late = event("failure", rank=0, node="a", step=9, kind="error", cause="AssertionError: torn down")
    events = [event("start", nodes=["a", "b"], layout=layout), lost, late]
    events += [event("resume", step=5, nodes=["a", "c"], layout={"world_size": 4}), event("checkpoint", step=5)]
    events += [event("resize", workers=4, to=6), event("resume", step=5, nodes=["a", "c"], layout={"world_size": 6})]
    first, second = restarts_of(events)
    assert "rank 1 on b: ranks [1] of b died; 3 steps done again; left: b; came: c; 2 workers, now 4" in first
    assert second.endswith("from step 5: 4 workers became 6; 4 workers, now 6")


def account(rank: int, node: str, waits: bool, place: str = "x.py:1 f", unreachable: tuple[str, ...] = ()) -> Account:
    return Account(rank, node, 5, "the step", 61.0, place, waits, unreachable)


def test_a_hang_is_blamed_on_the_rank_that_waits_for_nobody() -> None:
    accounts = {r: account(r, "ab"[r // 2], r != 2, "data/rows.py:7 read" if r == 2 else "c10d") for r in range(4)}
    rank, node, cause = verdict(["a", "a", "b", "b"], accounts)
    assert (rank, node) == (2, "b")
    assert "no progress for 61 s in the step (step 5)" in cause and "rank 2 stands at data/rows.py:7 read" in cause


def test_a_hang_is_blamed_on_the_rank_that_is_silent_or_the_node_that_cannot_be_reached() -> None:
    waiting = {r: account(r, "a", True) for r in (0, 1)}
    rank, node, cause = verdict(["a", "a", "b", "b"], waiting)
    assert (rank, node) == (2, "b") and "gives no sign though its host answers" in cause and "[2, 3]" in cause
    apart = {r: account(r, "a", True, unreachable=("b",)) for r in (0, 1)}
    rank, node, cause = verdict(["a", "a", "b", "b"], apart)
    assert (rank, node) == (2, "b") and "b takes no connection from a" in cause
    both = {0: account(0, "a", True, unreachable=("b",)), 1: account(1, "b", True, unreachable=("a",))}
    rank, _, cause = verdict(["a", "b"], both)
    assert "no connection from a to b; from b to a: the link is down" in cause
    assert verdict(["a"], {0: account(0, "a", False)})[0] == 0
    alike = {r: account(r, "a", True) for r in (0, 1)}
    assert verdict(["a", "a"], alike)[0] is None


def test_a_frame_in_a_collective_waits() -> None:
    here = sys._getframe()
    assert describe_frame(here)[1] is False and "test_failures.py" in describe_frame(here)[0]
    code = SimpleNamespace(co_filename="/lib/torch/distributed/distributed_c10d.py", co_name="all_reduce")
    inner: Any = SimpleNamespace(f_code=code, f_lineno=3, f_back=None)
    assert describe_frame(inner) == ("distributed/distributed_c10d.py:3 all_reduce", True)
    assert describe_frame(None) == ("no Python frame", False)
    assert watchdog.HUNG_STATUS not in (0, 1, 2)


def test_a_broken_number_names_the_last_good_checkpoint_from_before(tmp_path: Path) -> None:
    for step in (4, 6):
        (Location.of(tmp_path) / f"step-{step:08d}-aaaaaa" / MANIFEST_FILE).write_bytes(b"{}")
    sums = [[float("nan"), 10.0, 1.0]]
    with pytest.raises(UserError, match=r"sequences \[8, 9\]\. The last good checkpoint is step-00000004-a"):
        refuse_broken(5, sums, 1.0, [8, 9], Location.of(tmp_path), "pretrain")
    with pytest.raises(UserError, match="There is no checkpoint from before this step"):
        refuse_broken(3, [[1.0, 10.0, 1.0]], float("inf"), [8, 9], Location.of(tmp_path), "pretrain")
    with pytest.raises(UserError, match=r"step 7: loss 9.*The last good checkpoint is step-00000006-a"):
        refuse_spike(7, "step 7: loss 9", Location.of(tmp_path), "pretrain")


def test_each_row_of_the_failure_table_names_tests_that_exist() -> None:
    tests = Path(__file__).resolve().parents[1]
    text = (tests.parent / "cluster" / "README.md").read_text()
    rows = re.findall(r"^\| .*", text[text.index("| Failure |") : text.index("| Setting |")], re.MULTILINE)[2:]
    named = [re.findall(r"`([\w/]+\.py)::(\w+)`", row) for row in rows]
    assert len(rows) >= 18 and all(named)
    assert [test for row in named for file, test in row if f"def {test}(" not in (tests / file).read_text()] == []


def test_a_loss_stands_out_from_the_median_before_it() -> None:
    watch = SpikeWatch(2.0)
    assert [watch.spike(loss) for loss in (1.0, 9.0, 2.0, 2.0, 2.0)] == [None] * 5
    assert watch.spike(3.9) is None
    assert "loss 4.1000 is 2.0 times the median 2.0000" in (watch.spike(4.1) or "")
    silent = SpikeWatch(None)
    assert [silent.spike(loss) for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 99.0)] == [None] * 6


def test_only_sizes_that_fill_groups_and_divide_the_batch_are_legal_and_the_batch_stays(tmp_path: Path) -> None:
    shape = ModelShape.from_config(ARCHITECTURE)

    def sizes(most: int, least: int, **pretrain: Any) -> dict[int, Any]:
        made = recipe(tmp_path, cluster={"num_workers": most, "min_workers": least}, **pretrain)
        return plans_by_size(made, "pretrain", shape)

    plans = sizes(8, 1, sequence_parallel_degree=2, global_batch_sequences=4)
    assert list(plans) == [2, 4, 8] and {plan.degree for plan in plans.values()} == {2}
    assert [largest_legal(tuple(plans), possible) for possible in (1, 2, 3, 7, 8, 9)] == [0, 2, 2, 4, 8, 8]
    train = recipe(tmp_path, global_batch_sequences=4).pretrain
    for workers, plan in plans.items():
        topology: Any = SimpleNamespace(dp_size=workers // plan.degree)
        assert accumulation_steps(train, topology) * topology.dp_size == 4
    free = sizes(4, 1, sequence_parallel_degree="auto", global_batch_sequences=2)
    assert {workers: plan.degree for workers, plan in free.items()} == {1: 1, 2: 2, 4: 4}
    assert plans_by_size(recipe(tmp_path), "pretrain", shape) == {}
    assert list(sizes(7, 2, sequence_parallel_degree=2, global_batch_sequences=4)) == [2, 4]
    uneven = recipe(tmp_path, cluster={"num_workers": 7, "min_workers": 2}, ulysses_degree=2, global_batch_sequences=4)
    assert uneven.at_largest_size().cluster.num_workers == 4
    with pytest.raises(
        ValueError, match=r"cluster\.num_workers 7 is not a multiple of pretrain\.sequence_parallel_degree 4"
    ):
        sizes(7, 5, sequence_parallel_degree=4)


def test_a_range_of_workers_is_ordered(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cluster\.min_workers 3 is above cluster\.num_workers 2"):
        recipe(tmp_path, cluster={"num_workers": 2, "min_workers": 3})


def test_the_policy_of_sizes_takes_the_largest_legal_one_and_grows_only_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Location.of(tmp_path)
    monkeypatch.setattr(controller, "draining_nodes", lambda: {"leaving"})
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    pickler: Any = cloudpickle
    policy: Any = pickler.loads(pickler.dumps(LegalSizes(scaling, (1, 2, 4), stage)))
    resources = {"head": {"CPU": 1.0}, "node": {"CPU": 2.0, "memory": 9.0}, "leaving": {"CPU": 9.0}}
    assert policy._count_possible_workers(resources) == 2  # the third stands by
    policy._get_reserved_resources = lambda: resources
    policy._maybe_send_resource_request = lambda: None
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    running: Any = SimpleNamespace(num_workers=1, start_time=0.0)
    for report, size in ((None, None), ("a report", 2)):
        status: Any = SimpleNamespace(worker_statuses={0: SimpleNamespace(training_report=report)})
        decision = policy.make_decision_for_running_worker_group(running, status)
        assert getattr(decision, "num_workers", None) == size
    assert [(event["workers"], event["to"]) for event in read_events(stage)] == [(1, 2)]
