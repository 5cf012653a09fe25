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

import json
import os
import socket
import time
from typing import Any

from ultralong_ray.storage import Location, explain_full_disk

EVENTS_FILE = "events.jsonl"
NODE_VARIABLE = "ULTRALONG_RAY_NODE"  # what the launcher calls this node


def record_event(stage: Location, event: str, **facts: Any) -> None:
    """Append an event. Raises UserError when the disk is full."""
    line = (json.dumps({"time": round(time.time(), 3), "event": event, **facts}) + "\n").encode()
    file = stage / EVENTS_FILE
    if not stage.is_local:
        file.write_bytes((file.read_bytes() if file.exists() else b"") + line)
        return
    os.makedirs(stage.path, exist_ok=True)
    with explain_full_disk(str(file)), open(file.path, "ab", buffering=0) as sink:
        sink.write(line)  # one write: lines of several processes do not mix


def read_events(stage: Location) -> list[dict[str, Any]]:
    """The events recorded so far, oldest first; a half-written last line is left out."""
    file = stage / EVENTS_FILE
    if not file.exists():
        return []
    lines = file.read_bytes().decode().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def node_name() -> str:
    """This node as events name it: the host, and what the launcher knows it by."""
    return os.environ.get(NODE_VARIABLE) or socket.gethostname()
