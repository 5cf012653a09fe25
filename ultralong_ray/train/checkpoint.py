"""A training state in storage, which any number of ranks can write and any other number can read.

    checkpoints/step-00000004-1f0c2a/     one checkpoint; its files are those of train/checkpoint_files.py

Flows in: committed checkpoints (train/checkpoint_write.py) and the identity of the run. Flows out: an engine as it was
after a step, or the weights. Every rank has written the parts that it kept (train/partition.py) and reads the ranges
that it needs, whatever layout wrote them: ranks, sequence-parallel degrees and ZeRO stage may change in between.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint_files import (
    MANIFEST_FILE,
    Damaged,
    FileReader,
    Manifest,
)
from ultralong_ray.train.partition import KINDS, MASTER, adopt_masters, make_moments, parts_of
from ultralong_ray.train.random_state import restore_random_state
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # below a stage's directory
MODEL_PREFIX = "causal_lm."  # where LanguageModelLoss keeps the Hugging Face model
FLOAT32_BYTES = 4
NAME = re.compile(r"step-(\d{8,})-[0-9a-f]{6}")  # of a folder that CheckpointWriter makes; others are not ours
NEVER_COMMITTED = f"it has no {MANIFEST_FILE}: its upload was cut short"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a run continues from."""

    step: int
    name: str  # folder of the checkpoint
    passed_over: tuple[str, ...]  # newer checkpoints that are damaged, and how


def load_newest(
    engine: Any, root: Location, identity: dict[str, Any], accepted: tuple[str, ...] = ()
) -> Restored | None:
    """Restore this rank from the newest checkpoint below `root` that is whole; None where there is none. Collective.

    A damaged one is named in the log and the one before is taken. Raises UserError, naming the fields, when the
    checkpoint is of another run in a field not in `accepted`, and when all checkpoints are damaged.
    """
    names, torn = from_rank0(lambda: (committed(root), uncommitted(root)))
    passed_over: list[str] = []
    for name in names:
        failure: Exception | None = None
        try:
            manifest = Manifest.from_bytes(from_rank0((root / name / MANIFEST_FILE).read_bytes))
            if manifest.step != step_of(name):
                raise Damaged(f"{MANIFEST_FILE} is of step {manifest.step}")
            refuse_other(manifest.identity, identity, str(root / name), accepted)
            _read_own(engine, root / name, manifest)
        except (Damaged, UserError, OSError) as found:
            failure = found
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, failure)
        for found in of_ranks:
            if isinstance(found, UserError | OSError):
                raise found
        damages = "; ".join(sorted({str(found) for found in of_ranks if found is not None}))
        if not damages:
            adopt_masters(engine)
            passed_over += [f"{other}: {NEVER_COMMITTED}" for other in torn if other > name]
            return Restored(step_of(name), name, tuple(passed_over))
        passed_over.append(f"{name}: {damages}")
        if dist.get_rank() == 0:
            logger.warning("%s is damaged (%s); the checkpoint before it is used", root / name, damages)
    if passed_over:
        raise UserError(f"{root}: no checkpoint is whole ({' | '.join(passed_over)}). Remove it to start again")
    return None


def committed(root: Location) -> list[str]:
    """Checkpoints below `root` that have a manifest, the newest step first."""
    return sorted((path[0] for path in _paths(root) if path[1:] == [MANIFEST_FILE]), reverse=True)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint's folder. Raises ValueError for another name."""
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no checkpoint's folder; they are called step-00000004-1f0c2a")
    return int(found[1])


def uncommitted(root: Location) -> list[str]:
    """Checkpoints below `root` without a manifest, the newest step first: uploads that were cut short."""
    return sorted(folders(root) - set(committed(root)), reverse=True)


def forget_others(
    root: Location, kept: str, count: int, every_steps: int | None, seen: frozenset[str] | None = None
) -> None:
    """Remove, below `root`, all but `kept`, the `count` newest up to it and those of every `every_steps`-th step.

    What never got a manifest goes too, and what is newer than `kept`: a run that fell back has passed it over. Where
    `seen` is given, only those in it and those of `kept`'s own attempt go: what came up since is of another attempt,
    which may have replaced this one while it was cut off.
    """
    older = [name for name in committed(root) if step_of(name) < step_of(kept)]
    stays = {kept, *older[: count - 1], *(n for n in older if every_steps and step_of(n) % every_steps == 0)}
    attempt = kept.rsplit("-", 1)[-1]
    for name in sorted(folders(root) - stays):
        if seen is None or name in seen or name.endswith(attempt):
            with suppress(FileNotFoundError):
                (root / name / MANIFEST_FILE).delete_file()  # first: what is half removed is no checkpoint
            (root / name).delete_dir()


def folders(root: Location) -> frozenset[str]:
    """Checkpoints below `root` that have files, whole or not. What has another name is somebody else's."""
    return frozenset(path[0] for path in _paths(root) if len(path) > 1)


def _paths(root: Location) -> list[list[str]]:
    """Of every file of a checkpoint below `root`: the checkpoint's name and the rest of the way."""
    paths = [file.uri[len(root.uri) + 1 :].split("/") for file in root.files(recursive=True)]
    return [path for path in paths if NAME.fullmatch(path[0])]


def root_to_resume(stage: Location, identity: dict[str, Any], accepted: tuple[str, ...]) -> Location:
    """The checkpoints to continue from: those of the stage, or, with accepted fields and none yet, of a sibling.

    A recipe with another value has another stage directory, so a run that is to continue with that difference finds
    its past in `<section>-*` beside its own. Of the siblings that differ in accepted fields only, the one furthest on
    is taken. Raises UserError, naming the fields of the nearest one, where there are siblings but none fits.
    """
    own = stage / CHECKPOINTS
    if not accepted or committed(own):
        return own
    section = stage.name.rsplit("-", 1)[0]
    found: list[tuple[int, int, Location, Manifest]] = []
    for file in stage.parent.files(recursive=True):
        root = file.parent.parent
        ours = file.name == MANIFEST_FILE and NAME.fullmatch(file.parent.name) and root.name == CHECKPOINTS
        if ours and root.parent.name.startswith(f"{section}-"):
            with suppress(Damaged):
                manifest = Manifest.from_bytes(file.read_bytes())
                strange = sum(
                    manifest.identity.get(key) != identity.get(key)
                    for key in (manifest.identity.keys() | identity.keys()) - set(accepted)
                )
                found.append((-strange, manifest.step, root, manifest))
    if not found:
        return own
    _, _, root, manifest = max(found, key=lambda entry: entry[:2])
    refuse_other(manifest.identity, identity, str(root), accepted)
    return root


def refuse_other(saved: dict[str, Any], current: dict[str, Any], where: str, accepted: tuple[str, ...] = ()) -> None:
    """Raise UserError unless both identities are equal, but for the fields in `accepted`."""
    differing = {
        key: f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key) and key not in accepted
    }
    if differing:
        raise UserError(
            f"{where}: the checkpoint was made by another run ({'; '.join(differing.values())}). Restore those values, "
            f"accept them ({' '.join(f'--resume-anyway {key}' for key in differing)}), or remove the stage's "
            f"directory to start again"
        )


def full_weights(folder: Location) -> Iterator[tuple[str, torch.Tensor]]:
    """(name as in the Hugging Face model, float32 master weight) of every parameter, one at a time; tied ones once.

    Raises UserError when a file of the checkpoint is damaged.
    """
    try:
        manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes())
        with _Files(folder, manifest) as files:
            for name, shape in manifest.shapes.items():
                numel = int(np.prod(shape))
                yield name.removeprefix(MODEL_PREFIX), files.range_of(name, MASTER, 0, numel).view(shape)
    except Damaged as damage:
        raise UserError(f"{folder}: {damage}; remove this checkpoint to use the one before") from damage


def _read_own(engine: Any, folder: Location, manifest: Manifest) -> None:
    """This rank's parts, and its random states where a rank of this number wrote some. Raises Damaged."""
    make_moments(engine, manifest.step)
    with _Files(folder, manifest) as files:
        for part in parts_of(engine):
            if manifest.shapes.get(part.name) != part.shape:
                there = manifest.shapes.get(part.name, "absent")
                raise UserError(f"{folder}: parameter {part.name} is {there} there and {part.shape} here")
            for kind in KINDS:
                part.put(kind, files.range_of(part.name, kind, part.start, part.numel).to(engine.device))
        # Those of ranks that are no more: read by nobody, and checked all the same.
        rank, randoms = dist.get_rank(), sorted(name for name in manifest.files if name.startswith("random-"))
        for name in randoms[rank :: dist.get_world_size()]:
            files.reader(name).read(0, manifest.files[name].num_bytes)
        random_file = f"random-{rank:05d}.pt"
        if random_file in manifest.files:
            data = files.reader(random_file).read(0, manifest.files[random_file].num_bytes)
            restore_random_state(data)


class _Files:
    """The state files of a checkpoint, each opened when it is first needed and closed at the end of the block."""

    def __init__(self, folder: Location, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.open: dict[str, FileReader] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self.open.values():
            reader.close()

    def reader(self, name: str) -> FileReader:
        if name not in self.open:
            self.open[name] = FileReader(self.folder, name, self.manifest)
        return self.open[name]

    def range_of(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a parameter's master weight or moment, float32 [numel]."""
        values = np.empty(numel, np.dtype("<f4"))
        found = 0
        for entry in self.manifest.parts[name]:
            begin, end = max(start, entry.start), min(start + numel, entry.start + entry.numel)
            if begin >= end:
                continue
            element = KINDS.index(kind) * entry.numel + begin - entry.start
            data = self.reader(entry.file).read(entry.offset + element * FLOAT32_BYTES, (end - begin) * FLOAT32_BYTES)
            values[begin - start : end - start] = np.frombuffer(data, "<f4")
            found += end - begin
        if found != numel:
            raise Damaged(f"{MANIFEST_FILE} places {found} of {numel} elements of {name}")
        return torch.from_numpy(values)


def from_rank0(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank; what it raises there, too. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]
