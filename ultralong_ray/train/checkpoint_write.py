"""One rank's way of writing checkpoints: the loop waits for a snapshot, a thread does the rest while it goes on.

    take    the loop: the state is copied aside, as the plan's `checkpoint_snapshot` says:
            memory   into host memory (train/snapshot.py)
            disk     into a file on the node's own disk
            none     to the storage at once
    start   a thread: the files go to the storage, then `part-00000.json`, which says what this rank wrote
    commit  rank 0's thread: once every rank's record is there, the records are joined into the manifest, written last

Flows in: the engine and what the manifest is to say. Flows out: a committed checkpoint, made known by `committed`. The
thread calls no collective: ranks meet in the folder. One checkpoint is on its way at a time. What fails in a thread is
raised in the loop of every rank at its next step (`status` rides on the step's own reduction), and leaves a folder
without a manifest, which is no checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from ultralong_ray.object_store import is_transient
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import FLOAT32_BYTES, from_rank0
from ultralong_ray.train.checkpoint_files import (
    MANIFEST_FILE,
    Buffer,
    FileEntry,
    Manifest,
    PartEntry,
    pieces_of,
    write_file,
)
from ultralong_ray.train.partition import KINDS, Part, parts_of, share_of
from ultralong_ray.train.random_state import random_state
from ultralong_ray.train.snapshot import HostCopy
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

RECORD_FILE = "part-{:05d}.json"
LONGEST_POLL_SECONDS = 1.0
OUTAGES_OUTLASTED = 4  # each as long as object_store.PATIENCE_SECONDS allows
FINISH_SECONDS = 60.0

Snapshot = Literal["memory", "disk", "none"]
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was committed, as rank 0 saw it."""

    step: int
    name: str  # its folder
    blocked_seconds: float  # the loop stood still, `waited_seconds` included
    waited_seconds: float  # for the checkpoint before to be uploaded
    written_seconds: float  # from the snapshot to this rank's files on the storage
    uploaded_seconds: float  # from the snapshot to the manifest: all ranks
    num_bytes: int  # of all ranks' files


@dataclass(slots=True)
class _Pending:
    """The checkpoint on its way."""

    about: Manifest
    name: str
    state: FileEntry | None = None  # of the state file where the loop has written it
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parts: dict[str, PartEntry] = field(default_factory=dict)
    random: bytes = b""
    waited_seconds: float = 0.0
    blocked_seconds: float = 0.0
    taken: float = 0.0  # time.perf_counter() when the loop went on
    started: bool = False
    error: BaseException | None = None
    written: threading.Event = field(default_factory=threading.Event)  # this rank's part is there, or failed
    done: threading.Event = field(default_factory=threading.Event)


class CheckpointWriter:
    """`committed(saved)` and, before the manifest is written, `before_commit()` are called in rank 0's thread.

    Making it is collective. `root` is the folder of all checkpoints; `local` a folder on the node's own disk, for the
    snapshot "disk".
    """

    def __init__(
        self,
        engine: Any,
        root: Location,
        snapshot: Snapshot,
        local: Path | None,
        committed: Callable[[Saved], None],
        before_commit: Callable[[], None],
    ) -> None:
        self.engine, self.root, self.snapshot = engine, root, snapshot
        self.committed, self.before_commit = committed, before_commit
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.attempt: str = from_rank0(lambda: uuid.uuid4().hex[:6])
        self.local = _emptied(local, self.attempt) if snapshot == "disk" and local is not None else None
        self.known_step = 0  # the newest committed one that all ranks know of
        self.pending: _Pending | None = None
        self.copy: HostCopy | None = None
        numel = sum(part.numel for part in self._shares()) * len(KINDS)
        self.num_bytes = numel * FLOAT32_BYTES  # of this rank's state
        if snapshot == "memory":  # now, since pinning it takes longer than copying into it
            self.copy = HostCopy(numel, engine.device)
        self._stop = threading.Event()

    def take(self, about: Manifest) -> float:
        """Copy the state aside; the seconds that took, with the wait for the checkpoint before. Collective.

        `about` says step, identity, layout and cursor. Raises what the checkpoint before failed with, on all ranks.
        """
        began = time.perf_counter()
        former = self.pending
        self.wait()
        pending = self.pending = _Pending(about, f"step-{about.step:08d}-{self.attempt}")
        pending.waited_seconds = time.perf_counter() - began
        if former is not None and pending.waited_seconds > 1.0:
            logger.info(
                "the checkpoint of step %d waited %.1f s until that of step %d was uploaded",
                *(about.step, pending.waited_seconds, former.about.step),
            )
        try:
            self._take(pending)
        except Exception as error:
            pending.error = error
        pending.taken = time.perf_counter()
        pending.blocked_seconds = pending.taken - began
        return pending.blocked_seconds

    def start(self) -> None:
        """Let a thread write and commit what was taken."""
        pending = self.pending
        assert pending is not None
        pending.started = True
        thread = threading.Thread(target=self._finish, args=(pending,), name="checkpoint", daemon=True)
        thread.start()

    def failed(self) -> bool:
        """Has the checkpoint on its way failed on this rank?"""
        return self.pending is not None and self.pending.error is not None

    def committed_step(self) -> int:
        """The newest step that this rank knows to be committed; rank 0 knows first."""
        pending = self.pending
        if self.rank == 0 and pending is not None and pending.done.is_set() and pending.error is None:
            return pending.about.step
        return self.known_step

    def wait(self) -> None:
        """Until the checkpoint on its way is committed. Collective; raises what went wrong on any rank, on all."""
        pending = self.pending
        if pending is None:
            return
        pending.written.wait()
        self._raise_any(pending)
        if self.rank == 0:
            pending.done.wait()
        self._raise_any(pending)
        self.known_step, self.pending = pending.about.step, None

    def finish(self) -> None:
        """Let the checkpoint on its way be committed though the run ends in an error. Not collective: every rank's
        thread writes on by itself. What takes longer than FINISH_SECONDS is lost; an error is not held back for it."""
        pending, deadline = self.pending, time.monotonic() + FINISH_SECONDS
        while pending is not None and pending.started and time.monotonic() < deadline:
            if self._stop.is_set() or pending.error is not None or self._is_sealed(pending):
                break
            time.sleep(LONGEST_POLL_SECONDS / 4)
        self.abandon()

    def _is_sealed(self, pending: _Pending) -> bool:
        if self.rank == 0:
            return pending.done.is_set()
        with suppress(OSError, UserError):  # a storage that is away
            return (self.root / pending.name / MANIFEST_FILE).exists()
        return False

    def abandon(self) -> None:
        """Stop to wait for other ranks: the run ends without this checkpoint."""
        self._stop.set()

    def _raise_any(self, pending: _Pending) -> None:
        mine = None if pending.error is None else _in_words(pending, self.rank)
        of_ranks: list[tuple[bool, str] | None] = [None] * self.world_size
        dist.all_gather_object(of_ranks, mine)
        found = [entry for entry in of_ranks if entry is not None]
        if found:
            self.abandon()
            for_user, words = max(found)  # what the user can mend first
            raise UserError(words) if for_user else RuntimeError(words)

    def _take(self, pending: _Pending) -> None:
        parts, offset = self._shares(), 0
        for part in parts:
            pending.parts[part.name] = PartEntry(part.start, part.numel, self._state_file, offset)
            offset += part.numel * len(KINDS) * FLOAT32_BYTES
        pending.shapes = {part.name: part.shape for part in parts}
        pending.random = random_state()
        tensors = (part.get(kind) for part in parts for kind in KINDS)
        if self.copy is not None:
            self.copy.fill(tensors)
        else:
            target = self.root / pending.name if self.local is None else Location.of(self.local / pending.name)

            def pieces() -> Iterator[Buffer]:
                for part in parts:
                    for kind in KINDS:
                        yield part.get(kind).cpu().numpy().data

            pending.state = self._patiently(lambda: write_file(target / self._state_file, pieces))

    def _shares(self) -> list[Part]:
        """What this rank writes."""
        shares = [share_of(part, self.rank, self.world_size) for part in parts_of(self.engine)]
        return [part for part in shares if part.numel]

    @property
    def _state_file(self) -> str:
        return f"state-{self.rank:05d}.bin"

    def _finish(self, pending: _Pending) -> None:
        try:
            if pending.error is None:
                self._write(pending)
                written_seconds = time.perf_counter() - pending.taken
                pending.written.set()
                if self.rank == 0:
                    self._commit(pending, written_seconds)
        except BaseException as error:
            pending.error = error
        finally:
            pending.done.set()
            pending.written.set()

    def _write(self, pending: _Pending) -> None:
        """This rank's files, then its record."""
        folder, random_file = self.root / pending.name, f"random-{self.rank:05d}.pt"
        files = {self._state_file: self._state_entry(pending, folder)}
        files[random_file] = self._patiently(lambda: write_file(folder / random_file, lambda: [pending.random]))
        record = {
            "shapes": pending.shapes,
            "parts": {name: asdict(entry) for name, entry in pending.parts.items()},
            "files": {name: asdict(entry) for name, entry in files.items()},
        }
        self._patiently(lambda: (folder / RECORD_FILE.format(self.rank)).write_bytes(json.dumps(record).encode()))

    def _state_entry(self, pending: _Pending, folder: Location) -> FileEntry:
        """The state file, on the storage."""
        if self.local is None and pending.state is not None:
            return pending.state
        if self.local is None:
            copy = self.copy
            assert copy is not None
            return self._patiently(lambda: write_file(folder / self._state_file, copy.pieces))
        source = self.local / pending.name / self._state_file
        entry = self._patiently(lambda: write_file(folder / self._state_file, lambda: pieces_of(source)))
        if entry != pending.state:
            raise RuntimeError(f"{source} is not what was written there before: the disk is at fault")
        source.unlink()
        with suppress(OSError):  # other ranks of this node have theirs there
            source.parent.rmdir()
        return entry

    def _commit(self, pending: _Pending, written_seconds: float) -> None:
        folder = self.root / pending.name
        manifest = _joined(pending.about, self._records(folder))
        for rank in range(self.world_size):  # a checkpoint holds nothing that its manifest does not vouch for
            with suppress(FileNotFoundError):
                self._patiently((folder / RECORD_FILE.format(rank)).delete_file)

        def seal() -> None:
            self.before_commit()  # again after an outage, in which another attempt may have begun
            (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())

        self._patiently(seal)
        saved = Saved(
            step=pending.about.step,
            name=pending.name,
            blocked_seconds=round(pending.blocked_seconds, 3),
            waited_seconds=round(pending.waited_seconds, 3),
            written_seconds=round(written_seconds, 3),
            uploaded_seconds=round(time.perf_counter() - pending.taken, 3),
            num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
        )
        self._patiently(lambda: self.committed(saved))

    def _records(self, folder: Location) -> list[dict[str, Any]]:
        """What every rank wrote, by rank, as soon as all have. Raises RuntimeError when the run is given up."""
        wanted = [RECORD_FILE.format(rank) for rank in range(self.world_size)]
        pause = 0.005
        while not set(wanted) <= {file.name for file in self._patiently(folder.files)}:
            if self._stop.wait(pause):
                raise RuntimeError("the run was given up before all ranks had written")
            pause = min(pause * 1.5, LONGEST_POLL_SECONDS)
        return [json.loads(self._patiently((folder / name).read_bytes)) for name in wanted]

    def _patiently(self, operation: Callable[[], Value]) -> Value:
        """The operation's value, begun again while the storage is away. A long upload outlives a storage's absence at
        its end, for which the patience of a single request, counted from its beginning, is used up."""
        for left in reversed(range(OUTAGES_OUTLASTED)):
            try:
                return operation()
            except (OSError, UserError) as error:
                if left == 0 or self._stop.is_set() or not is_transient(error):
                    raise
                logger.warning("a checkpoint waits for its storage, which does not answer (%s)", error)
        raise AssertionError("the last attempt returns or raises")


def _in_words(pending: _Pending, rank: int) -> tuple[bool, str]:
    """(Can the user mend it?, what happened)."""
    error = pending.error
    where = f"the checkpoint of step {pending.about.step} could not be written by rank {rank}"
    return isinstance(error, UserError), f"{where}: {error}" if isinstance(error, UserError) else f"{where}: {error!r}"


def _emptied(local: Path, attempt: str) -> Path:
    """`local`, without what attempts before this one left there."""
    local.mkdir(parents=True, exist_ok=True)
    for left in local.iterdir():
        if not left.name.endswith(attempt):
            shutil.rmtree(left, ignore_errors=True)
    return local


def _joined(about: Manifest, records: list[dict[str, Any]]) -> Manifest:
    shapes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, list[PartEntry]] = {}
    files: dict[str, FileEntry] = {}
    for record in records:
        shapes |= {name: tuple(shape) for name, shape in record["shapes"].items()}
        files |= {name: FileEntry(e["num_bytes"], tuple(e["blocks"])) for name, e in record["files"].items()}
        for name, entry in record["parts"].items():
            parts.setdefault(name, []).append(PartEntry(**entry))
    return replace(about, shapes=shapes, parts=parts, files=files)
