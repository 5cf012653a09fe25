"""How a training run stands, in words: for one that runs, one that died and one that is done.

Flows in: a stage's directory, or a folder that holds such directories, with `metrics.jsonl` and `events.jsonl`. Flows
out: text with progress, rate, time left, the last checkpoint, and every restart with its cause. Nothing of the run is
asked, so the answer is the same when it is dead; how long it has been silent is said.
"""

from __future__ import annotations

import statistics
import time

from ultralong_ray.storage import Location
from ultralong_ray.train.events import EVENTS_FILE, read_events
from ultralong_ray.train.failures import BEGINNINGS, Event, most_telling, place_of
from ultralong_ray.train.metrics import METRICS_FILE, read_metrics
from ultralong_ray.types import StepMetrics, UserError

RECENT_STEPS = 20
LOST = "no account of it (killed, or its node was lost)"


def describe_run(folder: Location, now_seconds: float | None = None) -> str:
    """The stages below `folder`, or the stage that it is. Raises UserError where there is no training run."""
    stages = stages_of(folder)
    if not stages:
        raise UserError(
            f"{folder}: no {EVENTS_FILE} or {METRICS_FILE} there or one folder below; give a recipe's workdir or a "
            f"training stage's directory"
        )
    now = time.time() if now_seconds is None else now_seconds
    parts = [describe_stage(stage.name, read_metrics(stage), read_events(stage), now) for stage in stages]
    return "\n\n".join(parts)


def stages_of(folder: Location) -> list[Location]:
    """Training stages: `folder` itself or the folders in it that have events or metrics."""
    if any((folder / name).exists() for name in (EVENTS_FILE, METRICS_FILE)):
        return [folder]
    files = [file for file in folder.files(recursive=True) if file.name in (EVENTS_FILE, METRICS_FILE)]
    return sorted({file.parent for file in files if file.parent.parent == folder}, key=str)


def describe_stage(name: str, records: list[StepMetrics], events: list[Event], now_seconds: float) -> str:
    """Several lines on one stage; `now_seconds` since 1970."""
    lines = [f"{name}: {_state(events, now_seconds)}"]
    if records:
        last, recent = records[-1], records[-RECENT_STEPS:]
        seconds = statistics.median(record.step_seconds for record in recent)
        rate = statistics.median(record.tokens_per_second for record in recent)
        left = (last.num_steps - last.step) * seconds
        lines.append(f"  step {last.step}/{last.num_steps} ({last.step / last.num_steps:.0%}), loss {last.loss:.4f}")
        lines.append(f"  {rate:,.0f} tokens/s, {seconds:.2f} s a step, {_duration(left)} of computing left")
    lines.append(f"  last checkpoint: {_last_checkpoint(records, events, now_seconds)}")
    restarts = restarts_of(events)
    lines.append(f"  restarts: {len(restarts) or 'none'}")
    lines += [f"    {line}" for line in restarts]
    return "\n".join(lines)


def restarts_of(events: list[Event]) -> list[str]:
    """A line for every attempt that followed one which did not end: when, from which step, and why."""
    lines: list[str] = []
    previous: Event | None = None  # how the attempt before began
    since: list[Event] = []  # what happened in it
    reached = 0
    for event in events:
        if event["event"] in BEGINNINGS:
            if previous is not None:
                step = event.get("step", 0)
                lost = f"; step {reached} was its last checkpoint" if reached != step else ""
                passed = "".join(f"; passed over {words}" for words in event.get("passed_over", []))
                cause = _cause(since) + _steps_lost(since) + _moved(previous, event)
                lines.append(f"{_clock(event)} from step {step}{lost}: {cause}{passed}")
            previous, since = event, []
        elif event["event"] == "checkpoint":
            reached = event["step"]
        elif event["event"] == "end":
            previous = None
        else:
            since.append(event)
    return lines


def _cause(since: list[Event]) -> str:
    """Why an attempt ended, from what was recorded after it began: the most telling account, else what is known."""
    accounts = [event for event in since if event["event"] == "failure"]
    broken = [event for event in since if event["event"] == "breakdown"]
    asked = [event["cause"] for event in since if event["event"] == "interrupted"]
    if asked:  # the breakdown that follows is its consequence, unless it is of another kind
        others = [event for event in broken if event["kind"] != "preempted"]
        return asked[-1] + "".join(f"; then {place_of(event)}{event['cause']}" for event in others[:1])
    # later accounts are of ranks that were torn down, unless the first to come were of broken collectives
    told = broken[0] if broken and broken[0]["kind"] != "collective" else most_telling([*accounts, *broken[:1]])
    if told is not None:
        more = f" ({len(broken)} attempts broke down)" if len(broken) > 1 else ""
        return f"{place_of(told)}{told['cause']}{more}"
    resized = [event for event in since if event["event"] == "resize"]
    if resized:
        return f"{resized[-1]['workers']} workers became {resized[-1]['to']}"
    stopped = [event for event in since if event["event"] == "stop"]
    return stopped[-1]["cause"] if stopped else LOST


def _steps_lost(since: list[Event]) -> str:
    lost = next((event["steps_lost"] for event in since if event["event"] == "breakdown"), 0)
    return f"; {lost} steps done again" if lost else ""


def _moved(before: Event, after: Event) -> str:
    """Which nodes left and came between two attempts, and another number of workers."""
    old, new = set(before.get("nodes", ())), set(after.get("nodes", ()))
    words = [f"left: {', '.join(sorted(old - new))}"] if old - new else []
    words += [f"came: {', '.join(sorted(new - old))}"] if old and new - old else []
    sizes = [event.get("layout", {}).get("world_size") for event in (before, after)]
    if None not in sizes and sizes[0] != sizes[1]:
        words.append(f"{sizes[0]} workers, now {sizes[1]}")
    return "".join(f"; {word}" for word in words)


def _state(events: list[Event], now_seconds: float) -> str:
    if not events:
        return "no events recorded"
    last = events[-1]
    ago = f"{_duration(now_seconds - last['time'])} ago"
    if last["event"] == "end":
        return f"done, {ago}"
    begun = max((i for i, event in enumerate(events) if event["event"] in BEGINNINGS), default=-1)
    if last["event"] == "breakdown":
        return f"starting again, or ended since; it broke down {ago}: {_cause(events[begun + 1 :])}"
    if last["event"] in ("failure", "stop", "interrupted"):
        return f"stopped {ago}: {_cause(events[begun + 1 :])}"
    return f"running, or ended without an account; its last event, {last['event']}, was {ago}"


def _last_checkpoint(records: list[StepMetrics], events: list[Event], now_seconds: float) -> str:
    found = [event for event in events if event["event"] == "checkpoint"]
    if not found:
        return "none"
    last = found[-1]
    ago = f"{_duration(now_seconds - last['time'])} ago"
    behind = records[-1].step - last["step"] if records else 0
    since = f", {behind} steps since" if behind > 0 else ""
    return f"step {last['step']}, {ago}, written in {last['seconds']:.1f} s{since} ({last['checkpoint']})"


def _clock(event: Event) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"])) + " UTC"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
