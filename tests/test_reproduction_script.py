"""jobs/recipes/reproduction/run.sh around jobs that only say that they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = "jobs/recipes/reproduction/run.sh"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / SCRIPT).parent.mkdir(parents=True)
    shutil.copy(Path(__file__).resolve().parents[1] / SCRIPT, tmp_path / SCRIPT)
    shipped = tmp_path / "jobs/models/reproduction-base"
    shipped.mkdir(parents=True)
    (shipped / "model.safetensors").write_text("shipped")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@" >> calls\n')
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(checkout / "python"), **variables}
    return subprocess.run([checkout / SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60)


def test_a_part_takes_over_the_finished_stages_of_the_plain_one_whole(checkout: Path) -> None:
    plain, own = (checkout / "runs/reproduction" / name for name in ("extend_128k", "extend_128k_long_sft"))
    for stage in ("prepare-a", "prepare_sft-b", "pretrain-c"):
        (plain / stage).mkdir(parents=True)
        (plain / stage / "file").write_text("whole")
    (plain / "prepare-a/_SUCCESS.json").write_text("{}")
    (own / "prepare-a.part").mkdir(parents=True)
    (own / "prepare-a.part/file").write_text("wh")
    done = run(checkout, "128k_long_sft", "--cluster.num_workers", "1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in own.iterdir()) == ["prepare-a"]
    assert (own / "prepare-a/file").read_text() == "whole"
    calls = [line.split() for line in (checkout / "calls").read_text().splitlines()]
    stages = ("prepare", "extend", "pretrain", "sft", "export", "evaluate", "report")
    assert [call[0] for call in calls] == [f"jobs/{stage}.py" for stage in stages]
    assert {tuple(call[1:]) for call in calls} == {
        ("jobs/recipes/reproduction/extend_128k_long_sft.toml", "--cluster.num_workers", "1")
    }


def test_a_part_of_a_longer_name_takes_them_over_too(checkout: Path) -> None:
    stage = checkout / "runs/reproduction/extend_1m/pretrain-c"
    stage.mkdir(parents=True)
    (stage / "_SUCCESS.json").write_text("{}")
    done = run(checkout, "1m_from_start_sft", EVALUATE="none")
    assert done.returncode == 0, done.stderr
    assert (checkout / "runs/reproduction/extend_1m_from_start_sft/pretrain-c/_SUCCESS.json").exists()


def test_a_part_extends_the_shipped_base_where_none_was_trained(checkout: Path) -> None:
    base = checkout / "runs/reproduction/models/base"
    assert run(checkout, "1m").returncode == 0
    assert (base / "model.safetensors").read_text() == "shipped"
    (base / "model.safetensors").write_text("trained here")
    assert run(checkout, "128k").returncode == 0
    assert (base / "model.safetensors").read_text() == "trained here"


def test_evaluation_may_be_left_for_later_and_narrowed(checkout: Path) -> None:
    assert run(checkout, "1m", EVALUATE="none").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls][-2:] == ["jobs/sft.py", "jobs/export.py"]
    assert run(checkout, "1m", EVALUATE="--evaluate.tasks []").returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert calls[-2].startswith("jobs/evaluate.py") and calls[-2].endswith("--evaluate.tasks []")


def test_records_leave_out_what_is_large_and_restore_puts_the_models_in(checkout: Path) -> None:
    for name in ("reproduction-1m", "reproduction-1m-pretrained", "reproduction-1m-from-start"):
        (checkout / "jobs/models" / name).mkdir()
        (checkout / "jobs/models" / name / "model.safetensors").write_text(name)
    (checkout / "jobs/results").mkdir()
    runs = checkout / "runs/reproduction"
    part = runs / "extend_1m_long_sft"
    kept = {
        "pretrain-a/metrics.jsonl": "{}",
        "pretrain-a/_SUCCESS.json": "{}",
        "sft-b/_SUCCESS.json": "{}",
        "export-c/_SUCCESS.json": f'{{"model": "{part}/export-c/model"}}',
        "evaluate-d/cells/final/4096-0.json": "{}",
    }
    left = ("pretrain-a/model/config.json", "pretrain-a/checkpoints/1/manifest.json", "corpus-e/_SUCCESS.json")
    for name, text in {**kept, **dict.fromkeys(left, "{}"), "prepare-f/_SUCCESS.json": "{}"}.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text(text)
    trials = {"tune-a/trials/recipe-1.json", "pretrain-a/metrics.jsonl"}  # and neither model nor text
    for name in (*trials, "extend-b/_SUCCESS.json", "pretrain-a/_SUCCESS.json", "prepare-c/_SUCCESS.json"):
        (runs / "ablations" / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / "ablations" / name).write_text("{}")
    other = runs / "extend_1m_from_start_sft"
    (other / "export-g").mkdir(parents=True)
    (other / "export-g/_SUCCESS.json").write_text("{}")
    assert run(checkout, "records").returncode == 0
    shutil.rmtree(runs)
    done = run(checkout, "restore")
    assert done.returncode == 0, done.stderr
    ablations = runs / "ablations"
    assert {str(path.relative_to(ablations)) for path in ablations.rglob("*") if path.is_file()} == trials
    found = {str(path.relative_to(part)) for path in part.rglob("*") if path.is_file()}
    models = {f"{stage}/model/model.safetensors" for stage in ("pretrain-a", "sft-b", "export-c")}
    assert found == {*kept, *models}
    assert str(checkout) not in (part / "export-c/_SUCCESS.json").read_text()
    assert (part / "pretrain-a/model/model.safetensors").read_text() == "reproduction-1m-pretrained"
    assert (part / "export-c/model/model.safetensors").read_text() == "reproduction-1m"
    assert (other / "export-g/model/model.safetensors").read_text() == "reproduction-1m-from-start"
    assert (runs / "models/base/model.safetensors").read_text() == "shipped"


def test_neither_runs_nor_records_are_written_over(checkout: Path) -> None:
    for name in ("reproduction-1m", "reproduction-1m-pretrained"):
        shutil.copytree(checkout / "jobs/models/reproduction-base", checkout / "jobs/models" / name)
    (checkout / "jobs/results").mkdir()
    stage = checkout / "runs/reproduction/base_4k/pretrain-a"
    stage.mkdir(parents=True)
    (stage / "_SUCCESS.json").write_text("{}")
    assert run(checkout, "records").returncode == 0
    done = run(checkout, "restore")
    assert done.returncode == 2 and "move it aside" in done.stderr
    stage.parent.rename(checkout / "runs/reproduction/extend_128k")
    before = (checkout / "jobs/results/reproduction_runs.tar.gz").read_bytes()
    done = run(checkout, "records")
    assert done.returncode == 2 and "lacks base_4k" in done.stderr
    assert (checkout / "jobs/results/reproduction_runs.tar.gz").read_bytes() == before


def test_a_part_that_there_is_not_is_named(checkout: Path) -> None:
    for arguments, words in (((), "no part ''"), (("2m",), "no part '2m'; there are base, 128k")):
        done = run(checkout, *arguments)
        assert done.returncode == 2 and words in done.stderr
    assert not (checkout / "calls").exists()
