"""Verbs `prefix`, `decoding`, `parity` on CPU with a tiny model: the same answers, files that say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralong_ray.benchmark.cli import main


def test_prefix_counts_the_same_answers(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prefix.json"
    arguments = ["--lengths", "192", "256", "--depths", "3", "--samples", "2", "--prefill-chunk", "32"]
    assert main(["prefix", "--model", str(tiny_llama), *arguments, "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["same_answers"] and len(result["cells"]) == 6
    assert result["speedup"] == pytest.approx(result["seconds"]["unshared"] / result["seconds"]["shared"])
    assert result["tokens_run"]["unshared"] > 1.4 * result["tokens_run"]["shared"]
    depths = [cell["depth"] for cell in result["cells"] if cell["length"] == 256]
    assert depths == [100.0, 50.0, 0.0], "each cell reads on from what the one before it holds"
    assert "the same answers" in capsys.readouterr().out


def test_decoding_compares_all_answers(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decoding.json"
    arguments = ["--lengths", "2048", "--samples", "2", "--device", "cpu", "--out", str(out)]
    assert main(["decoding", "--model", str(tiny_llama), *arguments]) == 0
    result = json.loads(out.read_text())
    assert result["answers"] == result["same_answers"] == 2 * (13 + 3)
    assert result["speedup"] == pytest.approx(result["seconds"]["alone"] / result["seconds"]["together"])
    assert result["mean_score"]["alone"] == result["mean_score"]["together"]
    by_task = result["seconds_by_task"]
    assert len(by_task) == 16 and "ruler/vt at 2048" in by_task
    for name, seconds in result["seconds"].items():
        assert seconds == pytest.approx(sum(task[name] for task in by_task.values()))
    assert "32 of 32 the same" in capsys.readouterr().out


@pytest.mark.usefixtures("forked_ranks")
def test_parity_of_all_layouts(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    arguments = ["--gpus", "2", "--device", "cpu", "--precision", "float32", "--prompts", "4", "--lengths", "192"]
    assert main(["parity", "--model", str(tiny_llama), *arguments, "--prefill-chunk", "50", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["engines"]) == {"in process, ultralong_chunk", "sharded 1x2", "sharded 2x1"} and result["passed"]
    for engine in result["engines"].values():
        assert engine["share_equal"] == 1.0 and engine["different"] == []
        assert 0 < engine["largest_logit_difference"] < 1e-3
    assert len(result["answers"]["in_process"]) == 4
