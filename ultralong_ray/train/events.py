"""What happened to a training run, a line each: `events.jsonl` in the stage's directory.

Flows in: an event by name with its facts. Flows out: {"time" (seconds since 1970), "event", ...}. Events are

    submit      driver                                    a driver began, or began again; its id, new every time
    start       layout, nodes, attempt, start_seconds,    training begins at step 0; rank 0 took so long to build the
                driver                                    engine, check the machine and read the checkpoint
    resume      the same; step, checkpoint, passed_over   it continues; damaged checkpoints were passed over
    checkpoint  step, checkpoint, seconds, ...            one was committed; the loop was blocked so long. Then
                                                          waited_seconds of that for the one before; from then on
                                                          written_seconds (rank 0's part) and uploaded_seconds
                                                          (all ranks); num_bytes
    interrupted step, cause                               the run was asked to leave and has saved this step
    failure     rank, node, step, kind, cause, attempt    a rank's account of what stops it
    breakdown   rank, node, step, kind, cause, steps_lost all ranks ended; the most telling cause, once
    resize      workers, to                               a healthy run restarts on another number of workers
    spike       step, sequences, cause                    a loss stood out (on_loss_spike = "warn")
    stop        cause                                     the driver gave up; one that a later submission superseded
                                                          says no more
    end         step                                      the last step is done

`step` of a failure or breakdown is the step in flight. Rank 0 writes most; every rank its own failures; Ray Train's
controller, or the driver when that is lost, breakdowns. A driver that is killed writes nothing, so a submit after
anything but `end`, `stop` or `interrupted` means that one was, or that two train the stage: the later one keeps it. An
object store cannot append: there the file is written anew, and of several ranks that fail at the same moment one may be
missing.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from ultralong_ray.storage import Location, explain_full_disk

logger = logging.getLogger(__name__)
Record = TypeVar("Record")

EVENTS_FILE = "events.jsonl"
NODE_VARIABLE = "ULTRALONG_RAY_NODE"  # what the launcher calls this node


def record_event(stage: Location, event: str, **facts: Any) -> None:
    """Append an event, apart from a line that was cut short. Raises UserError when the disk is full."""
    line = (json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n").encode()
    file = stage / EVENTS_FILE
    if not stage.is_local:
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + _apart(before) + line)
        return
    os.makedirs(stage.path, exist_ok=True)
    with explain_full_disk(str(file)), open(file.path, "ab+", buffering=0) as sink:
        sink.seek(max(0, sink.seek(0, os.SEEK_END) - 1))
        data = _apart(sink.read(1)) + line
        if sink.write(data) != len(data):  # one write: lines of several processes do not mix
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _apart(before: bytes) -> bytes:
    """What must stand between the end of a file and its next line."""
    return b"\n" if before and not before.endswith(b"\n") else b""


def read_events(stage: Location) -> list[dict[str, Any]]:
    """The events recorded so far, oldest first; lines cut short or damaged are left out."""
    return read_lines(stage / EVENTS_FILE, _event)


def _event(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or "event" not in value:
        raise ValueError("no event")
    return value


def read_lines(file: Location, make: Callable[[Any], Record]) -> list[Record]:
    """`make` of the JSON value of every line. Lines of which none can be made are left out and the file is named in the
    log, once; a last line without an end may still be on its way, and is left out without a word.
    """
    if not file.exists():
        return []
    records, damaged = [], []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            if line.strip():
                records.append(make(json.loads(line)))
        except (ValueError, TypeError):  # also what is no UTF-8
            damaged.append(number)
    if damaged:
        _warn_of_damage(str(file), tuple(damaged))
    return records


@lru_cache(maxsize=64)  # a run reads its events at every checkpoint
def _warn_of_damage(file: str, numbers: tuple[int, ...]) -> None:
    lines = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    logger.warning("%s: %d lines are damaged and left out (%s)", file, len(numbers), lines)


def node_name() -> str:
    """This node as events name it: the host, and what the launcher knows it by."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()
