"""200 damages to a checkpoint, drawn from a seed: each is found, named, and the one before is loaded.

`CORRUPTION_SEED=n` draws others.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.train.made_engine import made_engine, same, save_as_ranks, state_of, step, world_of_one
from ultralong_ray.storage import Location
from ultralong_ray.train.checkpoint import NEVER_COMMITTED, committed, full_weights, load_newest
from ultralong_ray.train.checkpoint_files import MANIFEST_FILE
from ultralong_ray.types import UserError

ATTEMPTS, RANKS = 200, 3
IDENTITY = {"seed": 1}


@pytest.fixture(autouse=True)
def world(tmp_path: Path) -> Iterator[None]:
    with world_of_one(tmp_path):
        yield


def flip(file: Path, draw: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random, others: list[Path]) -> None:
    with file.open("r+b") as sink:
        sink.truncate(draw.randrange(file.stat().st_size))


def lengthen(file: Path, draw: random.Random, others: list[Path]) -> None:
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randint(1, 100)))


def empty(file: Path, draw: random.Random, others: list[Path]) -> None:
    file.write_bytes(b"")


def overwrite(file: Path, draw: random.Random, others: list[Path]) -> None:
    """A run of bytes becomes zero, or noise."""
    data = file.read_bytes()
    begin = draw.randrange(len(data))
    size = draw.randint(1, len(data) - begin)
    noise = bytes(size) if draw.random() < 0.5 else draw.randbytes(size)
    file.write_bytes(data[:begin] + noise + data[begin + size :])


def delete(file: Path, draw: random.Random, others: list[Path]) -> None:
    file.unlink()


def swap(file: Path, draw: random.Random, others: list[Path]) -> None:
    """In its place another file of the same kind, whole in itself: of another rank or another step."""
    shutil.copy(draw.choice(others), file)


HOW: list[Callable[[Path, random.Random, list[Path]], None]] = [
    *(flip, flip, truncate, lengthen, empty, overwrite, delete, swap, swap)
]


def test_each_of_200_damages_is_named_and_the_checkpoint_before_is_loaded(tmp_path: Path) -> None:
    seed = int(os.environ.get("CORRUPTION_SEED", "0"))
    draw, engine, root = random.Random(seed), made_engine(), tmp_path / "root"
    location = Location.of(root)
    older = root / save_as_ranks(engine, location, 4, RANKS)
    good = state_of(engine)
    step(engine)
    newer = root / save_as_ranks(engine, location, 6, RANKS)
    whole = shutil.copytree(newer, tmp_path / "whole")
    assert not same(good, state_of(engine))
    names, tried = sorted(path.name for path in newer.iterdir()), set()
    assert len(names) == 2 * RANKS + 1
    restored = load_newest(engine, location, IDENTITY)
    assert restored is not None and (restored.step, restored.passed_over) == (6, ())
    while len(tried) < ATTEMPTS:
        name, how, at = draw.choice(names), draw.choice(HOW), draw.getstate()
        others = [older / name, *(whole / other for other in names if other[:6] == name[:6] and other != name)]
        how(newer / name, draw, others)
        hurt = (newer / name).read_bytes() if (newer / name).exists() else None
        if hurt != (whole / name).read_bytes() and (name, hurt) not in tried:
            tried.add((name, hurt))
            words = (seed, len(tried), name, how.__name__, at[1][-1])
            restored = load_newest(engine, location, IDENTITY)
            assert restored is not None and restored.step == 4, words
            assert same(state_of(engine), good), words
            (passed_over,) = restored.passed_over
            assert passed_over.startswith(f"{newer.name}: "), words
            if (name, how) == (MANIFEST_FILE, delete):
                assert passed_over.endswith(NEVER_COMMITTED), words
            else:
                assert f"{name} " in passed_over, (words, passed_over)
        shutil.copy(whole / name, newer / name)
    restored = load_newest(engine, location, IDENTITY)
    assert restored is not None and (restored.step, restored.passed_over) == (6, ())


def test_a_whole_folder_under_another_steps_name_is_not_taken_for_it(tmp_path: Path) -> None:
    engine, root = made_engine(), tmp_path / "root"
    name = save_as_ranks(engine, Location.of(root), 4, RANKS)
    shutil.copytree(root / name, root / name.replace("00000004", "00000006"))
    restored = load_newest(engine, Location.of(root), IDENTITY)
    assert restored is not None and restored.step == 4
    assert "manifest.json is of step 4" in restored.passed_over[0]


def test_where_all_are_damaged_nothing_is_loaded_and_weights_are_refused(tmp_path: Path) -> None:
    engine, root = made_engine(), tmp_path / "root"
    for number in (4, 6):
        name = save_as_ranks(engine, Location.of(root), number, RANKS)
        (root / name / "state-00001.bin").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole \(.*state-00001.bin is missing.*\|.*is missing"):
        load_newest(engine, Location.of(root), IDENTITY)
    with pytest.raises(UserError, match=r"state-00001.bin is missing"):
        list(full_weights(Location.of(root) / committed(Location.of(root))[0]))
