"""Files, local or remote, and stage directories.

A `Location` is a URI that can be pickled into any process; its pyarrow filesystem is made where it is used. Local
paths, `s3://`, `gs://` come from pyarrow; another scheme from fsspec when the package for it is installed and its
addresses are `scheme://` and a path. Writes are atomic for a reader: a local file is renamed into place, an object
appears when its upload ends.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from ultralong_ray.object_store import explained, is_full, is_refusal, retried, s3_filesystem
from ultralong_ray.types import StorageOptions, UserError

SUCCESS_FILE = "_SUCCESS.json"

DEFAULT_OPTIONS = StorageOptions()
Value = TypeVar("Value")


@lru_cache(maxsize=64)
def _filesystem_of(root: str, options: StorageOptions) -> pafs.FileSystem:
    """Filesystem for `scheme://authority`; the empty root is the local disk."""
    if not root:
        return pafs.LocalFileSystem()
    scheme, authority = root.split("://", 1)
    try:
        if scheme == "s3":
            return s3_filesystem(root, options)
        filesystem, path = pafs.FileSystem.from_uri(root)
    except OSError as error:
        raise explained(error, root) from error
    except (ValueError, NotImplementedError):
        return _fsspec_filesystem(scheme, root)
    if path != authority:
        raise _unread(root)
    return filesystem


def _fsspec_filesystem(scheme: str, root: str) -> pafs.FileSystem:
    """Raises UserError where fsspec has none, or one for which an address is more, or less, than its path."""
    import fsspec
    from fsspec.core import strip_protocol

    try:
        if f"{scheme}://{strip_protocol(root).lstrip('/')}" != root:
            raise _unread(root)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (TypeError, OSError) as error:  # it takes arguments, or an archive that its address does not name
        raise _unread(root) from error
    except (ValueError, ImportError) as error:
        raise UserError(f"{root}: no filesystem for the scheme {scheme!r} ({error})") from error


def _unread(root: str) -> UserError:
    return UserError(
        f"{root}: an address such as this of the scheme {root.split('://', 1)[0]!r} is more than scheme://path and is "
        f"not read; copy the files to a disk or to a bucket (s3://BUCKET, gs://BUCKET) and name that"
    )


def _normalised(text: str) -> str:
    """The URI, its scheme in lower case, or absolute path that is meant. Raises UserError for a mistyped address."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)(.*)", text, re.DOTALL)
    if found is None:
        return text.rstrip("/") if "://" in text else os.path.abspath(os.path.expanduser(text))
    scheme, slash, rest = found[1].lower(), found[2], found[3]
    if not slash:
        address = f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"
        raise UserError(f"{text!r} has one slash after its scheme; write {address}, or ./{text} for a folder here")
    if scheme == "file":
        path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        if not path.startswith(("/", "~")):
            raise UserError(f"{text!r}: file:// names a path of this machine; write file:///{rest}")
        return os.path.abspath(os.path.expanduser(path))
    if "://" in rest:
        raise UserError(f"{text!r} is one address within another, which is not read; unpack it and name the folder")
    rest = rest.rstrip("/")
    if not rest or rest.startswith("/"):
        raise UserError(f"{text!r} names no bucket; write {scheme}://{rest.lstrip('/') or 'BUCKET/FOLDER'}")
    if "//" in rest:
        raise UserError(f"{text!r} has an empty folder name; write {scheme}://{re.sub('/+', '/', rest)}")
    return f"{scheme}://{rest}"


@dataclass(frozen=True, slots=True)
class Location:
    """A file or folder by URI. `Location("s3://b/x") / "y"` is `s3://b/x/y`, reached with the same options."""

    uri: str
    options: StorageOptions = DEFAULT_OPTIONS

    @staticmethod
    def of(uri: str | Path | Location, options: StorageOptions = DEFAULT_OPTIONS) -> Location:
        """Normalise: a path without scheme becomes absolute, `file://` becomes a path, a scheme lower case.

        Raises UserError for a mistyped address.
        """
        return uri if isinstance(uri, Location) else Location(_normalised(str(uri)), options)

    @property
    def is_local(self) -> bool:
        return "://" not in self.uri

    @property
    def path(self) -> str:
        """Path as the filesystem wants it: without scheme; buckets first for object stores."""
        return self.uri if self.is_local else self.uri.split("://", 1)[1]

    @property
    def filesystem(self) -> pafs.FileSystem:
        if self.is_local:
            return _filesystem_of("", DEFAULT_OPTIONS)
        scheme, rest = self.uri.split("://", 1)
        return _filesystem_of(f"{scheme}://{rest.split('/', 1)[0]}", self.options)

    @property
    def asked_once(self) -> Location:
        """The same, not asked again where a store does not answer: for what can do without."""
        return replace(self, options=replace(self.options, max_attempts=1))

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Location:
        return replace(self, uri=self.uri.rsplit("/", 1)[0])

    def __truediv__(self, name: str) -> Location:
        return replace(self, uri=f"{self.uri}/{name}")

    def __str__(self) -> str:
        return self.uri

    def info(self) -> pafs.FileInfo:
        return self._retried(lambda: self.filesystem.get_file_info(self.path))

    def exists(self) -> bool:
        return self.info().type != pafs.FileType.NotFound

    def is_dir(self) -> bool:
        return self.info().type == pafs.FileType.Directory

    def size(self) -> int:
        return self.info().size

    def files(self, *, recursive: bool = False) -> list[Location]:
        """Files below a folder, sorted by path; an absent folder has none, and neither has a file."""
        prefix = "" if self.is_local else self.uri.split("://", 1)[0] + "://"
        return [replace(self, uri=prefix + info.path) for info in self._infos(recursive)]

    def state(self) -> str:
        """Sixteen digits that change with a name, size or time of the files below a folder."""
        listed = [(info.path, info.size, info.mtime_ns) for info in self._infos(recursive=True)]
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]

    def _infos(self, recursive: bool) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        try:
            infos = self._retried(lambda: self.filesystem.get_file_info(selector))
        except NotADirectoryError:
            return []
        return sorted((info for info in infos if info.is_file), key=lambda info: info.path)

    def open_input(self) -> pa.NativeFile:
        """A file for reading at any place."""
        return self._retried(lambda: self.filesystem.open_input_file(self.path))

    def read_bytes(self) -> bytes:
        def read() -> bytes:
            with self.filesystem.open_input_stream(self.path, compression=None) as stream:
                return stream.read()

        return self._retried(read)

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def make_dir(self) -> Location:
        self._retried(lambda: self.filesystem.create_dir(self.path, recursive=True))
        return self

    def delete_dir(self) -> None:
        """Delete all files below; an absent folder is no error. A store's file of the very same name stays."""
        kind = self.info().type
        if kind == pafs.FileType.File and not self.is_local:  # pyarrow takes the name for the file's alone
            for file in self.files(recursive=True):
                file.delete_file()
        elif kind != pafs.FileType.NotFound:
            self._retried(lambda: self.filesystem.delete_dir(self.path))

    def delete_file(self) -> None:
        self._retried(lambda: self.filesystem.delete_file(self.path))

    def _retried(self, operation: Callable[[], Value]) -> Value:
        return retried(operation, self.options.max_attempts)

    @contextlib.contextmanager
    def open_for_write(self) -> Iterator[Any]:
        """A binary sink whose file appears only when the block ends without an error.

        Where it ends with one a local file stays as it was, and an object is gone. Raises UserError where a local file
        cannot be.
        """
        target = f"{self.path}.{uuid.uuid4().hex[:8]}.tmp" if self.is_local else self.path
        try:
            with explain_full_disk(self.uri), self._sink(target) as sink:
                try:
                    yield sink
                except BaseException:
                    if not self.is_local:  # an upload can be ended and not given up
                        with contextlib.suppress(OSError):
                            sink.close()
                            self.filesystem.delete_file(target)
                    raise
            if self.is_local:
                os.replace(target, self.path)
        except BaseException:
            if self.is_local and os.path.exists(target):
                os.unlink(target)
            raise

    def _sink(self, target: str) -> pa.NativeFile:
        if not self.is_local:
            return self.filesystem.open_output_stream(target, compression=None)
        try:
            with explain_full_disk(self.uri):
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                if os.path.isdir(self.path):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                return self.filesystem.open_output_stream(target, compression=None)
        except OSError as error:
            raise UserError(f"{self.uri} cannot be written ({error.strerror or error}); name another place") from error

    def write_with(self, fill: Callable[[Any], Value]) -> Value:
        """Write the file by `fill(sink)`, from its start again while the store does not answer; what it returned."""

        def write() -> Value:
            with self.open_for_write() as sink:
                return fill(sink)

        return self._retried(write)

    def write_bytes(self, data: bytes) -> None:
        self.write_with(lambda sink: sink.write(data))

    def write_json(self, value: Any) -> None:
        self.write_bytes((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


@contextlib.contextmanager
def explain_full_disk(where: str) -> Iterator[None]:
    """Turn ENOSPC, and what a full store says, into a message that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise explained(error, where) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{where}: no space left. Free space there, or set `workdir` to a larger disk or an s3:// URI, "
            f"and submit again: finished stages and checkpoints are kept"
        ) from error


@contextlib.contextmanager
def refusals_in_words() -> Iterator[None]:
    """Around a command: what a store or a disk refuses becomes the UserError that says what mends it."""
    try:
        yield
    except OSError as error:
        if not is_refusal(error):
            raise
        raise explained(error, "the storage") from error


def copy_file(source: Path | Location, target: Location) -> None:
    """Copy one file, local or remote on either side, from its start again while a store does not answer.

    Raises UserError where the target has no room left.
    """
    origin = Location.of(source)

    def copy() -> None:
        pafs.copy_files(
            origin.path, target.path, source_filesystem=origin.filesystem, destination_filesystem=target.filesystem
        )

    with explain_full_disk(target.uri):
        target.parent.make_dir()
        retried(copy, (origin if target.is_local else target).options.max_attempts)


def copy_files(source: Location, target: Location, *, skip: tuple[str, ...] = ()) -> None:
    """Copy every file below `source` to the same relative path below `target`."""
    for item in source.files(recursive=True):
        relative = item.uri[len(source.uri) + 1 :]
        if relative not in skip:
            copy_file(item, target / relative)


def default_cache() -> Path:
    """Where remote folders are copied on this machine: `$XDG_CACHE_HOME/ultralong_ray`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ultralong_ray"


def local_folder(location: Location, cache: Path | None = None, *, skip_suffixes: tuple[str, ...] = ()) -> Path:
    """A local folder with the same files: the folder itself where it is local, else a copy below `cache`.

    A copy counts as long as names, sizes and times there are what they were; an outdated one is removed. Safe when many
    processes of one machine ask at once.
    """
    if location.is_local:
        return Path(location.path)
    digits = hashlib.sha256(location.uri.encode()).hexdigest()[:16]
    place = (cache or default_cache()) / f"{location.name[:40]}-{digits}"  # 40: of at most four bytes, in 255
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(place.name + ".lock")):
        copy = place / location.state()
        done = copy / ".complete"
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # an outdated copy, or half of one
            names = [file.uri[len(location.uri) + 1 :] for file in location.files(recursive=True)]
            skipped = tuple(name for name in names if skip_suffixes and name.endswith(skip_suffixes))
            copy_files(location, Location.of(copy), skip=skipped)
            copy.mkdir(parents=True, exist_ok=True)  # of no files
            done.touch()
    return copy


@dataclass(frozen=True, slots=True)
class StageDirectory:
    """`<workdir>/<stage>-<fingerprint>/`. It counts as done when `_SUCCESS.json`, written last, is there."""

    stage: str
    fingerprint: str
    location: Location

    @property
    def done(self) -> bool:
        return (self.location / SUCCESS_FILE).exists()

    @property
    def settled(self) -> bool:
        """Done, and not to be done again: failed cells of an evaluation are tried again, and a report is written anew
        after those and after stages that it could not show yet.
        """
        if not self.done:
            return False
        summary = self.summary()
        return not summary.get("num_failed") and not summary.get("num_unfinished_stages")

    def summary(self) -> dict[str, Any]:
        """What the stage recorded when it finished."""
        return (self.location / SUCCESS_FILE).read_json()

    def mark_done(self, summary: dict[str, Any]) -> None:
        (self.location / SUCCESS_FILE).write_json({"stage": self.stage, "fingerprint": self.fingerprint, **summary})
