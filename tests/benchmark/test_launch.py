"""Processes of a contestant: answers by rank, and the reason when there are none."""

from __future__ import annotations

import pytest
import torch

from tests.machine import PATIENCE_SECONDS
from ultralong_ray.benchmark.launch import Place, RunFailed, Unavailable, run_ranks

MODULE = "tests.benchmark.contestants"


def test_answers_come_by_rank() -> None:
    answers = run_ranks(MODULE, 2, "cpu", "hello", PATIENCE_SECONDS)
    assert answers == [{"rank": rank, "sum": 3, "device": "cpu", "argument": "hello"} for rank in range(2)]


@pytest.mark.parametrize(("seconds", "expected"), [(60.0, 600.0), (1800.0, 1800.0)])
def test_a_collective_may_last_as_long_as_the_command(seconds: float, expected: float) -> None:
    assert run_ranks(MODULE, 1, "cpu", "timeout", seconds) == [{"seconds": expected, "device": "cpu"}]


@pytest.mark.parametrize(
    ("argument", "num_ranks", "kind", "words", "seconds"),
    [
        ("unavailable", 1, Unavailable, "the library is not installed", PATIENCE_SECONDS),
        ("rank 1 fails", 2, RunFailed, "no such luck", PATIENCE_SECONDS),  # rank 0 hangs in a barrier and is ended
        ("hang", 1, RunFailed, "not done after 1 s", 1.0),
    ],
)
def test_a_contestant_that_does_not_answer(
    argument: str, num_ranks: int, kind: type[Exception], words: str, seconds: float
) -> None:
    with pytest.raises(kind, match=words):
        run_ranks(MODULE, num_ranks, "cpu", argument, seconds)


def test_ranks_on_one_gpu_are_on_different_hosts_to_nccl() -> None:
    places = [Place(rank, 4, 2) for rank in range(4)]
    assert [place.gpu for place in places] == [0, 1, 0, 1]
    hosts = [place.environment["NCCL_HOSTID"] for place in places]
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    assert [place.environment["LOCAL_RANK"] for place in places] == ["0", "1", "0", "1"]
    assert "NCCL_HOSTID" not in Place(1, 2, 2).environment


def test_a_machine_with_too_few_gpus_is_said() -> None:
    there = torch.cuda.device_count()
    with pytest.raises(RunFailed, match=f"rank {there} has no GPU, torch sees {there} here"):
        run_ranks(MODULE, there + 1, "cuda", "hello", 60.0)
