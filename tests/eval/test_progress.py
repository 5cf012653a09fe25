"""The time that an evaluation says is left."""

from __future__ import annotations

import logging

import pytest

from ultralong_ray.eval.cells import Cell
from ultralong_ray.eval.progress import Progress, work_of


def passkey(tokens: int, depth: float = 0.0) -> Cell:
    return Cell("final", tokens, depth, tokens, num_samples=1)


def ruler(tokens: int, samples: int = 1) -> Cell:
    return Cell("final", tokens, None, samples * tokens, task="ruler/vt", section=0, num_samples=samples)


def test_long_prompts_take_more_than_their_tokens() -> None:
    assert work_of(passkey(1_048_576)) > 3.5 * work_of(passkey(524_288))
    assert work_of(ruler(65_536, samples=3)) == pytest.approx(3 * work_of(ruler(65_536)))
    assert work_of(ruler(4096)) > 2 * 4096  # its answer


def test_answers_decoded_together_take_the_steps_of_one() -> None:
    alone, two, all_ten = (work_of(ruler(4096, samples=10), batch_tokens) for batch_tokens in (1, 8192, 50_000))
    answer = work_of(ruler(4096)) - (4096 + 4096**2 / 53_000)
    assert alone - two == pytest.approx(5 * answer)
    assert alone - all_ten == pytest.approx(9 * answer)
    assert work_of(ruler(65_536), 50_000) == work_of(ruler(65_536))


def test_what_a_worker_holds_before_the_needle_is_not_read_again() -> None:
    whole, half, last = (work_of(passkey(1_000_000, depth)) for depth in (0.0, 50.0, 89.0))
    assert half == pytest.approx(0.75 * whole, rel=0.02)
    assert last < 0.25 * whole
    assert work_of(passkey(1_000_000, 100.0)) == whole  # of a length the first that is asked


def test_the_time_left_is_that_of_all_workers_at_their_pace() -> None:
    cells = [passkey(100_000, 0.0 + number) for number in range(10)]
    progress = Progress(10 * work_of(cells[0]), 10, num_workers=2)
    progress.begun(cells[0], first=False, now=0.0)
    progress.begun(cells[1], first=False, now=0.0)
    progress.finished(cells[0], now=10.0)
    progress.begun(cells[2], first=False, now=10.0)
    # nine are left at ten seconds each, of which ten have passed, over two workers
    assert progress.seconds_left(10.0) == pytest.approx(40.0, rel=0.02)
    assert progress.seconds_left(15.0) == pytest.approx(37.5, rel=0.02)  # of two cells, one has taken all its time


def test_first_cells_of_workers_count_only_until_there_are_others() -> None:
    cells = [passkey(100_000, 0.0 + number) for number in range(4)]
    progress = Progress(4 * work_of(cells[0]), 4, num_workers=1)
    progress.begun(cells[0], first=True, now=0.0)
    progress.finished(cells[0], now=60.0)
    assert progress.seconds_left(60.0) == pytest.approx(180.0, rel=0.01)
    progress.begun(cells[1], first=False, now=60.0)
    progress.finished(cells[1], now=65.0)
    assert progress.seconds_left(65.0) == pytest.approx(10.0, rel=0.01)


def test_failures_say_nothing_of_the_pace(caplog: pytest.LogCaptureFixture) -> None:
    cells = [passkey(100_000, 0.0 + number) for number in range(3)]
    progress = Progress(3 * work_of(cells[0]), 3, num_workers=1)
    for cell, seconds, answered in ((cells[0], 20.0, True), (cells[1], 0.1, False)):
        progress.begun(cell, first=False, now=0.0)
        with caplog.at_level(logging.INFO):
            progress.finished(cell, answered, now=seconds)
    assert progress.seconds_left(0.0) == pytest.approx(20.0, rel=0.01)
    assert "1 of 3 work items, about 0:4" in caplog.text
