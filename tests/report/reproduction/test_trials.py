"""Trials become means over seeds with Student's intervals, and differences from the recipe over equal seeds."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tests.report.reproduction.made_reproduction import trial_record, write_trials
from ultralong_ray.report.intervals import of_seeds
from ultralong_ray.report.reproduction.trials import AT_END, BEYOND, RULER, SKILLS, WITHIN, ablations, read_trials


def test_trial_files_alone_are_enough(tmp_path: Path) -> None:
    write_trials(tmp_path, [trial_record("recipe", seed, 0.5) for seed in (1, 2, 3)])
    notes: list[str] = []
    found = ablations(read_trials(tmp_path, notes), 1)
    assert list(found["trials"]) == ["recipe-1", "recipe-2", "recipe-3"] and notes == []
    assert found["variants"]["recipe"]["measures"]["passkey/131072"]["num_seeds"] == 3


def test_means_and_intervals_are_over_seeds(tmp_path: Path) -> None:
    write_trials(tmp_path, [trial_record("recipe", seed, beyond) for seed, beyond in ((1, 0.4), (2, 0.5), (3, 0.6))])
    measures = ablations(read_trials(tmp_path, []), 1)["variants"]["recipe"]["measures"]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert measures[BEYOND]["mean"] == pytest.approx(0.5)
    assert (measures[BEYOND]["low"], measures[BEYOND]["high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert measures[WITHIN] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num_seeds": 3}
    ends = [math.exp(2.0 - beyond) for beyond in (0.4, 0.5, 0.6)]
    assert measures[AT_END]["mean"] == pytest.approx(sum(ends) / 3)


def test_one_seed_has_no_interval() -> None:
    assert of_seeds([0.5]) is None
    assert of_seeds([0.5, 0.5]) == (0.5, 0.5)


def test_variants_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    recipe = [trial_record("recipe", seed, beyond) for seed, beyond in ((1, 0.4), (2, 0.5), (3, 0.9))]
    variant = [trial_record("rope_ntk", seed, beyond) for seed, beyond in ((1, 0.3), (2, 0.4), (4, 0.0))]
    write_trials(tmp_path, [*recipe, *variant])
    against = ablations(read_trials(tmp_path, []), 1)["variants"]["rope_ntk"]["against_recipe"]
    assert against[BEYOND]["mean"] == pytest.approx(-0.1) and against[BEYOND]["num_seeds"] == 2
    assert against[BEYOND]["high"] < 0  # the seeds differ more than the variants, yet pairs tell


def test_suites_are_means_over_their_tasks_and_compared_in_pairs(tmp_path: Path) -> None:
    records = [trial_record(variant, 1, 0.5) for variant in ("recipe", "rope_ntk")]
    for record, shift in zip(records, (0.0, 0.2), strict=True):
        record["scores"] |= {
            "pretrained/ruler/vt/4096": 0.4 + shift,
            "pretrained/ruler/cwe/65536": 0.2,
            "pretrained/short_skills/copying/0": 0.3 + shift,
            "pretrained/short_skills/arithmetic/0": 0.7 + shift,
        }
    write_trials(tmp_path, records)
    variants = ablations(read_trials(tmp_path, []), 1)["variants"]
    assert variants["recipe"]["measures"][RULER]["mean"] == pytest.approx(0.3)
    assert variants["recipe"]["measures"][SKILLS]["mean"] == pytest.approx(0.5)
    against = variants["rope_ntk"]["against_recipe"]
    assert against[RULER]["mean"] == pytest.approx(0.1) and against[SKILLS]["mean"] == pytest.approx(0.2)
    assert against[AT_END]["mean"] == 0.0


def test_a_trial_with_sft_is_known_by_its_final_model(tmp_path: Path) -> None:
    write_trials(tmp_path, [trial_record("sft_short", 1, 0.7, final=True)])
    trial = read_trials(tmp_path, [])["sft_short-1"]
    assert trial["model"] == "final" and trial["scores"] == {"passkey/4096": 1.0, "passkey/131072": 0.7}


def test_a_shared_training_takes_its_gpu_time_once(tmp_path: Path) -> None:
    trials = [trial_record("recipe", 1, 0.5, shared="one"), trial_record("sft_short", 1, 0.5, final=True, shared="one")]
    write_trials(tmp_path, trials)
    assert ablations(read_trials(tmp_path, []), 2)["gpu_seconds"] == 2 * (50 + 20 + 2 * 10)


def test_ruler_scores_of_trials_have_means(tmp_path: Path) -> None:
    record = trial_record("recipe", 1, 0.5)
    record["scores"] |= {
        "pretrained/ruler/vt/4096": 0.2,
        "pretrained/ruler/cwe/4096": 0.4,
        "pretrained/ruler/vt/8192": 0.9,
    }
    write_trials(tmp_path, [record])
    measures = ablations(read_trials(tmp_path, []), 1)["variants"]["recipe"]["measures"]
    assert measures["ruler/4096"]["mean"] == pytest.approx(0.3) and measures[RULER]["mean"] == pytest.approx(0.5)


def test_only_trials_that_are_done_count_and_the_newer_of_two(tmp_path: Path) -> None:
    write_trials(tmp_path, [trial_record("recipe", 1, 0.1), {**trial_record("recipe", 2, 0.1), "status": "stopped"}])
    write_trials(tmp_path, [trial_record("recipe", 1, 0.8)], "tune-ba9876543210")
    older = tmp_path / "tune-0123456789ab/trials/recipe-1.json"
    before = older.stat().st_mtime - 60
    os.utime(older, (before, before))
    trials = read_trials(tmp_path, [])
    assert list(trials) == ["recipe-1"] and trials["recipe-1"][BEYOND] == 0.8


def test_trials_that_do_not_count_are_named_with_their_cause(tmp_path: Path) -> None:
    failed = {**trial_record("rope_ntk", 1, 0.5), "status": "failed", "cause": "out of memory"}
    stopped = {**trial_record("rope_ntk", 2, 0.5), "status": "stopped"}
    write_trials(tmp_path, [trial_record("recipe", 1, 0.5), failed, stopped])
    notes: list[str] = []
    assert list(read_trials(tmp_path, notes)) == ["recipe-1"]
    (note,) = notes
    assert "rope_ntk-1 failed: out of memory" in note and "rope_ntk-2 stopped" in note and "recipe" not in note


def test_the_later_of_two_is_told_by_when_it_ended(tmp_path: Path) -> None:
    write_trials(tmp_path, [{**trial_record("recipe", 1, 0.1), "ended": 1_000.0}])
    write_trials(tmp_path, [{**trial_record("recipe", 1, 0.8), "ended": 2_000.0}], "tune-ba9876543210")
    copied = tmp_path / "tune-0123456789ab/trials/recipe-1.json"
    later = copied.stat().st_mtime + 60
    os.utime(copied, (later, later))
    assert read_trials(tmp_path, [])["recipe-1"][BEYOND] == 0.8


def test_gpu_seconds_are_of_the_share_of_a_gpu_that_a_trial_had(tmp_path: Path) -> None:
    trials = [{**trial_record(name, 1, 0.5), "gpus": 0.5} for name in ("recipe", "rope_ntk")]
    write_trials(tmp_path, trials)
    read = read_trials(tmp_path, [])
    assert ablations(read)["gpu_seconds"] == 0.5 * 2 * (50 + 10)
    assert ablations(read, 2)["gpu_seconds"] == 2 * 2 * (50 + 10), "a note knows better"


def test_the_table_of_a_search_will_do_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "tune-1/trials").mkdir(parents=True)
    waiting = {**trial_record("rope_ntk", 1, 0.5), "status": "waiting"}
    (tmp_path / "tune-1/tune.json").write_text(json.dumps({"trials": [trial_record("recipe", 1, 0.5), waiting]}))
    (tmp_path / "tune-1/trials/broken-1.json").write_text("{")
    notes: list[str] = []
    assert list(read_trials(tmp_path, notes)) == ["recipe-1"]
    assert len(notes) == 1 and "broken-1.json" in notes[0]
