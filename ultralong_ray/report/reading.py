"""Tolerant reading of a stage's files: text in, JSON values out, and a plain sentence for everything that is amiss.

A report is read when something went wrong as often as when all went well, so a file that is missing, no JSON or JSON
of another form than expected costs its own section and a sentence under "Notes", never the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jinja2

from ultralong_ray.storage import StageDirectory

Value = TypeVar("Value")
# What a JSON value of another form than expected raises where it is used, the last in a template
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, jinja2.UndefinedError)


@dataclass(frozen=True, slots=True)
class StageReader:
    """Reads below one finished stage; `notes` collects what could not be read."""

    directory: StageDirectory
    notes: list[str] = field(default_factory=list)

    def name(self, relative: str) -> str:
        """`<stage>-<fingerprint>/<relative>`: how report.json names the file a number came from."""
        return f"{self.directory.location.name}/{relative}"

    def relative_names(self, folder: str) -> list[str]:
        """Files below `folder`, at any depth, relative to the stage; an absent folder has none."""
        start = len(self.directory.location.uri) + 1
        return [item.uri[start:] for item in (self.directory.location / folder).files(recursive=True)]

    def read_json(self, relative: str) -> dict[str, Any] | None:
        """The file's JSON object, or None with a note when it is absent or damaged."""
        text = self._text(relative)
        return None if text is None else self._object(text, relative)

    def read_json_lines(self, relative: str) -> list[dict[str, Any]]:
        """The file's JSON objects, one per line; damaged lines are left out with a note."""
        text = self._text(relative)
        rows = [
            self._object(line, f"{relative} line {number}")
            for number, line in enumerate((text or "").splitlines(), start=1)
            if line.strip()
        ]
        return [row for row in rows if row is not None]

    def _text(self, relative: str) -> str | None:
        location = self.directory.location / relative
        try:
            return location.read_bytes().decode("utf-8")
        except FileNotFoundError:
            self.notes.append(f"{self.name(relative)} is missing.")
        except UnicodeDecodeError as error:
            self.notes.append(f"{self.name(relative)} is not UTF-8 text ({error.reason} at byte {error.start}).")
        return None

    def _object(self, text: str, what: str) -> dict[str, Any] | None:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            self.notes.append(f"{self.name(what)} is not valid JSON ({error}).")
            return None
        if not isinstance(value, dict):
            self.notes.append(f"{self.name(what)} holds a {type(value).__name__} where an object was expected.")
            return None
        return value


def guarded(notes: list[str], what: str, read: Callable[..., Value], *given: Any) -> Value | None:
    """read(*given), or None with a note where a file that it reads is valid JSON and not of the form expected."""
    try:
        return read(*given)
    except UNEXPECTED as error:
        said = f"{type(error).__name__}: {error}"[:300]
        notes.append(f"{what}: left out, for what is stored is not of the form expected ({said}).")
        return None


def finite(value: Any) -> float | None:
    """`value` as a float, or None where it is no finite number: JSON has no NaN and a chart no place for it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def json_safe(value: Any) -> Any:
    """The same JSON value with every number that is not finite replaced by null."""
    if isinstance(value, dict):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
