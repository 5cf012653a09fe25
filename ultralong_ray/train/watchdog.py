"""A thread on every rank that notices a training loop which stands still, says where, and ends the process.

    hangs/ATTEMPT/rank-00003.txt      where rank 3 stood: a line of JSON, then the stacks of all its threads
    hangs/ATTEMPT/verdict.json        which rank it was, as the lowest rank that could write judged it

Flows in: `beat` after every step, `allow` before work that may take longer. Flows out, when the time allowed is over:
those files below the stage's directory, a `failure` event, and the end of the process, upon which Ray Train starts all
ranks anew. All ranks stand still when one does, and all watchdogs find it at the same time; who is to blame follows
from what they wrote: a rank that wrote nothing is frozen or cut off, one that is in no collective keeps the others
waiting. Ranks of other nodes are tried by a TCP connection that carries nothing. Knows torch.distributed, not Ray.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

from ultralong_ray.storage import Location
from ultralong_ray.train.events import node_name, record_event
from ultralong_ray.train.patience import LEAST_CHECKPOINT_SECONDS

logger = logging.getLogger(__name__)

HANGS = "hangs"  # below a stage's directory
VERDICT_FILE = "verdict.json"
HUNG_STATUS = 86  # exit status of a process that its watchdog ended
STEP_FACTOR = 10.0  # without hang_timeout_seconds: a step may take so many times the median of those before
LEAST_STEP_SECONDS = 300.0  # and at least this long
SLOWEST_UPLOAD = 5e6  # bytes per second of one rank, below which an upload counts as a hang
LOOK_SECONDS = 0.5
STEP = "the step"
ACCOUNT_SECONDS = 4.0  # ranks have so long to write before the judge reads
VERDICT_SECONDS = 20.0  # and wait so long for the verdict
CONNECT_SECONDS = 2.0
# An innermost frame in one of these waits for other ranks.
COLLECTIVE_FILES = ("/torch/distributed/", "/deepspeed/comm/")


@dataclass(frozen=True, slots=True)
class Account:
    """What a rank that stands still says of itself."""

    rank: int
    node: str
    step: int  # the step in flight
    phase: str  # what it was allowed time for
    seconds: float  # since the last sign of progress
    place: str  # innermost frame of the training thread
    waits: bool  # that thread is in a collective, waiting for others
    unreachable: tuple[str, ...]  # nodes that take no connection from this one


@dataclass(frozen=True, slots=True)
class Peer:
    node: str
    address: str
    port: int
    pid: int


class Watchdog:
    """Watches the thread that makes it, until its block ends. Making it is collective.

    `timeout_seconds` is a recipe's hang_timeout_seconds; None: STEP_FACTOR times the median step. `first_seconds`:
    what the first step may take, and without hang_timeout_seconds the second, before there is a median.
    """

    def __init__(
        self, stage: Location, attempt: str, first_step: int, timeout_seconds: float | None, first_seconds: float
    ) -> None:
        self.rank, self.stage, self.attempt = dist.get_rank(), stage, attempt
        self.timeout_seconds, self.first_seconds = timeout_seconds, first_seconds
        self.thread = threading.get_ident()
        self._listener = socket.create_server(("", 0))  # the kernel answers; nothing is ever read from it
        mine = Peer(node_name(), _own_address(), self._listener.getsockname()[1], os.getpid())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self.peers: list[Peer] = everyone
        self.folder = stage / HANGS / attempt
        self._seconds: list[float] = []  # of the steps of this attempt
        self._step, self._phase, self._since = first_step, "its first step", time.monotonic()
        self._limit_seconds = first_seconds
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Step `step` is done, with all that belongs to it."""
        self._end_phase()
        limit = self.timeout_seconds
        if limit is None:
            usual = statistics.median(self._seconds[-20:]) if self._seconds else self.first_seconds / STEP_FACTOR
            limit = max(LEAST_STEP_SECONDS, STEP_FACTOR * usual)
        self._step, self._phase, self._since, self._limit_seconds = step + 1, STEP, time.monotonic(), limit

    def allow(self, phase: str, seconds: float) -> None:
        """The clock starts anew, for work between two steps that may take `seconds`."""
        self._end_phase()
        self._phase, self._since, self._limit_seconds = phase, time.monotonic(), seconds

    def _end_phase(self) -> None:
        if self._phase == STEP:
            self._seconds.append(time.monotonic() - self._since)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Watch no longer; an error that ends the loop is told `step_in_flight` and `attempt`."""
        self._closed.set()
        self._listener.close()
        if error is not None:
            error.__dict__.update(step_in_flight=self._step, attempt=self.attempt)

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            seconds = time.monotonic() - self._since
            if seconds > self._limit_seconds:
                try:
                    self._give_account(seconds)
                finally:
                    _leave()

    def _give_account(self, seconds: float) -> None:
        """Write where this rank stands; the lowest rank that wrote judges, the others wait for its verdict."""
        frame = sys._current_frames().get(self.thread)
        place, waits = describe_frame(frame)
        unreachable = self._unreachable_nodes()
        account = Account(
            self.rank, self.peers[self.rank].node, self._step, self._phase, seconds, place, waits, unreachable
        )
        logger.error("rank %d: no progress for %.0f s in step %d, at %s", self.rank, seconds, self._step, place)
        words = json.dumps(asdict(account)) + "\n" + _all_stacks()
        (self.folder / f"rank-{self.rank:05d}.txt").write_bytes(words.encode())
        time.sleep(ACCOUNT_SECONDS)
        accounts = read_accounts(self.folder)
        if self.rank == min(accounts):
            rank, node, cause = verdict([peer.node for peer in self.peers], accounts)
            facts = {"rank": rank, "node": node, "step": self._step, "attempt": self.attempt, "stacks": self.folder.uri}
            logger.error("step %d hangs: %s; stacks in %s", self._step, cause, self.folder)
            record_event(self.stage, "failure", kind="hung", cause=cause, **facts)
            (self.folder / VERDICT_FILE).write_json({"cause": cause, **facts})
        waited_from = time.monotonic()
        while not (self.folder / VERDICT_FILE).exists() and time.monotonic() - waited_from < VERDICT_SECONDS:
            time.sleep(LOOK_SECONDS)
        self._kill_silent(set(accounts))

    def _unreachable_nodes(self) -> tuple[str, ...]:
        """Other nodes that take no TCP connection; one rank of each is tried."""
        tried: dict[str, Peer] = {}
        for peer in self.peers:
            if peer.node != self.peers[self.rank].node:
                tried.setdefault(peer.node, peer)
        failed = []
        for node, peer in tried.items():
            try:
                socket.create_connection((peer.address, peer.port), CONNECT_SECONDS).close()
            except OSError:
                failed.append(node)
        return tuple(failed)

    def _kill_silent(self, answered: set[int]) -> None:
        """End processes of this node that wrote nothing: a stopped one takes no other notice."""
        for rank, peer in enumerate(self.peers):
            if rank not in answered and peer.node == self.peers[self.rank].node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(peer.pid, 9)


def checkpoint_seconds(num_bytes: int) -> float:
    """How long the loop may wait for checkpoints of `num_bytes` a rank: one on its way, then the next one."""
    return max(LEAST_CHECKPOINT_SECONDS, 2 * num_bytes / SLOWEST_UPLOAD)


def verdict(nodes: list[str], accounts: dict[int, Account]) -> tuple[int | None, str | None, str]:
    """(rank, its node, cause in words) from the accounts by rank; `nodes` of all ranks. Rank None: no single one."""
    judge = accounts[min(accounts)]
    waited = f"no progress for {judge.seconds:.0f} s in {judge.phase} (step {judge.step})"
    silent = [rank for rank in range(len(nodes)) if rank not in accounts]
    apart = sorted({node for account in accounts.values() for node in account.unreachable})
    if silent:
        away = [rank for rank in silent if nodes[rank] in apart]
        if away:
            rank = away[0]
            why = f"{nodes[rank]} takes no connection from {judge.node}: the host or the link between them is down"
        else:
            rank = silent[0]
            why = f"rank {rank} gives no sign though its host answers: the process is stopped or blocked"
        more = f" (silent ranks: {silent})" if len(silent) > 1 else ""
        return rank, nodes[rank], f"hung: {waited}; {why}{more}"
    if apart:
        rank = next(rank for rank, node in enumerate(nodes) if node in apart)
        ends = "; ".join(
            f"from {account.node} to {', '.join(account.unreachable)}"
            for account in {account.node: account for account in accounts.values() if account.unreachable}.values()
        )
        return rank, nodes[rank], f"hung: {waited}; no connection {ends}: the link is down"
    busy = [account for account in accounts.values() if not account.waits]
    if not busy or len(busy) == len(nodes) > 1:
        return None, None, f"hung: {waited}; all ranks stand alike, at {judge.place}"
    first = busy[0]
    others = f", as do ranks {[account.rank for account in busy[1:]]}" if busy[1:] else ""
    return first.rank, first.node, f"hung: {waited}; rank {first.rank} stands at {first.place}{others}; others wait"


def read_accounts(folder: Location) -> dict[int, Account]:
    """The accounts below `folder` by rank."""
    found = {}
    for file in folder.files():
        if file.name.startswith("rank-") and file.name.endswith(".txt"):
            values = json.loads(file.read_bytes().decode().split("\n", 1)[0])
            account = Account(**{**values, "unreachable": tuple(values["unreachable"])})
            found[account.rank] = account
    return found


def describe_frame(frame: FrameType | None) -> tuple[str, bool]:
    """(file:line function, whether it waits for other ranks) of a thread's innermost frame."""
    if frame is None:
        return "no Python frame", False
    code = frame.f_code
    waits = any(part in code.co_filename for part in COLLECTIVE_FILES)
    own: FrameType | None = frame
    while own is not None and "ultralong_ray" not in own.f_code.co_filename:
        own = own.f_back
    called = "" if own is None or own is frame else f", called from {_place(own)}"
    return f"{_place(frame)}{called}", waits


def _place(frame: FrameType) -> str:
    folder, name = os.path.split(frame.f_code.co_filename)
    return f"{os.path.basename(folder)}/{name}:{frame.f_lineno} {frame.f_code.co_name}"


def _all_stacks() -> str:
    with tempfile.TemporaryFile() as file:  # faulthandler needs a descriptor
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _own_address() -> str:
    """The address that this host has towards rank 0's, or loopback where there is one host."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # sends nothing
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _leave() -> None:
    """End the process as it is: threads that hang in C code cannot be asked."""
    logging.shutdown()
    os._exit(HUNG_STATUS)
