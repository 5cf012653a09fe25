"""Files on local disk and behind the S3 protocol: atomic writes, listing, copying, and a full disk's message."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from ultralong_ray import storage
from ultralong_ray.config import Recipe
from ultralong_ray.data.tokenize import load_tokenizer
from ultralong_ray.model.extend import extend
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import Location, StageDirectory, copy_files, explain_full_disk, local_folder
from ultralong_ray.types import UserError


def exercise(root: Location, tmp_path: Path) -> None:
    stage = StageDirectory("prepare", "abc", root / "prepare-abc")
    assert not stage.done
    assert stage.location.files(recursive=True) == []
    (stage.location / "sequences" / "part-00000").write_bytes(b"x" * 1000)
    (stage.location / "manifest.json").write_json({"n": 1})
    stage.mark_done({"tokens": 5})
    assert stage.done
    assert stage.summary() == {"stage": "prepare", "fingerprint": "abc", "tokens": 5}
    names = [f.uri[len(stage.location.uri) + 1 :] for f in stage.location.files(recursive=True)]
    assert names == ["_SUCCESS.json", "manifest.json", "sequences/part-00000"]
    assert (stage.location / "sequences" / "part-00000").size() == 1000
    copy_files(stage.location, root / "copy", skip=("_SUCCESS.json",))
    assert (root / "copy" / "sequences" / "part-00000").read_bytes() == b"x" * 1000
    assert not (root / "copy" / "_SUCCESS.json").exists()
    exercise_copies(stage.location, tmp_path / "cache")
    (root / "copy").delete_dir()
    assert (root / "copy").files(recursive=True) == []


def exercise_copies(source: Location, cache: Path) -> None:
    if source.is_local:
        assert local_folder(source, cache) == Path(source.path)
        return
    folder = local_folder(source, cache, skip_suffixes=(".json",))
    assert [path.name for path in folder.rglob("*") if path.is_file() and path.name[0] != "."] == ["part-00000"]
    assert (folder / "sequences" / "part-00000").read_bytes() == b"x" * 1000
    (folder / "kept").touch()
    assert local_folder(source, cache) == folder, "the same files are not copied again"
    assert (folder / "kept").exists()
    (source / "sequences" / "part-00000").write_bytes(b"y" * 999)
    altered = local_folder(source, cache)
    assert (altered / "sequences" / "part-00000").read_bytes() == b"y" * 999
    assert not folder.exists(), "the outdated copy is removed"


def test_local(tmp_path: Path):
    exercise(Location.of(tmp_path / "run"), tmp_path)


def test_s3(s3_uri: str, tmp_path: Path):
    exercise(Location.of(s3_uri), tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path):
    target = Location.of(tmp_path / "a" / "file")
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), target.open_for_write() as sink:
        sink.write(b"new, half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert [f.name for f in target.parent.files()] == ["file"]


def test_an_interrupted_upload_leaves_no_half_object(s3_uri: str):
    target = Location.of(s3_uri) / "interrupted"
    for error in (KeyboardInterrupt, UserError):
        with pytest.raises(error), target.open_for_write() as sink:
            sink.write(b"new, half")
            raise error
        assert not target.exists()
    target.write_bytes(b"whole")
    assert target.read_bytes() == b"whole"


def test_where_the_store_takes_nothing_the_old_object_is_not_removed(monkeypatch: pytest.MonkeyPatch):
    class Refusing:
        """Of the upload's last request."""

        removed: ClassVar[list[str]] = []

        @contextlib.contextmanager
        def open_output_stream(self, path: str, compression: None) -> Iterator[Any]:
            yield SimpleNamespace(write=len, close=self.refuse)
            self.refuse()

        def refuse(self) -> None:
            raise OSError("no connection")

        def delete_file(self, path: str) -> None:
            self.removed.append(path)

    monkeypatch.setattr(Location, "filesystem", property(lambda _: Refusing()))
    with pytest.raises(OSError, match="no connection"):
        Location("s3://bucket/kept").write_bytes(b"new")
    with pytest.raises(KeyboardInterrupt), Location("s3://bucket/kept").open_for_write():
        raise KeyboardInterrupt
    assert Refusing.removed == []


def test_the_base_model_is_reached_as_the_recipe_says(
    s3_uri: str, tiny_llama: Path, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    base, endpoint = f"{s3_uri}/base", os.environ["AWS_ENDPOINT_URL"]
    copy_files(Location.of(tiny_llama), Location.of(base))
    monkeypatch.setattr(storage, "_filesystem_of", storage._filesystem_of.__wrapped__)  # it remembers the environment
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    recipe = tiny_recipe(model={"base": base}, storage={"endpoint": endpoint, "max_attempts": 1})
    assert load_tokenizer(base, None, recipe.storage.options).get_vocab()
    assert extend(recipe, stage_directory(recipe, "extend"))["base"] == base


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    assert Location.of(tmp_path / "file").files(recursive=True) == []
    with pytest.raises(UserError, match=r"file/below/x cannot be written \(.*\); name another place"):
        (Location.of(tmp_path / "file") / "below" / "x").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be written"):
        Location.of(tmp_path).write_bytes(b"")


def test_paths_are_normalised(tmp_path: Path):
    assert Location.of(f"file://{tmp_path}/x/").uri == f"{tmp_path}/x"
    assert Location.of("~/x").uri == f"{Path.home()}/x"
    assert (Location.of("s3://bucket/a/") / "b").uri == "s3://bucket/a/b"
    assert Location("s3://bucket/a/b").path == "bucket/a/b"


def test_a_full_disk_is_explained():
    with pytest.raises(UserError, match=r"/data/run: no space left.*workdir"), explain_full_disk("/data/run"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), explain_full_disk("/data/run"):
        raise PermissionError(errno.EACCES, "denied")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(UserError, match="no filesystem for the scheme 'nosuch'"):
        Location.of("nosuch://x/y").exists()


def test_folders_of_like_names_keep_copies_of_their_own(s3_uri: str, tmp_path: Path):
    one, other = Location.of(f"{s3_uri}/m/base_x"), Location.of(f"{s3_uri}/m_base/x")
    (one / "w").write_bytes(b"1")
    (other / "w").write_bytes(b"22")
    copies = [local_folder(place, tmp_path) for place in (one, other)]
    assert [(copy / "w").read_bytes() for copy in copies] == [b"1", b"22"]


def test_a_long_address_has_a_copy(s3_uri: str, tmp_path: Path):
    place = Location.of(s3_uri) / ("long" * 30) / ("é" * 90)
    (place / "w").write_bytes(b"1")
    assert (local_folder(place, tmp_path) / "w").read_bytes() == b"1"


def test_a_folder_beside_a_file_of_its_name_is_deleted(s3_uri: str):
    place = Location.of(s3_uri) / "both"
    for key in (place / "a", place / "b" / "c", place):
        key.write_bytes(b"x")
    place.delete_dir()
    assert place.files(recursive=True) == []
    assert place.read_bytes() == b"x"


def test_a_file_is_not_deleted_as_a_folder(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(OSError, match="file"):
        Location.of(tmp_path / "file").delete_dir()
    assert (tmp_path / "file").read_bytes() == b"x"
