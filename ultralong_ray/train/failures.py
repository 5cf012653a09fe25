"""What a failure is, what is done about each kind, and when a run has failed too often. Pure: events in, words out.

The failure table of cluster/README.md says for each failure who sees it within what time, what happens, what is lost,
and which test shows it.
"""

from __future__ import annotations

import re
import time
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


def taken_over(events: list[Event], driver: str) -> str | None:
    """Words for the user where a submission made after that of `driver` has begun to train; None where none has.

    The latest submission has the stage, whichever attempt began last: else two would take it from each other in turn.
    """
    submitted = [event.get("driver") for event in events if event["event"] == "submit"]
    later = set(submitted[submitted.index(driver) + 1 :]) - {None} if driver in submitted else set()
    begun = next((event for event in events if event["event"] in BEGINNINGS and event.get("driver") in later), None)
    if begun is None:
        return None
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(begun["time"]))
    return (
        f"another submission trains this stage since {since} UTC (driver {begun['driver']} in events.jsonl); this "
        f"earlier one (driver {driver}) leaves the stage and its checkpoints to it. Keep one of them: to go on with "
        f"this one, stop the other and submit again"
    )


def refuse_superseded(events: list[Event], attempt: str, driver: str) -> None:
    """Raise where this attempt of the submission `driver` may touch the checkpoints no more.

    Superseded when another attempt of it began after this one, as after a cut link; UserError when a later submission
    trains the stage.
    """
    if (words := taken_over(events, driver)) is not None:
        raise UserError(words)
    begun = [event for event in events if event["event"] in BEGINNINGS and event.get("driver", driver) == driver]
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
