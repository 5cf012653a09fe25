"""What a failure is, what is done about each kind, and when a run has failed too often. Pure: events in, words out.

The failure table. "Then" is without a person unless it says stop; "shown" are files below tests/. A commit is a
checkpoint whose manifest is written (train/checkpoint_files.py), which happens while the steps after it run, and
nothing committed is ever lost. "The steps since" are at most checkpoint_every_steps, those during the upload that a
failure cuts short, and the one in flight. Times in brackets are defaults. cluster/README.md has the same table.

  - worker killed. Seen: Ray Train, at its next look (0.2 s). Then: all ranks start again from the last commit. Lost:
    the steps since. Shown: train/test_kill_schedule.py.
  - node killed or removed. Seen: broken collective of its partners at once; Ray after 15 s without an answer. Then:
    the same, on a node that joins or on fewer (min_workers). Lost: the steps since. Shown: train/test_nodes.py,
    test_kill_schedule.py (raylet).
  - link cut, nobody is told. Seen: Ray after 15 s (towards the head); else the watchdog, which tries every node.
    Then: the node that cannot be reached is named; the same. Ranks that live on there neither commit nor remove a
    checkpoint once another attempt has begun. Lost: the steps since. Shown: train/test_nodes.py, test_failures.py,
    test_beside.py (ranks that live on).
  - Ray Train's controller killed. Seen: the driver, at once. Then: the driver begins again. Lost: the steps since.
    Shown: train/test_kill_schedule.py.
  - driver or head lost. Seen: whoever submitted it (KubeRay too, where backoffLimit is above the 0 of base/). Then:
    submitted again it goes on from the last commit. Lost: the steps since. Shown: train/test_kill_schedule.py (driver).
  - head's control service lost, GCS fault tolerance on. Seen: nobody, for up to 60 s. Then: nodes and ranks wait for
    it and go on. Lost: nothing. Shown: not yet.
  - rank hangs or is frozen. Seen: watchdog: hang_timeout_seconds, or 10 median steps and at least 300 s; while the
    loop waits for a checkpoint, an hour, more where it is large. Then: named with node, step and stacks (hangs/),
    killed; all start again. Lost: the steps since. Shown: train/test_hang.py, test_beside.py (a slow upload is none).
  - SIGTERM to a worker. Seen: all ranks, at the end of the step. Then: that step is saved and all start again, with
    preemption_grace_seconds (60) for both; then the signal kills. Lost: nothing; killed, the steps since. Shown:
    train/test_preemption.py.
  - Ray's preemption notice (a node is drained). Seen: Ray Train, which asks every second; all ranks at the end of the
    step. Then: that step is saved; Ray ends the ranks at the drain's deadline and starts them elsewhere, uncounted by
    max_failures. Lost: nothing; where the deadline is too near, the steps since. Shown: train/test_preemption.py (a
    notice to the loop).
  - SIGTERM to the driver (`ray job stop`). Seen: the ranks, within a second and at the end of the step. Then: that
    step is saved and the run ends, within the same grace; submitted again it goes on from there. Lost: nothing; past
    the grace, or Ray's RAY_JOB_STOP_WAIT_TIME_S (3), the steps since. Shown: train/test_preemption.py.
  - NCCL or gloo error. Seen: the ranks that get it, at once. Then: recorded after 2 s, in which a dead partner is
    found; all start again. Lost: the steps since. Shown: train/test_failures.py, test_kill_schedule.py.
  - out of memory on a rank. Seen: that rank, or Ray's memory monitor, at once. Then: recorded beside the plan's
    memory; one restart, then stop. Lost: the steps since. Shown: train/test_failures.py.
  - loss or gradient not finite. Seen: the step itself, before it is saved. Then: stop, naming ranks, sequences, last
    good checkpoint. Lost: the steps since. Shown: train/test_failures.py.
  - loss spike. Seen: the step itself (loss_spike_factor). Then: on_loss_spike: warn (event, log) or stop. Lost:
    nothing; with stop the steps since. Shown: train/test_failures.py.
  - object store away. Seen: the request that fails. Then: tried again for 90 s, then the attempt fails as above.
    Lost: time. Shown: data/test_object_store.py.
  - object store away during an upload. Seen: the request that fails. Then: steps go on, up to the next checkpoint; the
    upload is tried again up to four times, for 90 s each; then the attempt fails as above. What was not committed is
    taken for no checkpoint, and removed later. Lost: time; the steps since where it stays away. Shown:
    train/test_checkpoint_store.py.
  - checkpoint damaged (torn, truncated, bits flipped). Seen: at load, by its sizes and checksums. Then: it is named,
    and the one before it is used; stop where none is whole. Lost: the steps since that one. Shown:
    train/test_checkpoint_damage.py.
  - fails again and again. Seen: max_failures restarts without a new checkpoint. Then: stop, naming step and
    sequences; a new submission has one attempt. Lost: nothing more. Shown: train/test_failures.py.
  - disk full, other user errors. Seen: the rank that meets it. Then: stop with the message. Lost: the steps since.
    Shown: train/test_trainer.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

from ultralong_ray.types import UserError

Kind = Literal["hung", "memory", "user", "error", "lost", "preempted", "collective"]
Event = dict[str, Any]

# From the most telling account to the least: when one rank dies, its partners report a broken collective.
TELLING: tuple[Kind, ...] = ("hung", "memory", "user", "error", "preempted", "lost", "collective")
BEGINNINGS = ("start", "resume")
MEMORY_RESTARTS = 1

_COLLECTIVE = re.compile(r"gloo|nccl|c10d|connection (was )?(closed|reset|refused)|broken pipe|process ?group", re.I)
_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|running low on memory", re.I)


class Superseded(RuntimeError):
    """Ray gave this attempt up and began another, but this process lives on."""


def kind_of(error: BaseException) -> Kind:
    """What kind of failure an exception is, by the names of its classes and its words.

    Ray Train wraps the death of a worker (WorkerHealthCheckFailedError); Ray's errors say whether a node was taken
    away on purpose. Read against Ray 2.60, torch 2.11 and 2.13.
    """
    cause = getattr(error, "health_check_failure", None)
    if isinstance(cause, BaseException):
        return kind_of(cause)
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"OutOfMemoryError", "MemoryError"} or _MEMORY.search(str(error)):
        return "memory"
    if names & {"RayActorError", "NodeDiedError", "WorkerHealthCheckTimeoutError"}:
        return "preempted" if getattr(error, "preempted", False) else "lost"
    if "UserError" in names:
        return "user"
    if "Interrupted" in names:  # train/notices.py: asked to leave, it saved itself
        return "preempted"
    if "DistError" in names or ("RuntimeError" in names and _COLLECTIVE.search(str(error))):
        return "collective"
    return "error"


def in_words(error: BaseException) -> str:
    """The error's kind and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def most_telling(accounts: list[Event]) -> Event | None:
    """The account that says most: by kind, then the first."""
    rank_of = {kind: place for place, kind in enumerate(TELLING)}
    return min(accounts, key=lambda account: rank_of.get(account.get("kind", "error"), 0), default=None)


def accounts_since_last_breakdown(events: list[Event]) -> list[Event]:
    """Failures that ranks recorded in the attempt that runs, or ran last. A rank cut off may report an older one."""
    edges = [place for place, event in enumerate(events) if event["event"] in (*BEGINNINGS, "submit", "breakdown")]
    attempt = next((event.get("attempt") for event in reversed(events) if event["event"] in BEGINNINGS), None)
    found = [event for event in events[edges[-1] + 1 if edges else 0 :] if event["event"] == "failure"]
    return [event for event in found if event.get("attempt") in (None, attempt)]


def refuse_superseded(events: list[Event], attempt: str) -> None:
    """Raise Superseded when another attempt began after this one, as after a cut link: it owns the checkpoints now."""
    begun = [event for event in events if event["event"] in BEGINNINGS]
    if begun and begun[-1].get("attempt") != attempt:
        raise Superseded(f"another attempt began {begun[-1]}; this one leaves its checkpoints alone")


def last_committed_step(events: list[Event]) -> int:
    """The step of the newest checkpoint that the events know of; 0 where there is none."""
    steps = [event["step"] for event in events if event["event"] in ("checkpoint", "resume")]
    return steps[-1] if steps else 0


def breakdowns_in_a_row(events: list[Event]) -> list[Event]:
    """Breakdowns since the last committed checkpoint, but for nodes taken away on purpose and what users mend."""
    found: list[Event] = []
    for event in events:
        if event["event"] in ("checkpoint", "end"):
            found = []
        elif event["event"] == "breakdown" and event.get("kind") not in ("preempted", "user"):
            found.append(event)
    return found


def refuse_to_go_on(events: list[Event], max_failures: int, sequences_of: Callable[[int], list[int]]) -> None:
    """Raise UserError when an attempt would be one too many: the run failed again and again without a checkpoint.

    `max_failures` restarts in a row are made (-1: without end), after lack of memory one. What counts is in the run's
    folder, so a new submission does not begin anew: it has one attempt. `sequences_of` gives a step's sequences.
    """
    row = breakdowns_in_a_row(events)
    decisive = [event["event"] for event in events if event["event"] in ("submit", "breakdown")]
    if not row or decisive[-1] == "submit":
        return
    memory = [event for event in row if event.get("kind") == "memory"]
    too_often = max_failures >= 0 and len(row) > max_failures
    if not too_often and len(memory) <= MEMORY_RESTARTS:
        return
    steps = [event["step"] for event in row]
    step = steps[-1]
    where = f"step {step} failed {_times(len(row))} in a row" if len(set(steps)) == 1 else f"steps {steps} failed"
    cause = f"last cause: {place_of(row[-1])}{row[-1]['cause']}"
    what = (
        "What does not fit once does not fit again: use more ranks for a sequence, keep_attention_rows = 0, smaller "
        "tiles, or offload_optimizer = true (jobs/plan.py predicts each)"
        if row[-1].get("kind") == "memory"
        else "Look at that cause and, where it is the data, at those sequences"
    )
    raise UserError(
        f"{where} without a checkpoint in between, on sequences {sequences_of(step)} (step {step}); {cause}. {what}; "
        f"cluster.max_failures is {max_failures}. Submitted again the run makes one more attempt from step "
        f"{last_committed_step(events)}"
    )


def place_of(account: Event) -> str:
    """`rank 3 on n1: `, or nothing where no rank is known."""
    if account.get("rank") is None:
        return ""
    return f"rank {account['rank']} on {account['node']}: "


def lost_rank_words(ranks: list[int], nodes: list[str]) -> tuple[int | None, str | None, str]:
    """(first rank, its node, words for all of them) of ranks that ended without a word."""
    if not ranks:
        return None, None, "no rank"
    by_node: dict[str, list[int]] = {}
    for rank in ranks:
        by_node.setdefault(nodes[rank] if rank < len(nodes) else "an unknown node", []).append(rank)
    words = "; ".join(f"ranks {some} of {node}" for node, some in by_node.items())
    return ranks[0], next(iter(by_node)), words


def memory_words(plan: dict[str, Any], peak_gib: float) -> str:
    """Peak memory beside what the plan (the contents of plan.json) predicted."""
    prediction = plan.get("prediction")
    if prediction is None:
        return f"peak {peak_gib:.1f} GiB; the plan predicted nothing for this device"
    device, host = prediction["device_gib"], prediction["host_rank_gib"]
    return f"peak {peak_gib:.1f} GiB; the plan has {device:.1f} GiB on the device and {host:.1f} GiB on the host a rank"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"
