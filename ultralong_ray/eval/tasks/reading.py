"""Benchmark files, local or in object storage, to plain values. Every complaint names the file, and the line if any.

Read are JSON, JSON lines and text, each also as `.gz`, and Parquet.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultralong_ray.storage import Location
from ultralong_ray.types import UserError

_BEYOND_PYTHON = "JSON that Python does not read, for a number too long or lists nested too deeply"


def read_text(file: Location) -> str:
    """A UTF-8 file as text. Raises: UserError when it is absent, damaged or in another encoding."""
    if not file.exists():
        raise UserError(f"{file}: no such file; name an existing one, or leave out the task that reads it")
    data = file.read_bytes()
    try:
        return (gzip.decompress(data) if file.name.endswith(".gz") else data).decode()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: damaged gzip file ({error}); fetch it again") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text at byte {error.start} of the file; convert it") from error


def read_json(file: Location) -> Any:
    """A JSON file. Raises: UserError as `read_text`, and with the line of a syntax error."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg}); fetch the file again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: {_BEYOND_PYTHON} ({error}); mend the file") from error


def read_rows(file: Location, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, empty lines left out. Raises: UserError for a line without one of `fields`."""
    rows = []
    # not splitlines: JSON strings may hold U+2028, which is no line end here
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{number}: not JSON ({error.msg}); mend or remove the line") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: {_BEYOND_PYTHON} ({error}); mend or remove the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a JSON object is needed, not {type(row).__name__}; mend the line")
        missing = [name for name in fields if name not in row]
        if missing:
            raise UserError(f"{file}:{number}: no field {missing[0]!r} (fields: {', '.join(row)}); mend the line")
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: no rows; fetch the file again")
    return rows


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """`row[name]` as text. Raises: UserError naming `where`, the field and what stands there."""
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} must be text, not {type(value).__name__}; mend the line")
    try:
        value.encode()  # no tokenizer takes what JSON lets through: an emoji cut in two
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise UserError(f"{where}: field {name!r} has half a character, {half}; mend the line") from error
    return value


def read_texts(file: Location) -> list[str]:
    """Documents of a file: column `text` of `.parquet`, field `text` of `.json` or `.jsonl` rows, else the whole file.

    Raises: UserError for an absent or damaged file, and for a row without text.
    """
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _parquet_texts(file)
    if name.endswith((".jsonl", ".ndjson")):
        rows = read_rows(file, ("text",))
        return [text_field(row, "text", f"{file}: row {number}") for number, row in enumerate(rows, start=1)]
    if name.endswith(".json"):
        value = read_json(file)
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise UserError(f'{file}: a JSON text must be of the form {{"text": "..."}}')
        return [value["text"]]
    return [read_text(file)]


def _parquet_texts(file: Location) -> list[str]:
    try:
        with file.filesystem.open_input_file(file.path) as source:
            return [text for text in pq.read_table(source, columns=["text"]).column("text").to_pylist() if text]
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; name an existing one") from error
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError) as error:
        raise UserError(f"{file}: no Parquet file with a text column `text` ({error}); fetch it again") from error
