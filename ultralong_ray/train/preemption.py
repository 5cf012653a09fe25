"""Who may ask a training run to leave, and how it is heard: SIGTERM, Ray's preemption notice, a stop of the driver.

Flows in: signals, Ray's news, a file in the stage's directory. Flows out: the number of a notice (train/notices.py),
asked for by the loop at the end of every step. The loop then saves, and leaves so that Ray starts it again from there:

    a worker gets SIGTERM       it has `cluster.preemption_grace_seconds`; then the signal does what it did before
    a node is drained           Ray places nothing on it from then on, so Ray Train starts them elsewhere; this does not
                                count as one of cluster.max_failures. With max_failures 0 Ray takes whoever leaves for
                                a failure; then they wait until it ends them, at the drain's deadline
    the driver gets SIGTERM     (`ray job stop`) it asks the workers by a file and waits for them, for the same grace.
                                Ray kills a stopped job after RAY_JOB_STOP_WAIT_TIME_S, 3 s unless the job's runtime
                                environment says more; what was committed before stays good whatever happens

Read against Ray 2.60 (Ray Train V2). Its public `get_preemption_info` is a barrier of all workers through an actor;
what it hands out is read here from this worker's own context, since the loop has a reduction of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray

from ultralong_ray.storage import Location
from ultralong_ray.train.notices import NONE, PREEMPTED, STOPPED, TERMINATED

logger = logging.getLogger(__name__)

STOP_POLL_SECONDS = 1.0
NO_DEADLINE_SECONDS = 120.0  # Ray Train's own, where a drain has none
ECHO_SECONDS = 2.0
LATE_SECONDS = 15.0  # by which Ray may be late to end the workers

_terminated = threading.Event()  # of this process


class Notices:
    """One worker's ear. Made in the training thread of a Ray Train worker."""

    def __init__(self, stop_file: Location, rank: int, grace_seconds: float) -> None:
        self._stop_asked = threading.Event()
        _terminated.clear()
        actor: Any = ray.get_runtime_context().current_actor
        # Only a process's main thread may set a signal's handler, and that one serves the actor's calls.
        ray.get(actor.__ray_call__.remote(_hear_sigterm, grace_seconds))
        if rank == 0:
            threading.Thread(target=self._poll, args=(stop_file,), name="stop-request", daemon=True).start()

    def __call__(self) -> int:
        """The notice that stands, NONE for none."""
        if self._stop_asked.is_set():
            return STOPPED
        if preemption_info() is not None:
            return PREEMPTED
        return TERMINATED if _terminated.is_set() else NONE

    def _poll(self, stop_file: Location) -> None:
        while not self._stop_asked.wait(STOP_POLL_SECONDS):
            with contextlib.suppress(Exception):  # a storage that is away asks for nothing
                if stop_file.exists():
                    self._stop_asked.set()


def preemption_info() -> Any:
    """Ray Train's PreemptionInfo for this worker group, None where no node is being taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def wait_for_the_end() -> None:
    """After a preemption notice: until Ray ends this process at the deadline, or that is overdue.

    A worker that raised instead would count as failed, which ends a run with cluster.max_failures 0; one that returned
    would count as done.
    """
    info = preemption_info()
    seconds = NO_DEADLINE_SECONDS
    if info is not None and info.deadline_ms is not None:
        seconds = max(0.0, info.deadline_ms / 1000 - time.time())
    time.sleep(seconds + LATE_SECONDS)


def _hear_sigterm(worker: Any, grace_seconds: float) -> None:
    _on_sigterm(_terminated, threading.Event(), grace_seconds)


def _on_sigterm(heard: threading.Event, over: threading.Event, grace_seconds: float) -> None:
    """The first SIGTERM sets `heard`; a second one, or the end of the grace, does what it would have done.

    A stage of a pipeline is told twice, by who stops the pipeline and by the pipeline: what comes within ECHO_SECONDS
    is the same SIGTERM. Once `over` is set the grace has no end.
    """
    former, first_at = signal.getsignal(signal.SIGTERM), 0.0

    def end() -> None:
        if not over.wait(grace_seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first_at
        if not heard.is_set():
            first_at = time.monotonic()
            heard.set()
            threading.Thread(target=end, name="grace", daemon=True).start()
        elif time.monotonic() - first_at >= min(ECHO_SECONDS, grace_seconds):
            signal.signal(signal.SIGTERM, former)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def stopped_by_sigterm(stop_file: Location, grace_seconds: float) -> Iterator[None]:
    """In the driver: SIGTERM within the block asks the workers to save and leave, and gives them the grace."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former, heard, over = signal.getsignal(signal.SIGTERM), threading.Event(), threading.Event()

    def ask() -> None:
        heard.wait()
        if not over.is_set():
            logger.warning("SIGTERM: the workers save and leave, for which they have %.0f s", grace_seconds)
            stop_file.write_bytes(b"")

    _on_sigterm(heard, over, grace_seconds)
    threading.Thread(target=ask, name="stop", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        heard.set()
        signal.signal(signal.SIGTERM, former)
        with contextlib.suppress(FileNotFoundError):
            stop_file.delete_file()
