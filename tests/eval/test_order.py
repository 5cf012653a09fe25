"""The order of work items: little is run twice, long ones begin first, workers change their model seldom."""

from __future__ import annotations

import heapq

import pytest

from ultralong_ray.eval.cells import Cell
from ultralong_ray.eval.order import next_cell

LENGTHS = [1000 * number for number in range(1, 41)]
DEPTHS = [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]


def passkeys(*models: str) -> list[Cell]:
    cells = [Cell(model, length, depth, length) for length in LENGTHS for model in models for depth in reversed(DEPTHS)]
    return sorted(cells, key=lambda cell: -cell.tokens)


def needle(cell: Cell) -> float:
    return (cell.context_length_tokens or 0) * (cell.depth_percent or 0) / 100


def cost(cell: Cell, last: Cell | None) -> float:
    """Of attention: the square of the length, less that of what the cache holds already."""
    shared = 0.0 if last is None or last.model != cell.model else min(needle(last), needle(cell))
    return cell.tokens**2 - shared**2


@pytest.mark.parametrize("workers", [1, 4, 8])
def test_a_passkey_grid_runs_its_common_noise_about_once(workers: int) -> None:
    todo, spent, changes = passkeys("base", "final"), 0.0, 0
    least = sum(cell.tokens**2 - needle(cell) ** 2 for cell in todo)
    free: list[tuple[float, int, Cell | None]] = [(0.0, number, None) for number in range(workers)]
    while todo:
        now, number, last = heapq.heappop(free)
        cell = next_cell(todo, last)
        todo.remove(cell)
        changes += last is not None and last.model != cell.model
        spent += cost(cell, last)
        heapq.heappush(free, (now + cost(cell, last), number, cell))
    ends = [end for end, *_ in free]
    assert spent < 1.1 * least, "each worker goes on in the noise that it has, across lengths"
    assert max(ends) < 1.05 * spent / workers, "all workers end at about the same time"
    assert changes <= 12 * workers


def test_the_longest_comes_first_and_no_prompt_of_half_its_length_is_put_before_it() -> None:
    todo = [Cell("final", None, 0.0, 900), *passkeys("final")[-30:]]
    assert next_cell(todo, None) is todo[0]
    last = Cell("final", 1000, 100, 1000)
    long = Cell("final", 8000, None, 8000, task="ruler/vt")
    assert next_cell([long, *todo], last) is long
    assert next_cell([long, *todo], Cell("base", 1000, 100, 1000)) is long


def test_a_worker_keeps_its_model_while_that_has_long_work() -> None:
    todo = [Cell("base", 1000, 0.0, 1000), Cell("final", 600, 0.0, 600), Cell("final", 400, 0.0, 400)]
    assert next_cell(todo, Cell("final", 1000, 0.0, 1000)) is todo[1]
    assert next_cell([todo[0], todo[2]], Cell("final", 1000, 0.0, 1000)) is todo[0]
