"""Checkpoints on gloo ranks: whatever layout wrote one, another continues it; damage is found; others are refused."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.spawn import run_distributed
from tests.train import made_jobs
from tests.train.made_jobs import job, weights_of, write_inputs
from ultralong_ray.storage import Location
from ultralong_ray.train import checkpoint_files
from ultralong_ray.train.checkpoint import (
    CHECKPOINTS,
    committed,
    forget_others,
    full_weights,
    refuse_other,
    root_to_resume,
    step_of,
    uncommitted,
)
from ultralong_ray.train.checkpoint_files import MANIFEST_FILE, Damaged, Manifest, damage_of
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.types import UserError

# (ranks, degree, ZeRO stage) of steps 1-2, 3-4 and 5-6 of a run that is stopped after each of them
CHAINS = {
    "4-2-4": [(4, 4, 3), (2, 1, 2), (4, 2, 1)],
    "1-2-1": [(1, 1, 0), (2, 2, 3), (1, 1, 3)],
}


def train_to(folder: Path, stage: str, last_step: int, changes: dict[str, Any]) -> int:
    return made_jobs.train_to(job(folder, stage, **changes), last_step)


def layout(ranks: int, degree: int, zero_stage: int) -> dict[str, Any]:
    return {"zero_stage": zero_stage, "cluster": {"num_workers": ranks}, "sequence_parallel_degree": degree}


def unbroken_and_hurt(folder: Path) -> list[int]:
    """Two stages on two ranks: `unbroken`, and `hurt`, whose checkpoint of step 4 loses a bit before it is needed."""
    import torch.distributed as dist

    started = [train_to(folder, "unbroken", 6, layout(2, 2, 3)), train_to(folder, "hurt", 4, layout(2, 2, 3))]
    if dist.get_rank() == 0:
        root = folder / "hurt" / CHECKPOINTS
        flip(root / committed(Location.of(root))[0] / "state-00001.bin", 100)
    dist.barrier()
    return [*started, train_to(folder, "hurt", 6, layout(2, 2, 3))]


def flip(file: Path, byte: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and the stages `unbroken` and `hurt`."""
    made = tmp_path_factory.mktemp("checkpoint")
    write_inputs(made)
    assert run_distributed(unbroken_and_hurt, 2, made) == [[0, -1, 2]] * 2
    return made


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues_bit_for_bit(folder: Path) -> None:
    unbroken, hurt = Location.of(folder / "unbroken"), Location.of(folder / "hurt")
    assert [r.loss for r in read_metrics(unbroken)] == [r.loss for r in read_metrics(hurt)]
    wanted, have = weights_of(unbroken), weights_of(hurt)
    assert wanted.keys() == have.keys() and all(np.array_equal(wanted[key], have[key]) for key in wanted)
    resumed = next(event for event in read_events(hurt) if event["event"] == "resume")
    assert resumed["step"] == 2
    (passed_over,) = resumed["passed_over"]
    assert passed_over.startswith("step-00000004-") and "state-00001.bin is altered" in passed_over
    assert [name[:13] for name in committed(hurt / CHECKPOINTS)] == ["step-00000006", "step-00000004"]


def found_damage(folder: Path) -> list[str]:
    try:
        manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes())
        return list(damage_of(Location.of(folder), manifest))
    except Damaged as damage:
        return [str(damage)]


def hurt_file(file: Path, how: str, draw: random.Random) -> None:
    size = file.stat().st_size
    if how == "flip":
        flip(file, draw.randrange(size), draw.randrange(8))
    elif how == "truncate":
        with file.open("r+b") as sink:
            sink.truncate(draw.randrange(size))
    elif how == "lengthen":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        begin = draw.randrange(size - 8)
        data = file.read_bytes()
        file.write_bytes(data[:begin] + bytes(255 - byte for byte in data[begin : begin + 8]) + data[begin + 8 :])


def test_every_damage_of_200_is_found_and_its_file_named(folder: Path, tmp_path: Path) -> None:
    root = folder / "unbroken" / CHECKPOINTS
    names = committed(Location.of(root))
    whole, older = root / names[0], root / names[1]
    assert found_damage(whole) == []
    draw = random.Random(7)
    files = sorted(file.name for file in whole.iterdir())
    assert files == [MANIFEST_FILE, "random-00000.pt", "random-00001.pt", "state-00000.bin", "state-00001.bin"]
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for attempt in range(200):
        file, how = draw.choice(files), draw.choice(["flip", "flip", "truncate", "lengthen", "overwrite"])
        hurt_file(copy / file, how, draw)
        damage = found_damage(copy)
        assert len(damage) == 1 and damage[0].startswith(file), (attempt, file, how, damage)
        shutil.copy(whole / file, copy / file)
    for file in ("state-00000.bin", "state-00001.bin"):  # same size, sound in itself, of another step
        shutil.copy(older / file, copy / file)
        assert [line.split()[0] for line in found_damage(copy)] == [file]
        (copy / file).unlink()
        assert found_damage(copy) == [f"{file} is missing"]
        shutil.copy(whole / file, copy / file)
    (copy / MANIFEST_FILE).write_bytes(b"")
    assert found_damage(copy) == [f"{MANIFEST_FILE} is damaged (0 bytes)"]
    assert found_damage(whole) == []


def test_weights_of_a_damaged_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    root = folder / "unbroken" / CHECKPOINTS
    shutil.copytree(root / committed(Location.of(root))[0], tmp_path / "copy")
    flip(tmp_path / "copy" / "state-00000.bin", 0)
    with pytest.raises(UserError, match=r"state-00000\.bin is altered"):
        list(full_weights(Location.of(tmp_path / "copy")))


@pytest.mark.parametrize("name", CHAINS)
def test_other_ranks_degrees_and_stages_continue_the_run(folder: Path, name: str) -> None:
    started, stage = [], name
    for (ranks, degree, zero_stage), last_step in zip(CHAINS[name], (2, 4, 6), strict=True):
        started.append(run_distributed(train_to, ranks, folder, stage, last_step, layout(ranks, degree, zero_stage)))
    assert started[-1] == [4] * CHAINS[name][-1][0]
    expected, found = (read_metrics(Location.of(folder / s)) for s in ("unbroken", stage))
    assert [record.step for record in found] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert (one.learning_rate, one.tokens, one.epoch, one.sequence) == (
            (other.learning_rate, other.tokens, other.epoch, other.sequence)
        )
    assert found[-1].loss < found[0].loss - 0.3
    wanted, have = weights_of(Location.of(folder / "unbroken")), weights_of(Location.of(folder / stage))
    assert wanted.keys() == have.keys()
    assert all(np.allclose(wanted[key], have[key], atol=1e-4) for key in wanted)
    assert [event["event"] for event in read_events(Location.of(folder / stage))] == [
        *("start", "checkpoint", "resume", "checkpoint", "resume", "checkpoint", "end")
    ]


def written(root: Path, *names: str) -> Location:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "state-00000.bin").write_bytes(b"0000")
        (root / name / MANIFEST_FILE).write_bytes(b"{}")
    return Location.of(root)


def test_old_checkpoints_go_but_for_every_nth(tmp_path: Path) -> None:
    names = [f"step-{step:08d}-aaaaaa" for step in range(10, 80, 10)]
    root = written(tmp_path, *names)
    (tmp_path / names[5] / MANIFEST_FILE).unlink()  # step 60 never got its manifest
    assert committed(root) == [names[6], *names[4::-1]]
    forget_others(root, names[6], 2, 30)
    assert committed(root) == [names[6], names[4], names[2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[2], names[4], names[6]]


def test_what_a_run_passed_over_goes_when_it_commits_anew(tmp_path: Path) -> None:
    root = written(
        tmp_path, "step-00000002-aaaaaa", "step-00000004-aaaaaa", "step-00000006-aaaaaa", "step-00000004-bbbbbb"
    )
    forget_others(root, "step-00000004-bbbbbb", 2, None)
    assert committed(root) == ["step-00000004-bbbbbb", "step-00000002-aaaaaa"]


def test_folders_of_other_names_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    mine = "step-00000002-aaaaaa"
    copies = "backup", "backup of mine", "step-00000004-copy", f"{mine}-copy"
    root = written(tmp_path, mine, *copies, "step-00000001-aaaaaa")
    (tmp_path / "backup of mine" / MANIFEST_FILE).unlink()
    assert committed(root) == [mine, "step-00000001-aaaaaa"]
    assert uncommitted(root) == []
    forget_others(root, mine, 1, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine, *copies])
    with pytest.raises(ValueError, match="'backup' is no checkpoint's folder"):
        step_of("backup")


def test_a_checkpoint_of_another_run_is_refused_with_the_differing_fields() -> None:
    saved = {"pretrain.learning_rate": 0.1, "model.hidden_size": 32, "pretrain.seed": 1}
    refuse_other(saved, dict(saved), "here")
    other = {**saved, "model.hidden_size": 64, "pretrain.seed": 2}
    with pytest.raises(UserError) as refusal:
        refuse_other(saved, other, "s3://b/checkpoint")
    message = str(refusal.value)
    assert (
        "s3://b/checkpoint" in message and "--resume-anyway model.hidden_size --resume-anyway pretrain.seed" in message
    )
    assert "model.hidden_size is 32 there and 64 here" in message and "pretrain.seed is 1 there and 2 here" in message
    assert "learning_rate" not in message


def test_a_named_difference_is_accepted_and_no_other() -> None:
    saved = {"pretrain.learning_rate": 0.1, "pretrain.seed": 1}
    refuse_other(saved, {**saved, "pretrain.seed": 2}, "here", ("pretrain.seed",))
    with pytest.raises(UserError, match=r"learning_rate is 0\.1 there and 0\.2 here") as refusal:
        refuse_other(saved, {"pretrain.learning_rate": 0.2, "pretrain.seed": 2}, "here", ("pretrain.seed",))
    assert "pretrain.seed" not in str(refusal.value)


def test_a_manifest_comes_back_as_it_was_and_not_from_another_format() -> None:
    manifest = Manifest(4, {"a": [1, 2.5]}, {"world_size": 2}, {"epoch": 0, "sequence": 8}, {"w": (2, 3)})
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    with pytest.raises(Damaged, match="damaged"):
        Manifest.from_bytes(manifest.to_bytes().replace(b'"step":4', b'"step":5'))
    with pytest.raises(Damaged, match="damaged"):
        Manifest.from_bytes(manifest.to_bytes() + b" ")


def test_ranges_across_blocks_are_read_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "BLOCK_BYTES", 16)
    data, folder = bytes(range(100)), Location.of(tmp_path)
    entry = checkpoint_files.write_file(folder / "x", lambda: [data[:7], data[7:50], data[50:]])
    assert (entry.num_bytes, len(entry.blocks)) == (100, 7)
    manifest = replace(Manifest(1, {}, {}, {}), files={"x": entry})
    reader = checkpoint_files.FileReader(folder, "x", manifest)
    for start in range(100):
        for end in (start, start + 1, min(100, start + 17), 100):
            assert reader.read(start, end - start) == data[start:end]
    flip(tmp_path / "x", 40)
    reader = checkpoint_files.FileReader(folder, "x", manifest)
    assert reader.read(0, 32) == data[:32] and reader.read(48, 52) == data[48:]
    with pytest.raises(Damaged, match="x is altered within 16 bytes from byte 32"):
        reader.read(31, 2)


def test_with_accepted_fields_the_checkpoints_of_a_sibling_are_found(tmp_path: Path) -> None:
    def commit(stage: str, step: int, **identity: Any) -> None:
        folder = Location.of(tmp_path) / stage / CHECKPOINTS / f"step-{step:08d}-aaaaaa"
        (folder / MANIFEST_FILE).write_bytes(Manifest(step, identity, {}, {}).to_bytes())

    commit("pretrain-one", 10, rate=1, seed=1)
    commit("pretrain-two", 20, rate=1, seed=2)
    commit("sft-three", 30, rate=1, seed=1)
    mine, identity = Location.of(tmp_path / "pretrain-mine"), {"rate": 3, "seed": 1}
    assert root_to_resume(mine, identity, ()) == mine / CHECKPOINTS
    assert root_to_resume(mine, identity, ("rate",)) == Location.of(tmp_path / "pretrain-one" / CHECKPOINTS)
    assert root_to_resume(mine, identity, ("rate", "seed")) == Location.of(tmp_path / "pretrain-two" / CHECKPOINTS)
    with pytest.raises(UserError, match="--resume-anyway rate"):
        root_to_resume(mine, identity, ("seed",))
    commit("pretrain-mine", 1, **identity)
    assert root_to_resume(mine, identity, ("rate",)) == mine / CHECKPOINTS
