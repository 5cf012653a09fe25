"""Going on from another stage's checkpoint with --resume-anyway: as advised after a bad step, and not past the end."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.spawn import run_distributed
from tests.train.made_jobs import job, train_to, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train.bad_steps import refuse_broken, refuse_spike
from ultralong_ray.train.checkpoint import CHECKPOINTS
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.types import UserError

NAN = [[float("nan"), 10.0, 1.0]]


def refusal_of(step: int, checkpoints: Location, section: str = "pretrain") -> str:
    with pytest.raises(UserError) as refusal:
        refuse_broken(step, NAN, 1.0, [8, 9], checkpoints, section)
    return str(refusal.value)


def flags_in(words: str) -> tuple[str, ...]:
    return tuple(re.findall(r"--resume-anyway ([\w.]+)", words))


def go_on(folder: Path) -> list[Any]:
    """Stage a ends after step 2 of 6, b goes on as advised, c and d find that nothing is left to train."""
    found: list[Any] = [train_to(job(folder, "pretrain-a"), 2)]
    advised = flags_in(refusal_of(3, Location.of(folder / "pretrain-a" / CHECKPOINTS)))
    slower = {"learning_rate": 1e-3}
    found.append(train_to(replace(job(folder, "pretrain-b", **slower), resume_anyway=advised), 6))
    for stage, changes in (("pretrain-c", {"steps": 4}), ("pretrain-d", slower)):
        fewer = replace(job(folder, stage, **changes), resume_anyway=(*advised, "pretrain.steps"))
        try:
            found.append(train_to(fewer, 6))
        except UserError as error:
            found.append(str(error))
    return found


def test_a_run_goes_on_as_advised_and_one_that_has_nothing_to_train_is_refused(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    ended, resumed_at, fewer, none_left = run_distributed(go_on, 1, tmp_path)[0]
    assert (ended, resumed_at) == (-1, 2)
    assert [record.step for record in read_metrics(Location.of(tmp_path / "pretrain-b"))] == [3, 4, 5, 6]
    where = rf"checkpoint {tmp_path}/pretrain-b/checkpoints/step-00000006-\w{{6}} is of step 6"
    assert re.match(where + r", pretrain\.steps is 4; set pretrain\.steps above 6", fewer)
    assert re.match(where + r", one epoch, as pretrain\.steps is not given, is 6; set pretrain\.steps above", none_left)
    assert read_events(Location.of(tmp_path / "pretrain-c")) == []


def test_after_a_bad_step_the_flags_are_named_that_go_on_from_the_checkpoint(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    assert flags_in(refusal_of(5, root)) == ()
    (root / "step-00000004-aaaaaa" / "manifest.json").write_bytes(b"{}")
    assert flags_in(refusal_of(5, root, "sft")) == ("stage_fingerprint", "sft.learning_rate")
    with pytest.raises(UserError) as refusal:
        refuse_spike(5, "step 5: loss 9", root, "pretrain")
    assert flags_in(str(refusal.value)) == ("stage_fingerprint", "pretrain.learning_rate")
    assert "jobs/pretrain.py" in str(refusal.value)
