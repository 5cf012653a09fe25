"""Which work item a worker takes next: a long one, and among those what repeats least of its last prompt."""

from __future__ import annotations

from collections.abc import Iterable

from ultralong_ray.eval.cells import PASSKEY, Cell


def next_cell(todo: Iterable[Cell], last: Cell | None) -> Cell:
    """Of `todo`, which is ordered longest first and not empty, for a worker that has just done `last`.

    It is at least half as long as the longest, so that the last ones to finish are short, and of the model that the
    worker has loaded. Among these it shares the longest beginning with what the worker's cache holds: passkey prompts
    of all lengths begin with the same noise, up to their needles.
    """
    cells = list(todo)
    near = [cell for cell in cells if last is not None and cell.model == last.model]
    near = [cell for cell in near if 2 * cell.tokens >= cells[0].tokens]
    return max(near, key=lambda cell: _shared_tokens(last, cell), default=cells[0])


def _shared_tokens(last: Cell | None, cell: Cell) -> float:
    """About as many tokens as both prompts begin with."""
    if last is None or not last.task == cell.task == PASSKEY:
        return 0.0
    return min(_noise_tokens(last), _noise_tokens(cell))


def _noise_tokens(cell: Cell) -> float:
    """Tokens before the needle; 0 of what has none."""
    return (cell.context_length_tokens or 0) * (cell.depth_percent or 0.0) / 100
