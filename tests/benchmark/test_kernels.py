"""The verb `kernels` on CPU: rates that follow from its own seconds, and reasons where a kernel cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ultralong_ray.benchmark.cli import main


def test_rates_by_length_and_head_dim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    arguments = ["--kernels", "math", "--lengths", "64", "128", "--head-dims", "16", "32", "--heads", "4"]
    more = ["--precision", "float32", "--device", "cpu", "--out", str(out)]
    assert main(["kernels", *arguments, *more]) == 0
    result = json.loads(out.read_text())
    assert [(row["head_dim"], row["length_tokens"]) for row in result["rows"]] == [
        *((16, 64), (16, 128), (32, 64), (32, 128))
    ]
    row = result["rows"][-1]
    forward = 2 * 4 * 32 * 128**2
    assert row["forward_tflops"] == pytest.approx(forward / row["forward_seconds"] / 1e12)
    assert row["backward_tflops"] == pytest.approx(2.5 * forward / row["backward_seconds"] / 1e12)
    assert result["command"][:3] == ["python", "jobs/benchmark.py", "kernels"]
    assert "math" in capsys.readouterr().out


def test_a_kernel_that_cannot_run_leaves_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    words = ["--kernels", "flash_attn_4", "math", "--lengths", "64", "--device", "cpu", "--precision", "float32"]
    assert main(["kernels", *words, "--out", str(out)]) == 1
    failed, went = json.loads(out.read_text())["rows"]
    assert (failed["kernel"], failed["status"], went["status"]) == ("flash_attn_4", "failed", "ok")
    assert "cannot run" in failed["reason"] and failed["reason"] in capsys.readouterr().out


def test_heads_that_cannot_be_shared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--heads", "8", "--kv-heads", "3", "--device", "cpu", "--out", str(tmp_path / "x.json")]
    assert main(["kernels", *words]) == 2
    assert "--kv-heads 3 does not divide --heads 8" in capsys.readouterr().err
