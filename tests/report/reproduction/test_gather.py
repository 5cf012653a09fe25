"""One JSON grows part by part, and its tables say what is in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.report.made_run import write_json
from tests.report.reproduction.made_reproduction import trial_record, write_extension, write_trials
from ultralong_ray.report.reading import StageReader
from ultralong_ray.report.reproduction.command import figures_command
from ultralong_ray.report.reproduction.gather import gather, read_results
from ultralong_ray.report.words import ABSENT
from ultralong_ray.stages import stage_directory
from ultralong_ray.types import UserError

LENGTHS = [4096, 8192]
TASKS = {"ruler/vt": [4096, 8192], "ruler/cwe": [4096, 8192], "short_skills/copying": [0]}


def _runs(folder: Path, name: str, **options: Any) -> Path:
    write_extension(folder / name, 131072, LENGTHS, [0.0, 100.0], TASKS, **options)
    return folder


def _row(table: str, start: str) -> list[str]:
    found = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_parts_that_are_gathered_later_join_and_replace(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    first = gather(_runs(tmp_path / "a", "extend_128k"), out, ["128k.seconds_of_the_whole_command=90", "128k.gpus=2"])
    second = gather(_runs(tmp_path / "b", "extend_1m"), out, [])
    assert list(second["parts"]) == ["extend_128k", "extend_1m"]
    assert second["parts"]["extend_128k"] == first["parts"]["extend_128k"] and second["notes"] == first["notes"]
    third = gather(_runs(tmp_path / "c", "extend_128k", models=("base",)), out, [])
    assert {grid["model"] for grid in third["parts"]["extend_128k"]["passkey"]} == {"base"}
    assert json.loads(out.read_text()) == third


def test_trials_of_several_machines_join(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    write_trials(tmp_path / "a/ablations", [trial_record("recipe", seed, 0.5) for seed in (1, 2)])
    write_trials(tmp_path / "b/ablations", [trial_record("recipe", 3, 0.8), trial_record("rope_ntk", 3, 0.7)])
    gather(tmp_path / "a", out, [])
    found = gather(tmp_path / "b", out, ["ablations.gpus_per_trial=2"])["ablations"]
    assert found["variants"]["recipe"]["seeds"] == [1, 2, 3] and len(found["trials"]) == 4
    assert found["gpu_seconds"] == 2 * 4 * 60


def test_trials_of_several_recipes_are_told_apart_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    write_trials(tmp_path / "a/ablations", [trial_record("recipe", seed, 0.5) for seed in (1, 2)])
    gather(tmp_path / "a", out, [])
    assert "different recipes" not in capsys.readouterr().out
    write_trials(tmp_path / "b/ablations", [trial_record("rope_ntk", 1, 0.8)], "tune-ba9876543210")
    gather(tmp_path / "b", out, [])
    said = capsys.readouterr().out
    assert "2 of tune-0123456789ab" in said and "1 of tune-ba9876543210" in said


def test_numbers_that_a_part_had_and_has_no_more_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    first = gather(_runs(tmp_path / "a", "extend_128k"), out, [])["parts"]["extend_128k"]
    gather(tmp_path / "a", out, [])
    assert "note:" not in capsys.readouterr().out
    gather(_runs(tmp_path / "b", "extend_128k", models=("base",)), out, [])
    (evaluation,) = (name for name in first["folders"] if name.startswith("evaluate-"))
    assert f"extend_128k: without {evaluation}, " in capsys.readouterr().out


def test_a_long_sft_of_another_pretraining_than_the_short_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    gather(_runs(tmp_path / "a", "extend_128k"), out, [])
    gather(_runs(tmp_path / "b", "extend_128k_long_sft", models=("final",)), out, [])
    assert "note:" not in capsys.readouterr().out
    gather(_runs(tmp_path / "c", "extend_128k_long_sft", models=("final",), learning_rate=1e-3), out, [])
    assert "extend_128k_long_sft is of another pretraining than extend_128k" in capsys.readouterr().out


def test_gathering_again_gives_the_same_bytes(tmp_path: Path) -> None:
    runs, out = _runs(tmp_path, "extend_128k"), tmp_path / "results.json"
    write_trials(runs / "ablations", [trial_record("recipe", seed, 1 / (seed + 2)) for seed in (1, 2, 3)])
    gather(runs, out, [])
    first = out.read_bytes()
    gather(runs, out, [])
    assert out.read_bytes() == first


def test_a_trials_own_trainings_are_no_part(tmp_path: Path) -> None:
    write_trials(_runs(tmp_path, "ablations") / "ablations", [trial_record("recipe", 1, 0.5)])
    assert gather(tmp_path, tmp_path / "results.json", [])["parts"] == {}


def test_a_write_that_breaks_off_keeps_what_was_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, out = _runs(tmp_path, "extend_128k"), tmp_path / "results.json"
    before = gather(runs, out, ["base=1"])

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        gather(runs, out, ["base=2"])
    assert read_results(out) == before


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no finished run"):
        gather(tmp_path, tmp_path / "results.json", [])
    runs = _runs(tmp_path, "extend_128k")
    for note, said in (("seconds", "key=value"), (".a=1", "key=value")):
        with pytest.raises(UserError, match=said):
            gather(runs, tmp_path / "results.json", [note])
    with pytest.raises(UserError, match="a note already"):
        gather(runs, tmp_path / "results.json", ["base=1", "base.gpus=2"])
    (tmp_path / "results.json").write_text('{"command": []}')
    assert figures_command(["gather", str(runs), "--out", str(tmp_path / "results.json")]) == 2
    assert "has no parts" in capsys.readouterr().err


def test_tables_of_scores(tmp_path: Path) -> None:
    tables = gather(_runs(tmp_path, "extend_128k"), tmp_path / "results.json", [])["tables"]
    assert _row(tables["passkey"], "base model") == [
        "2 x 2 to 8K",
        "2 of 4",
        "100\N{NO-BREAK SPACE}%",
        "0\N{NO-BREAK SPACE}%",
        "50\N{NO-BREAK SPACE}%",
    ]
    assert [cell.split(" ")[0] for cell in _row(tables["ruler_by_length"], "base model")] == ["81.2", "0.0"]
    assert _row(tables["paid_and_restored"], "short_skills/copying")[0].startswith("100.0 [")
    assert len(_row(tables["paid_and_restored"], "ruler, mean of all tasks")) == 3, "1M was not gathered"


def test_models_are_compared_by_what_they_were_asked_alike(tmp_path: Path) -> None:
    """RULER made from other words is another test: it has rows of its own, and no part in the price."""
    runs = _runs(tmp_path, "extend_128k", models=("pretrained", "final"))
    made = {"ruler/vt": [4096], "ruler/cwe": [4096], "short_skills/copying": [0]}
    write_extension(runs / "base_4k", 4096, [4096], [0.0], made, models=("final",), words="wonderwords 2.2.0")
    results = gather(runs, tmp_path / "results.json", [])
    made_from = {s["task"]: s["made_from"] for s in results["parts"]["base_4k"]["benchmarks"]["scores"]}
    assert made_from["ruler/vt"] == "words: wonderwords 2.2.0" and made_from["short_skills/copying"] == ""
    tables = results["tables"]
    assert _row(tables["paid_and_restored"], "ruler, mean of all tasks")[0] == "\N{EN DASH}"
    by_length = tables["ruler_by_length"]
    assert [line.split(" |")[0] for line in by_length.splitlines()[2:5]] == [
        "| 128K, before SFT",
        "| 128K, final",
        "| base model, words: wonderwords 2.2.0",
    ]
    assert "Where nothing is said: words: built in" in by_length
    write_extension(runs / "base_4k", 4096, [4096], [0.0], made, models=("final",))
    tables = gather(runs, tmp_path / "results.json", [])["tables"]
    assert _row(tables["paid_and_restored"], "ruler, mean of all tasks")[0].startswith("87.5")
    assert "nothing is said" not in tables["ruler_by_length"]


def test_trials_that_were_asked_different_questions_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [trial_record("recipe", seed, 0.5) | {"made_from": ["words: built in"]} for seed in (1, 2)]
    write_trials(tmp_path / "ablations", records)
    gather(tmp_path, tmp_path / "results.json", [])
    assert "different questions" not in capsys.readouterr().out
    write_trials(tmp_path / "ablations", [trial_record("rope_ntk", 1, 0.8) | {"made_from": ["words: w.json"]}])
    gather(tmp_path, tmp_path / "results.json", [])
    assert "asked different questions are compared: trials 2 of words: built in, 1 of words: w.json" in (
        capsys.readouterr().out
    )


def test_the_base_of_its_own_recipe_stands_in_only_for_what_was_asked_alike(tmp_path: Path) -> None:
    """Scores over 4K alone are not set against a base model that was asked at 1K as well."""
    runs = _runs(tmp_path, "extend_128k", models=("pretrained", "final"))
    made = {"ruler/vt": [1024, 4096], "ruler/cwe": [1024, 4096], "short_skills/copying": [0]}
    write_extension(runs / "base_4k", 4096, [4096], [0.0], made, models=("final",))
    tables = gather(runs, tmp_path / "results.json", [])["tables"]
    assert _row(tables["paid_and_restored"], "ruler, mean of all tasks")[0] == "\N{EN DASH}"
    assert _row(tables["paid_and_restored"], "short_skills/copying")[0] != "\N{EN DASH}"
    assert _row(tables["ruler_by_length"], "base model")[0] != "\N{EN DASH}"


@pytest.mark.parametrize(
    ("beyond", "side"),
    [([0.3, 0.31, 0.32], "as in the paper"), ([0.7, 0.71, 0.7], "the other one"), ([0.2, 0.5, 0.9], "not decided")],
)
def test_the_ablation_table_tells_which_side_the_paper_has(tmp_path: Path, beyond: list[float], side: str) -> None:
    trials = [trial_record("recipe", seed, 0.5) for seed in (1, 2, 3)]
    trials += [trial_record("separator_none", seed, share) for seed, share in enumerate(beyond, start=1)]
    trials += [trial_record("document_mask", 1, 0.4), trial_record("separator_bos_eos", 1, 0.4)]
    write_trials(tmp_path / "ablations", trials)
    table = gather(tmp_path, tmp_path / "results.json", [])["tables"]["ablations"]
    assert _row(table, "no separator")[-2:] == ["79.15", side]
    assert _row(table, "the recipe")[:3] == ["3", "100.0 [100.0, 100.0]", "50.0 [50.0, 50.0]"]
    assert _row(table, "mask between documents") == ["1", "100.0", "40.0", "-10.0", ABSENT, "4.95", "+0.47", "", ""]
    assert "`<s>`" in table


def test_the_ablation_table_has_the_price_within_the_window_beside_the_gain_beyond(tmp_path: Path) -> None:
    trials = [trial_record("recipe", seed, 0.5) for seed in (1, 2)]
    for trial in trials:
        trial["scores"] |= {"pretrained/ruler/vt/4096": 0.7, "pretrained/ruler/vt/65536": 0.3}
    write_trials(tmp_path / "ablations", trials)
    table = gather(tmp_path, tmp_path / "results.json", [])["tables"]["ablations"]
    heads = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")][1:]
    row = dict(zip(heads, _row(table, "the recipe"), strict=True))
    assert row["RULER 4K"] == "70.0 [70.0, 70.0]" and row["RULER 64K"] == "30.0 [30.0, 30.0]"
    assert row["RULER"] == "50.0 [50.0, 50.0]"


def test_what_failed_or_is_missing_stands_below_the_tables(tmp_path: Path) -> None:
    recipe = write_extension(tmp_path / "runs/extend_128k", 131072, [4096, 131072], [0.0], TASKS, ("final",))
    stage = stage_directory(recipe, "evaluate")
    plan = StageReader(stage).read_json("plan.json") or {}
    place = {"model": "final", "task": "passkey", "context_length_tokens": 131072, "depth_percent": 0.0}
    passkey = {**place, "section": -1, "shard": 0, "num_samples": 5, "file": "cells/final/131072-0.json"}
    vt = next(cell for cell in plan["cells"] if cell["task"] == "ruler/vt" and cell["context_length_tokens"] == 8192)
    write_json(stage, "plan.json", {"cells": [*plan["cells"], passkey]})
    write_json(stage, "failed.json", {cell["file"]: "out of memory" for cell in (passkey, vt)})
    (Path(stage.location.path) / "cells/final/4096-0.json").unlink()
    tables = gather(tmp_path / "runs", tmp_path / "results.json", [])["tables"]
    assert tables["passkey"].endswith("128K, final: 1 of its cells failed, counted as wrong; 1 of its cells missing.")
    assert tables["ruler_by_length"].endswith("128K, final: 1 of its cells failed, counted as wrong.")


def test_gpu_time_is_stated_by_part_and_in_sum(tmp_path: Path) -> None:
    runs = _runs(tmp_path, "extend_128k")
    write_trials(runs / "ablations", [trial_record("recipe", 1, 0.5)])
    _runs(tmp_path, "extend_128k_long_sft", models=("final",))  # trainings of the same fingerprints: the same runs
    notes = ["128k.seconds_of_the_whole_command=900", '128k.gpus=["a", "a"]']
    notes += ["1m.seconds_of_the_whole_command=360", "1m.gpus=1"]
    table = gather(runs, tmp_path / "results.json", notes)["tables"]["gpu_time"]
    assert _row(table, "extend_128k")[0] == "600" and _row(table, "ablations")[0] == "60"
    assert _row(table, "extend_128k_long_sft")[0] == "200", "its own evaluation"
    assert _row(table, "all") == ["860", "0.24"]
    assert "The whole command of 128k: 900 s on 2 GPUs, 0.50 GPU-hours." in table
    assert "The whole command of 1m: 360 s on 1 GPU, 0.10 GPU-hours." in table


def test_an_evaluation_of_the_base_alone_is_counted_in_each_part_that_ran_it(tmp_path: Path) -> None:
    """It is the same evaluation by its fingerprint, yet nothing copies it from part to part."""
    for part in ("extend_128k", "extend_128k_long_sft"):
        _runs(tmp_path, part, models=("base",))
    table = gather(tmp_path, tmp_path / "results.json", [])["tables"]["gpu_time"]
    assert _row(table, "extend_128k")[0] == "600" and _row(table, "extend_128k_long_sft")[0] == "200"
