"""The benchmark of checkpoints: its command line, a tiny run on two CPU processes, its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralong_ray.benchmark.checkpoint_record import checkpoint_entry
from ultralong_ray.benchmark.cli import checkpoints_of, main, parse


def test_a_snapshot_on_disk_needs_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "--snapshot", "disk", "--target", "/x", "--out", "x.json"]) == 2
    assert "--snapshot disk needs --local" in capsys.readouterr().err
    made = checkpoints_of(parse(["checkpoint", "--gpus", "2", "--layers", "4", "--target", "/x", "--out", "x.json"]))
    assert (made.snapshot, made.every, made.benchmark.setups[0].ulysses, made.benchmark.setups[0].layers) == (
        *("memory", 1, 2, 4),
    )


@pytest.mark.usefixtures("forked_ranks")
def test_a_tiny_run_is_measured_and_recorded(tmp_path: Path) -> None:
    out = tmp_path / "checkpoint.json"
    words = f"checkpoint --shape tiny --device cpu --gpus 2 --length 64 --steps 2 --target {tmp_path}/kept --out {out}"
    assert main(words.split()) == 0
    result = json.loads(out.read_text())
    assert result["status"] == "ok" and result["command"][2:] == words.split()
    assert len(result["plain_step_seconds"]["all"]) == 4 and len(result["checkpointing_step_seconds"]["all"]) == 2
    assert len(result["blocked_seconds"]["all"]) == 2 == len(result["uploaded_seconds"])
    parameters = 2 * 97 * 32 + 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert 12 * parameters <= result["bytes"] < 12 * parameters + 40_000  # and random states
    assert [folder.name[:13] for folder in sorted((tmp_path / "kept").iterdir())] == ["step-00000005"]


def test_what_the_slowest_rank_waited_for_counts() -> None:
    saved = {"waited_seconds": 0.5, "uploaded_seconds": 4.0, "num_bytes": 8 * 10**9}
    common = {"device": "cpu", "plain_seconds": [1.0, 3.0], "checkpointing_seconds": [2.5], "saved": [saved]}
    ranks = [
        {**common, "blocked_seconds": [0.6], "load_seconds": 2.0, "peak_host_gib": 1.0},
        {**common, "blocked_seconds": [0.9], "load_seconds": 1.0, "peak_host_gib": 2.0},
    ]
    entry = checkpoint_entry(ranks)
    assert entry["added_to_a_step"] == 0.25 and entry["blocked_seconds"]["largest"] == 0.9
    assert entry["written_gbytes_per_second"] == 2.0 and entry["read_gbytes_per_second"] == 4.0
