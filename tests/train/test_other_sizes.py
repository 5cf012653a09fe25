"""A run goes on with other numbers of workers and at other degrees, and its losses stay the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machine import PATIENCE_SECONDS, wait_for
from tests.parallel.spawn import run_distributed
from tests.train import made_jobs
from tests.train.made_jobs import job, write_inputs
from tests.train.small_cluster import SmallCluster
from ultralong_ray.storage import Location
from ultralong_ray.train.events import read_events
from ultralong_ray.train.metrics import read_metrics
from ultralong_ray.train.status import describe_run

STEPS = 8
# (ranks, degree) of steps 1-2, 3-4, 5-6 and 7-8
WORLDS = [(4, 2), (2, 2), (4, 2), (4, 2)]
DEGREES = [(4, 4), (4, 2), (4, 1), (4, 4)]


def train_to(folder: Path, stage: str, last_step: int, ranks: int, degree: int) -> int:
    sizes = {"cluster": {"num_workers": ranks}, "sequence_parallel_degree": degree}
    return made_jobs.train_to(job(folder, stage, steps=STEPS, global_batch_sequences=4, **sizes), last_step)


def unbroken_degrees_and_first_world(folder: Path) -> list[int]:
    """On four ranks: a run in one go, the whole chain of degrees, and the first part of the chain of worlds."""
    started = [train_to(folder, "unbroken", STEPS, 4, 4)]
    started += [train_to(folder, "degrees", 2 * part, *size) for part, size in enumerate(DEGREES, 1)]
    return [*started, train_to(folder, "worlds", 2, *WORLDS[0])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sizes")
    write_inputs(made)
    assert run_distributed(unbroken_degrees_and_first_world, 4, made) == [[0, -1, -1, -1, 6, -1]] * 4
    run_distributed(train_to, 2, made, "worlds", 4, *WORLDS[1])
    assert run_distributed(train_to, 4, made, "worlds", STEPS, *WORLDS[2]) == [4] * 4
    return made


@pytest.mark.parametrize("stage", ["worlds", "degrees"])
def test_the_losses_are_those_of_the_unbroken_run(folder: Path, stage: str) -> None:
    expected, found = (read_metrics(Location.of(folder / name)) for name in ("unbroken", stage))
    assert [record.step for record in found] == list(range(1, STEPS + 1))
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
        assert (other.learning_rate, other.tokens, other.epoch, other.sequence) == (
            (one.learning_rate, one.tokens, one.epoch, one.sequence)
        )
    assert found[-1].loss < found[0].loss - 0.3
    begins = [event for event in read_events(Location.of(folder / stage)) if event["event"] in ("start", "resume")]
    layouts = [(event["layout"]["world_size"], event["layout"]["ulysses_degree"]) for event in begins]
    assert layouts == (DEGREES if stage == "degrees" else WORLDS[:3])


@pytest.mark.slow
def test_a_run_grows_on_a_node_that_joins_and_shrinks_when_one_is_drained_or_lost(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    cluster = SmallCluster(head_cpus=1)
    try:
        changes = {
            "steps": 100_000,
            "global_batch_sequences": 8,
            "checkpoint_every_steps": 20,
            "cluster": {"num_workers": 4, "min_workers": 1, "max_failures": -1},  # three do not divide the batch
        }
        driver = cluster.start_driver(tmp_path, "elastic", changes)
        stage = Location.of(tmp_path / "elastic")

        def sizes() -> list[int]:
            assert driver.poll() is None, (tmp_path / "elastic.log").read_text()[-3000:]
            begins = [event for event in read_events(stage) if event["event"] in ("start", "resume")]
            return [event["layout"]["world_size"] for event in begins]

        wait_for(lambda: sizes() == [1] and len(read_metrics(stage)) >= 2, PATIENCE_SECONDS, "one worker, the least")
        node = cluster.add_node(2)
        wait_for(lambda: sizes() == [1, 2], PATIENCE_SECONDS, "two of three workers")
        cluster.drain_node(node, 200)
        wait_for(lambda: sizes() == [1, 2, 1], 190, "one worker before the drained node goes")
        cluster.kill_node(node)
        node = cluster.add_node(2)
        wait_for(lambda: sizes() == [1, 2, 1, 2], PATIENCE_SECONDS, "two workers again")
        cluster.kill_node(node)
        wait_for(lambda: sizes()[-1] == 1 and len(sizes()) > 4, PATIENCE_SECONDS, "one worker again")
        grown = [(event["workers"], event["to"]) for event in read_events(stage) if event["event"] == "resize"]
        assert grown.count((1, 2)) == 2
        steps = [record.step for record in read_metrics(stage)]
        assert steps == list(range(1, len(steps) + 1))
        status = describe_run(stage)
        assert "2 workers, now 1" in status and "1 workers became 2" in status
        print(status)
    finally:
        cluster.close()
