"""Shards to documents: formats, globs, parts, and what is said of every kind of bad shard and row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultralong_ray.config import SourceConfig
from ultralong_ray.data import corpus
from ultralong_ray.data.corpus import DocumentColumns, list_parts, list_shards, read_documents
from ultralong_ray.types import Document, UserError

ROWS = [{"id": f"d{i}", "domain": "code" if i % 2 else "books", "text": f"text {i}\nsecond line"} for i in range(7)]
DOCUMENTS = [Document(**row) for row in ROWS]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_all(source: SourceConfig) -> list[Document]:
    columns = DocumentColumns.of(source)
    return [d for part in list_parts(list_shards(source), columns.names) for d in read_documents(part, columns)]


def refused(path: Path | str, **source: Any) -> str:
    with pytest.raises(UserError) as error:
        read_all(SourceConfig(uri=str(path), **source))
    return str(error.value)


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (tmp_path / "d.jsonl.zst").write_bytes(pa.compress(jsonl(ROWS), codec="zstd", asbytes=True))
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst"):
        assert read_all(SourceConfig(uri=str(tmp_path / name))) == DOCUMENTS, name


def test_last_line_needs_no_newline_and_lines_may_straddle_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "READ_BYTES", 7)
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS).rstrip(b"\n"))
    assert read_all(SourceConfig(uri=str(tmp_path / "a.jsonl"))) == DOCUMENTS


def test_folder_and_glob_take_shards_only(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for name in ("x-0.parquet", "x-1.parquet", "code/y-0.parquet"):
        write_parquet(tmp_path / name, ROWS)
    (tmp_path / "README.md").write_text("not a shard")
    (tmp_path / "_SUCCESS.json").write_text("{}")
    (tmp_path / "stats.json").write_text("{}")

    def names(uri: str) -> list[str]:
        return [str(s.location).removeprefix(f"{tmp_path}/") for s in list_shards(SourceConfig(uri=uri))]

    assert names(str(tmp_path)) == ["code/y-0.parquet", "x-0.parquet", "x-1.parquet"]
    assert names(f"{tmp_path}/*.parquet") == ["x-0.parquet", "x-1.parquet"]
    assert names(f"{tmp_path}/**/*-0.parquet") == ["code/y-0.parquet", "x-0.parquet"]
    assert names(f"{tmp_path}/x-[1-9].parquet") == ["x-1.parquet"]


def test_large_parquet_is_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PART_BYTES", 1)
    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=3)
    parts = list_parts(list_shards(SourceConfig(uri=str(path))), ("id",))
    assert [(p.first_group, p.end_group, p.first_row) for p in parts] == [(0, 1, 0), (1, 2, 3), (2, 3, 6)]
    assert read_all(SourceConfig(uri=str(path))) == DOCUMENTS


def test_columns_can_be_named_and_the_domain_fixed(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"key": 7, "body": "hello"}])
    source = SourceConfig(uri=str(path), text_column="body", id_column="key", domain="web")
    assert read_all(source) == [Document("7", "web", "hello")]


def test_missing_and_empty_places(tmp_path: Path) -> None:
    assert "nothing is there" in refused(tmp_path / "absent.parquet")
    (tmp_path / "folder").mkdir()
    assert "holds no shard" in refused(tmp_path / "folder")
    assert "holds no shard" in refused(f"{tmp_path}/folder/*.parquet")
    (tmp_path / "data.txt").write_text("x")
    assert "format unknown" in refused(tmp_path / "data.txt")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz"])
def test_empty_shard(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    message = refused(tmp_path / name)
    assert name in message and "empty" in message


def test_shard_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({k: pa.array([], pa.string()) for k in ("id", "domain", "text")}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n")
    assert "no rows" in refused(tmp_path / "a.parquet")
    assert "no rows" in refused(tmp_path / "b.jsonl")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst"])
def test_truncated_shard(tmp_path: Path, name: str) -> None:
    whole = {
        "a.parquet": write_parquet(tmp_path / "whole", ROWS).read_bytes(),
        "a.jsonl.gz": gzip.compress(jsonl(ROWS * 50)),
        "a.jsonl.zst": pa.compress(jsonl(ROWS * 50), codec="zstd", asbytes=True),
    }[name]
    (tmp_path / name).write_bytes(whole[:-20])
    message = refused(tmp_path / name)
    assert name in message and "truncated" in message


def test_wrong_format(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(jsonl(ROWS))
    assert "cannot be read as parquet" in refused(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.jsonl", ROWS)
    assert "not valid JSON" in refused(tmp_path / "b.jsonl")


def test_missing_column_names_what_is_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    message = refused(tmp_path / "a.parquet", text_column="content")
    assert "no column 'content'" in message and "id, domain, text" in message and "text_column" in message
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS))
    assert "line 1: no field 'content'" in refused(tmp_path / "b.jsonl", text_column="content")


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("text", None, "text is null"),
        ("text", "", "text is empty"),
        ("id", None, "id is null"),
        ("domain", "", "domain is empty"),
    ],
)
def test_bad_rows_are_counted_and_the_first_named(tmp_path: Path, column: str, value: Any, complaint: str) -> None:
    rows = [{**row, column: value} if i in (3, 5) else row for i, row in enumerate(ROWS)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    message = refused(tmp_path / "a.parquet")
    assert "a.parquet: 2 bad rows of 7" in message and f"row 3: {complaint}" in message
    assert f"line 4: {complaint}" in refused(tmp_path / "b.jsonl")


def test_wrong_types_and_encodings(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{**row, "text": i} for i, row in enumerate(ROWS)])
    assert "row 0: text is int, not a string" in refused(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(jsonl([ROWS[0], {**ROWS[1], "text": ["x"]}, [1], {**ROWS[2], "text": "\ud800"}]))
    message = refused(tmp_path / "b.jsonl")
    assert "3 bad rows of 4" in message and "line 2: text is list" in message
    (tmp_path / "c.jsonl").write_bytes(b'{"id": "a", "domain": "b", "text": "\xff\xfe"}\n')
    assert "line 1: not valid JSON" in refused(tmp_path / "c.jsonl")
    table = pa.Table.from_pylist(ROWS[:1]).set_column(2, "text", pa.array([b"\xff\xfe"]).view(pa.string()))
    pq.write_table(table, tmp_path / "d.parquet")
    assert "row 0: not valid UTF-8" in refused(tmp_path / "d.parquet")
