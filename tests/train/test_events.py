"""events.jsonl and metrics.jsonl after a full disk, a kill in mid-write and damage."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_metrics import record, write
from ultralong_ray.storage import Location
from ultralong_ray.train import events
from ultralong_ray.train.events import EVENTS_FILE, read_events, record_event
from ultralong_ray.train.metrics import METRICS_FILE, read_metrics
from ultralong_ray.train.status import describe_run
from ultralong_ray.types import UserError


def test_an_event_after_one_that_was_cut_short_has_a_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage, file = Location.of(tmp_path / "pretrain-a"), tmp_path / "pretrain-a" / EVENTS_FILE
    record_event(stage, "submit")
    record_event(stage, "end", step=4)
    os.truncate(file, file.stat().st_size - 9)
    assert [event["event"] for event in read_events(stage)] == ["submit"]
    assert not caplog.records  # the last line may be on its way
    record_event(stage, "submit")
    record_event(stage, "stop", cause="disk")
    with caplog.at_level(logging.WARNING):
        assert [event["event"] for event in read_events(stage)] == ["submit", "submit", "stop"]
        read_events(stage)
    (warning,) = caplog.messages
    assert str(file) in warning and "(2)" in warning
    assert "pretrain-a" in describe_run(Location.of(tmp_path), now_seconds=0.0)


def test_a_line_that_is_damaged_costs_itself_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage, file = Location.of(tmp_path), tmp_path / METRICS_FILE
    write(stage, 0, [1, 2, 3, 4], loss=2.0)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1][:50] + b"\x00\xff" * 9 + lines[1][68:] + b'{"step": 3}\n17\n' + lines[3])
    with caplog.at_level(logging.WARNING):
        assert read_metrics(stage) == [record(1), record(4)]
    (warning,) = caplog.messages
    assert str(file) in warning
    write(stage, 4, [5], loss=2.0)
    assert [found.step for found in read_metrics(stage)] == [1, 4, 5]


def test_an_event_that_the_disk_takes_half_of_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:7])

    monkeypatch.setattr(events, "open", lambda path, mode, buffering: Full(path, "a+"), raising=False)
    with pytest.raises(UserError, match=r"events\.jsonl: no space left"):
        record_event(Location.of(tmp_path), "submit")
    assert (tmp_path / EVENTS_FILE).stat().st_size == 7
