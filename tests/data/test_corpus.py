"""Shards to documents: formats, globs, parts, and what is said of every kind of bad shard and row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import feather

from ultralong_ray.config import SourceConfig
from ultralong_ray.data import corpus, rows
from ultralong_ray.data.corpus import ShardPart, list_parts, list_shards
from ultralong_ray.data.rows import DocumentColumns, Quarantine, read_documents, read_tokenized
from ultralong_ray.types import Document, UserError

ROWS = [{"id": f"d{i}", "domain": "code" if i % 2 else "books", "text": f"text {i}\nsecond line"} for i in range(7)]
DOCUMENTS = [Document(**row) for row in ROWS]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parts_of(source: SourceConfig) -> list[ShardPart]:
    return list_parts(list_shards(source), DocumentColumns.of(source).names)[0]


def read_with_bad(source: SourceConfig) -> tuple[list[Document], list[tuple[int, str]]]:
    """The documents, and (row within its part, reason) of the rows set aside."""
    documents, bad = [], []
    for part in parts_of(source):
        quarantine = Quarantine(part)
        documents += read_documents(part, DocumentColumns.of(source), quarantine)
        bad += [(row.row, row.reason) for row in quarantine.bad]
    return documents, bad


def read_all(source: SourceConfig) -> list[Document]:
    documents, bad = read_with_bad(source)
    assert not bad
    return documents


def refused(path: Path | str, **source: Any) -> str:
    with pytest.raises(UserError) as error:
        read_all(SourceConfig(uri=str(path), **source))
    return str(error.value)


def write_arrow(path: Path, rows: list[dict[str, Any]], *, stream: bool = False, rows_per_batch: int = 2) -> Path:
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, rows_per_batch)
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    write_arrow(tmp_path / "e.arrow", [{"other": 1, **row} for row in ROWS])
    write_arrow(tmp_path / "f.arrow", ROWS, stream=True)
    feather.write_feather(pa.Table.from_pylist(ROWS), str(tmp_path / "g.feather"))
    write_parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl(ROWS)))
    (tmp_path / "d.jsonl.zst").write_bytes(pa.compress(jsonl(ROWS), codec="zstd", asbytes=True))
    for name in ("a.parquet", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.arrow", "f.arrow", "g.feather"):
        assert read_all(SourceConfig(uri=str(tmp_path / name))) == DOCUMENTS, name


def test_last_line_needs_no_newline_and_lines_may_straddle_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "READ_BYTES", 7)
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS).rstrip(b"\n"))
    assert read_all(SourceConfig(uri=str(tmp_path / "a.jsonl"))) == DOCUMENTS


def test_a_wanted_column_that_is_there_twice(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    table = table.append_column("text", table["text"])
    pq.write_table(table, tmp_path / "a.parquet")
    for name, new in (("b.arrow", pa.ipc.new_file), ("c.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        assert f"{name}: has 2 columns 'text'. Name another column of id, domain, text, text" in refused(
            tmp_path / name
        )


def test_large_parquet_is_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PART_BYTES", 1)
    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=3)
    source = SourceConfig(uri=str(path))
    assert [(p.start, p.end, p.first_row) for p in parts_of(source)] == [(0, 1, 0), (1, 2, 3), (2, 3, 6)]
    assert read_all(source) == DOCUMENTS
    source = SourceConfig(uri=str(write_arrow(tmp_path / "a.arrow", ROWS)))
    assert [(p.start, p.end, p.first_row) for p in parts_of(source)] == [
        (0, 1, 0),
        (1, 2, None),
        (2, 3, None),
        (3, 4, None),
    ]
    assert read_all(source) == DOCUMENTS


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


def test_an_arrow_stream_that_is_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    whole = write_arrow(path, ROWS, stream=True).read_bytes()
    with pa.ipc.open_stream(str(path)) as reader:
        first_batch = len(reader.schema.serialize())
        size = pa.ipc.get_record_batch_size(reader.read_next_batch())
    second = first_batch + size
    assert read_all(SourceConfig(uri=str(path))) == DOCUMENTS
    for content, complaint in (
        (whole[:second], f"stops at byte {second:,} of {second:,} without its end mark"),
        (whole[:-8], "gets its mark when pyarrow.ipc reads and writes it"),
        (whole[:second] + bytes(16) + whole[second + 16 :], "without its end mark"),
        (whole[: second + 4] + bytes(4) + whole[second + 8 :], f"ends at byte {second + 8:,} of {len(whole):,}"),
        (whole + whole, f"ends at byte {len(whole):,} of {2 * len(whole):,}; streams that were joined"),
    ):
        path.write_bytes(content)
        message = refused(path)
        assert "a.arrow: cannot be read as arrow" in message and complaint in message, message


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_offsets_out_of_bounds(tmp_path: Path, stream: bool) -> None:
    path = tmp_path / "a.arrow"
    whole = write_arrow(path, ROWS, stream=stream, rows_per_batch=7).read_bytes()
    offsets = pa.array([row["text"] for row in ROWS]).buffers()[1]
    assert offsets is not None and whole.count(offsets.to_pybytes()) == 1
    backwards = np.frombuffer(offsets, np.int32).copy()
    backwards[3] = -5
    path.write_bytes(whole.replace(offsets.to_pybytes(), backwards.tobytes()))
    message = refused(path)
    assert "a.arrow: cannot be read as arrow" in message and "offset" in message


def test_wrong_format(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(jsonl(ROWS))
    assert "cannot be read as parquet" in refused(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b"plain text\n" * 16)
    assert "every one of its" in refused(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(jsonl(ROWS))
    assert "cannot be read as jsonl" in refused(tmp_path / "c.jsonl.gz")


def test_a_bad_shard_can_be_left_out(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    (tmp_path / "c.jsonl").write_bytes(b"")
    source = SourceConfig(uri=str(tmp_path), on_bad_shard="skip")
    parts, skipped = list_parts(list_shards(source), ("id",), skip_bad=True)
    assert [p.shard.location.name for p in parts] == ["a.parquet"]
    assert [s.address.rsplit("/")[-1] for s in skipped] == ["b.parquet", "c.jsonl"]
    assert "truncated" in skipped[0].reason and "0 bytes" in skipped[1].reason
    with pytest.raises(UserError, match="no column 'nosuch'"):  # never taken for a bad shard
        list_parts(list_shards(source), ("nosuch",), skip_bad=True)


def test_missing_column_names_what_is_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    message = refused(tmp_path / "a.parquet", text_column="content")
    assert "no column 'content'" in message and "id, domain, text" in message and "text_column" in message
    write_arrow(tmp_path / "a.arrow", ROWS)
    assert "no column 'content'" in refused(tmp_path / "a.arrow", text_column="content")
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS * 3))
    message = refused(tmp_path / "b.jsonl", text_column="content")
    assert "line 1: no field 'content'; it has id, domain, text" in message


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("text", None, "text is null"),
        ("text", "", "text is empty"),
        ("id", None, "id is null"),
        ("domain", "", "domain is empty"),
    ],
)
def test_bad_rows_are_set_aside_with_their_reason(tmp_path: Path, column: str, value: Any, complaint: str) -> None:
    rows = [{**row, column: value} if i in (3, 5) else row for i, row in enumerate(ROWS)]
    good = [d for i, d in enumerate(DOCUMENTS) if i not in (3, 5)]
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    write_arrow(tmp_path / "c.arrow", rows)
    for name in ("a.parquet", "b.jsonl", "c.arrow"):
        assert read_with_bad(SourceConfig(uri=str(tmp_path / name))) == (good, [(3, complaint), (5, complaint)]), name


def test_wrong_types_and_encodings(tmp_path: Path) -> None:
    lines = [ROWS[0], {**ROWS[1], "text": ["x"]}, [1], {**ROWS[2], "text": "\ud800"}, {"id": "x"}]
    (tmp_path / "b.jsonl").write_bytes(jsonl(lines) + b'{"id": "a", "domain": "b", "text": "\xff\xfe"}\n')
    documents, bad = read_with_bad(SourceConfig(uri=str(tmp_path / "b.jsonl")))
    assert documents == DOCUMENTS[:1]
    reasons = [
        "text is list",
        "a JSON list",
        "text is not valid Unicode",
        "no field 'domain', 'text'",
        "not JSON that can be read",
    ]
    assert [row for row, _ in bad] == [1, 2, 3, 4, 5]
    assert all(reason.startswith(start) for (_, reason), start in zip(bad, reasons, strict=True)), bad
    texts = pa.array([b"good", b"\xff\xfe", b"fine"]).view(pa.string())
    table = pa.Table.from_pylist(ROWS[:3]).set_column(2, "text", texts)
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_file(str(tmp_path / "e.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("d.parquet", "e.arrow"):
        documents, bad = read_with_bad(SourceConfig(uri=str(tmp_path / name)))
        assert [d.text for d in documents] == ["good", "fine"]
        assert bad == [(1, "text is not valid UTF-8 (invalid start byte)")]


def test_json_beyond_what_python_reads_is_one_bad_row(tmp_path: Path) -> None:
    deep, long = b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", b'{"id": ' + b"9" * 5_000 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(deep + jsonl(ROWS) + long)
    documents, bad = read_with_bad(SourceConfig(uri=str(tmp_path / "a.jsonl")))
    assert documents == DOCUMENTS and [row for row, _ in bad] == [0, 8]
    assert all(reason.startswith("not JSON that can be read (") for _, reason in bad)


def test_an_excerpt_is_short_whatever_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([ROWS[0], {"id": None, "domain": "x", "text": "y" * 10**6}]))
    (part,) = parts_of(SourceConfig(uri=str(tmp_path / "a.jsonl")))
    quarantine = Quarantine(part)
    list(read_documents(part, DocumentColumns.of(SourceConfig(uri="x")), quarantine))
    assert quarantine.bad[0].excerpt.startswith("{'id': None") and len(quarantine.bad[0].excerpt) == 200


@pytest.mark.parametrize("size", [1, 7, 50, 200, 10**6])
def test_byte_ranges_give_every_line_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(corpus, "PART_BYTES", size)
    monkeypatch.setattr(rows, "READ_BYTES", 33)
    content = jsonl(ROWS[:3]) + b"\n\n" + jsonl(ROWS[3:]).rstrip(b"\n")
    (tmp_path / "a.jsonl").write_bytes(content)
    source = SourceConfig(uri=str(tmp_path / "a.jsonl"))
    assert len(parts_of(source)) == -(-len(content) // size)
    assert read_all(source) == DOCUMENTS
    lines = 0
    for part in parts_of(source):
        quarantine = Quarantine(part)
        list(read_documents(part, DocumentColumns.of(source), quarantine))
        lines += quarantine.lines
    assert lines == len(content.split(b"\n"))


def test_domain_from_the_address(tmp_path: Path) -> None:
    for name in ("code/py-0.jsonl", "web/en-1.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(jsonl([{"id": name, "text": "x"}]))

    def domains(pattern: str) -> list[str]:
        return [d.domain for d in read_all(SourceConfig(uri=str(tmp_path), domain_pattern=pattern))]

    assert domains("folder") == ["code", "web"]
    assert domains(r"/([a-z]+)-\d+\.jsonl$") == ["py", "en"]
    with pytest.raises(UserError, match=r"py-0\.jsonl: domain_pattern .* finds no domain"):
        domains(r"(german)")
    for pattern, complaint in (("(", "no regular expression"), ("abc", "no group")):
        with pytest.raises(ValueError, match=complaint):
            SourceConfig(uri="x", domain_pattern=pattern)
    with pytest.raises(ValueError, match="not both"):
        SourceConfig(uri="x", domain="a", domain_pattern="folder")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_documents_already_tokenised(tmp_path: Path, name: str) -> None:
    good = [{"id": f"g{i}", "domain": "x", "ids": list(range(i + 1))} for i in range(3)]
    bad = [{"id": "low", "domain": "x", "ids": [3, -1]}, {"id": "high", "domain": "x", "ids": [3, 10]}]
    bad += [{"id": "none", "domain": "x", "ids": None}, {"id": "empty", "domain": "x", "ids": []}]
    write = {"a.parquet": write_parquet, "a.arrow": write_arrow, "a.jsonl": lambda p, r: p.write_bytes(jsonl(r))}[name]
    write(tmp_path / name, good[:1] + bad + good[1:])
    source = SourceConfig(uri=str(tmp_path / name), input_ids_column="ids")
    (part,) = parts_of(source)
    quarantine = Quarantine(part)
    found = list(read_tokenized(part, DocumentColumns.of(source), 10, quarantine))
    assert [(d.id, d.input_ids.tolist(), d.input_ids.dtype.name) for d in found] == [
        (row["id"], row["ids"], "int32") for row in good
    ]
    reasons = ["ids holds id -1, the vocabulary has 10 entries", "ids holds id 10, the vocabulary has 10 entries"]
    assert [row.reason for row in quarantine.bad] == [*reasons, "ids is null", "ids is empty"]


def test_lists_of_something_else_are_no_token_ids(tmp_path: Path) -> None:
    values = [[1.5], ["a"], [1, None], [[1]], [True], 7, [2**70]]
    lines = [{"id": str(i), "domain": "x", "ids": v} for i, v in enumerate(values)]
    (tmp_path / "a.jsonl").write_bytes(jsonl([*lines, {"id": "good", "domain": "x", "ids": [1]}]))
    source = SourceConfig(uri=str(tmp_path / "a.jsonl"), input_ids_column="ids")
    quarantine = Quarantine(parts_of(source)[0])
    (found,) = read_tokenized(quarantine.part, DocumentColumns.of(source), 10, quarantine)
    assert found.id == "good" and len(quarantine.bad) == len(values)
