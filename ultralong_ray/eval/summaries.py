"""Scores of samples to the summary of the evaluate stage: per cent by task and length, means of passkey grids. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ultralong_ray.eval.cells import PASSKEY, Cell
from ultralong_ray.eval.tasks.score import mean_percent

Points = Mapping[Cell, Sequence[float]]  # of every sample of a cell, in order


def summarise_tasks(points: Points, model: str) -> dict[str, dict[str, float]]:
    """Per cent by task and context length, every sample counting once; RULER and LV-Eval rounded as they print it.

    Means are taken over samples in their order, as the benchmarks do: by way of the cells' means a half would be
    rounded the other way now and then.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for cell in sorted(points, key=lambda cell: (cell.shard, cell.depth_percent or 0.0)):
        if cell.model == model and cell.section >= 0:
            assert cell.context_length_tokens is not None
            found.setdefault(cell.task, {}).setdefault(cell.context_length_tokens, []).extend(points[cell])
    return {
        task: {str(length): mean_percent(task.split("/")[0], own) for length, own in sorted(lengths.items())}
        for task, lengths in sorted(found.items())
    }


def summarise(points: Points, model: str, base_window: int) -> dict[str, float | None]:
    """Mean and worst passkey score of a model, and the means on either side of the base window (None: no cells)."""
    cells = {
        cell: sum(own) / len(own)
        for cell, own in points.items()
        if cell.model == model and cell.task == PASSKEY and cell.context_length_tokens
    }
    within = [s for c, s in cells.items() if (c.context_length_tokens or 0) <= base_window]
    beyond = [s for c, s in cells.items() if (c.context_length_tokens or 0) > base_window]
    return {
        "mean": _mean(list(cells.values())),
        "min_cell": min(cells.values(), default=None),
        "mean_within_base_window": _mean(within),
        "mean_beyond_base_window": _mean(beyond),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
