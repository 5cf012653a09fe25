"""Which files of a folder, a glob or an address are shards; none of them is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ultralong_ray.config import SourceConfig
from ultralong_ray.data.corpus import list_shards
from ultralong_ray.types import UserError


def names(folder: Path, below: str, **source: Any) -> list[str]:
    """The shards of `<folder>/<below>`, relative to the folder."""
    shards = list_shards(SourceConfig(uri=f"{folder}/{below}", **source))
    return [str(shard.location).removeprefix(f"{folder}/") for shard in shards]


def test_folder_and_glob_take_shards_only(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for name in ("x-0.parquet", "x-1.parquet", "code/y-0.parquet"):
        (tmp_path / name).touch()
    (tmp_path / "README.md").write_text("not a shard")
    (tmp_path / "_SUCCESS.json").write_text("{}")
    (tmp_path / "stats.json").write_text("{}")
    assert names(tmp_path, "") == ["code/y-0.parquet", "x-0.parquet", "x-1.parquet"]
    assert names(tmp_path, "*.parquet") == ["x-0.parquet", "x-1.parquet"]
    assert names(tmp_path, "**/*-0.parquet") == ["code/y-0.parquet", "x-0.parquet"]
    assert names(tmp_path, "x-[1-9].parquet") == ["x-1.parquet"]


def test_globs_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "].jsonl", "br[1]/x-0.jsonl", "br[1]/x-1.jsonl", "br1/x-0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path, "[!a].jsonl") == ["].jsonl", "b.jsonl"]
    assert names(tmp_path, "[!]a].jsonl") == ["b.jsonl"]
    assert names(tmp_path, "[]a].jsonl") == ["].jsonl", "a.jsonl"]
    assert names(tmp_path, "[!-a].jsonl") == ["].jsonl", "b.jsonl"]
    assert names(tmp_path, "[!a-].jsonl") == ["].jsonl", "b.jsonl"]
    assert names(tmp_path, "br[1]/*.jsonl") == ["br[1]/x-0.jsonl", "br[1]/x-1.jsonl"]  # the folder of this name
    assert names(tmp_path, "br[1]/x-[1-9].jsonl") == ["br[1]/x-1.jsonl"]
    assert names(tmp_path, "b[r]1/*.jsonl") == ["br1/x-0.jsonl"]
    with pytest.raises(UserError, match="holds no shard"):
        names(tmp_path, "br1[!a]x-0.jsonl")  # a slash is never one of a set
    for absent in ("br[1]/absent.jsonl", "br[1", "[]"):
        with pytest.raises(UserError, match="holds no shard"):
            names(tmp_path, absent)
    with pytest.raises(UserError, match=r"the set \[z-a\] in uri is none"):
        names(tmp_path, "[z-a].jsonl")


def test_hidden_and_temporary_folders_hold_no_shards(tmp_path: Path) -> None:
    source = tmp_path / "_made" / ".here"  # what is above the source says nothing of it
    for name in ("code/a.jsonl", ".ipynb_checkpoints/x.jsonl", "code/_temporary/0/y.jsonl", "_b.jsonl"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).touch()
    assert names(source, "") == ["code/a.jsonl"]


@pytest.mark.parametrize(
    ("uri", "words"), [("s3://", "'s3://' names no bucket"), ("/tmp/a\0b", r"is no address .* Write a path")]
)
def test_what_is_no_address(uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list_shards(SourceConfig(uri=uri))


def test_files_of_other_names_are_taken_by_a_glob_and_a_format(tmp_path: Path) -> None:
    (tmp_path / "part-0").touch()
    with pytest.raises(UserError, match=r'taken by a glob with format set, as in uri = "folder/\*"'):
        list_shards(SourceConfig(uri=str(tmp_path), format="parquet"))
    assert names(tmp_path, "*", format="parquet") == ["part-0"]
