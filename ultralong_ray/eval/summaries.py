"""Scores of cells to the summary of the evaluate stage: per cent by task and length, means of passkey grids. Pure."""

from __future__ import annotations

from ultralong_ray.eval.cells import PASSKEY, Cell
from ultralong_ray.eval.tasks.score import mean_percent


def summarise_tasks(scores: dict[Cell, float], model: str) -> dict[str, dict[str, float]]:
    """Per cent by task and context length, every sample counting once; RULER and LV-Eval rounded as they print it."""
    found: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for cell, score in scores.items():
        if cell.model == model and cell.section >= 0:
            place = found.setdefault(cell.task, {}).setdefault(str(cell.context_length_tokens), [])
            place.append((score, cell.num_samples))
    return {
        task: {
            length: mean_percent(task.split("/")[0], [sum(s * n for s, n in parts) / sum(n for _, n in parts)])
            for length, parts in sorted(lengths.items(), key=lambda item: int(item[0]))
        }
        for task, lengths in sorted(found.items())
    }


def summarise(scores: dict[Cell, float], model: str, base_window: int) -> dict[str, float | None]:
    """Mean and worst passkey score of a model, and the means on either side of the base window (None: no cells)."""
    cells = {c: s for c, s in scores.items() if c.model == model and c.task == PASSKEY and c.context_length_tokens}
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
