"""What happened to a training run, a line each: `events.jsonl` in the stage's directory.

Flows in: an event by name with its facts. Flows out: {"time" (seconds since 1970), "event", ...}. Events are

    start       layout                                    training begins at step 0
    resume      step, checkpoint, passed_over, layout     it continues; damaged checkpoints were passed over
    checkpoint  step, checkpoint, seconds, ...            one was committed; the loop was blocked so long. Then
                                                          waited_seconds of that for the one before, and from then
                                                          on written_seconds (rank 0's part) and uploaded_seconds (all);
                                                          num_bytes
    interrupted step, cause                               the run was asked to leave and has saved this step
    failure     rank, node, cause                         a rank raised an error
    end         step                                      the last step is done

A killed process writes nothing, so a start or resume after anything but `end` or `failure` means that one was lost.
Rank 0 writes all but `failure`. An object store cannot append: there the file is written anew, and of several ranks
that fail at the same moment one may be missing.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from ultralong_ray.storage import Location, explain_full_disk

EVENTS_FILE = "events.jsonl"


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
