"""Two evaluated models side by side: stored cells of both in; comparison.html, .md and .json out.

    python jobs/evaluate.py --compare A B [--out DIR]            A, B: a run's workdir or its evaluate stage, and #model
    python jobs/evaluate.py RECIPE.toml --compare base final     models of one recipe

Scores stand side by side where both were asked the same task at the same length. Where the very same samples were
asked, the interval of the difference is taken over pairs, which is far narrower.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ultralong_ray.config import Recipe
from ultralong_ray.recipe import load_recipe
from ultralong_ray.report.benchmarks import depth_grids, mixed_sources
from ultralong_ray.report.figures import heatmap
from ultralong_ray.report.intervals import DIFFERENCE_WORDS, difference, drawn_difference
from ultralong_ray.report.reading import StageReader
from ultralong_ray.report.scores import DOCUMENTS, FAILED_ARE, PLAN_FILE, Score, read_scores
from ultralong_ray.report.templates import rendered
from ultralong_ray.stages import stage_directory
from ultralong_ray.storage import DEFAULT_OPTIONS, Location, StageDirectory, refusals_in_words
from ultralong_ray.types import StorageOptions, UserError

INTERVALS_ARE = f"95 % intervals of the difference B - A: {DIFFERENCE_WORDS}"
# fields of a section of evaluate.tasks
CHOOSES_CELLS = {"names", "levels", "context_lengths", "depths_percent", "samples_per_cell", "num_needles"}


@dataclass(frozen=True)
class Side:
    """One model of one evaluation."""

    name: str  # as it was named on the command line
    stage: StageDirectory
    model: str


def compare_command(arguments: list[str]) -> int:
    """Parse the command line, write the comparison, print its Markdown. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", help="TOML file; then A and B may be names of its models")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), required=True)
    parser.add_argument("--out", default="runs/comparison", help="folder of the three files (default: %(default)s)")
    parsed, overrides = parser.parse_known_args(arguments)
    try:
        recipe = load_recipe(parsed.recipe, overrides) if parsed.recipe else None
        if recipe is None and overrides:
            raise UserError(f"{overrides[0]!r} changes a recipe, and none is given; name one, or leave it out")
        out = Location.of(parsed.out, _options(recipe))
        with refusals_in_words():
            first, second = (find_side(text, recipe) for text in parsed.compare)
            print(write_comparison(first, second, out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"comparison: {out}/comparison.html")
    return 0


def find_side(text: str, recipe: Recipe | None) -> Side:
    """What A or B names. Raises: UserError when there is no evaluation, several, or no such model."""
    place, _, model = text.partition("#")
    if recipe is not None and recipe.evaluate is not None and text in recipe.evaluate.models:
        stage = stage_directory(recipe, "evaluate")
        model = text
    else:
        stage = _find_stage(Location.of(place, _options(recipe)))
    plan = StageReader(stage).read_json(PLAN_FILE) or {}  # trainings have a file of that name as well
    models = sorted({cell["model"] for cell in plan.get("cells", [])})
    if not models:
        raise UserError(
            f"{text}: no evaluation at {stage.location} (no {PLAN_FILE} that names cells); run jobs/evaluate.py first"
        )
    chosen = model or ("final" if "final" in models else models[0] if len(models) == 1 else "")
    if chosen not in models:
        named = f"has no model {chosen!r}" if chosen else "has several models"
        raise UserError(f"{text}: the evaluation {named}; name one of {', '.join(models)}, as in {place}#{models[0]}")
    return Side(text, stage, chosen)


def _options(recipe: Recipe | None) -> StorageOptions:
    return DEFAULT_OPTIONS if recipe is None else recipe.storage.options


def _find_stage(place: Location) -> StageDirectory:
    """An evaluate stage, given itself or by the workdir that holds it."""
    if (place / PLAN_FILE).exists():
        return StageDirectory("evaluate", place.name.rpartition("-")[2], place)
    plans = [file for file in place.files(recursive=True) if file.name == PLAN_FILE]
    stages = [file.parent for file in plans if file.parent.name.startswith("evaluate-")]
    if not stages:
        raise UserError(f"{place}: neither an evaluate stage nor a workdir with one; run jobs/evaluate.py first")
    if len(stages) > 1:
        raise UserError(f"{place} holds {len(stages)} evaluations; name one of {', '.join(map(str, stages))}")
    return StageDirectory("evaluate", stages[0].name.rpartition("-")[2], stages[0])


def write_comparison(first: Side, second: Side, out: Location) -> str:
    """Write the three files into `out` and return the Markdown."""
    facts = comparison_facts(first, second)
    (out / "comparison.json").write_json(facts)
    charts = [
        {"title": f"{side}: {grid['task']}", "svg": heatmap(grid, grid, f"{side} {grid['task']}")}
        for side in ("A", "B")
        for grid in facts[side.lower()]["grids"]
    ]
    page = rendered("compare.html.j2", facts=facts, charts=charts)
    text = rendered("compare.md.j2", facts=facts)
    (out / "comparison.html").write_bytes(page.encode())
    (out / "comparison.md").write_bytes(text.encode())
    return text


def comparison_facts(first: Side, second: Side) -> dict[str, Any]:
    """JSON-ready. Raises: UserError when the two have no task and length in common."""
    notes: list[str] = []
    scores = [_scores(side, notes) for side in (first, second)]
    by_place = [{(score.task, score.context_length_tokens): score for score in own} for own in scores]
    rows = [_row(score, by_place[1][place]) for place, score in by_place[0].items() if place in by_place[1]]
    if not rows:
        raise UserError(f"{first.name} and {second.name} have no task at the same length in common")
    only = [sorted(set(own) - set(other)) for own, other in (by_place, by_place[::-1])]
    sides = [
        {
            "name": side.name,
            "model": side.model,
            "evaluation": side.stage.location.uri,
            "only": [f"{task} at {length}" if length else task for task, length in alone],
            "grids": depth_grids(own, {}, _base_window(side)),
            "settings": {f"{score.task} at {score.context_length_tokens}": score.settings for score in own},
        }
        for side, own, alone in zip((first, second), scores, only, strict=True)
    ]
    return {
        "a": sides[0],
        "b": sides[1],
        "rows": rows,
        "intervals_are": INTERVALS_ARE,
        "failed_are": FAILED_ARE,
        "notes": list(dict.fromkeys(notes)),  # both sides may be of one evaluation
    }


def _scores(side: Side, notes: list[str]) -> list[Score]:
    return [s for s in read_scores(StageReader(side.stage, notes), with_passkey=True) if s.model == side.model]


def _base_window(side: Side) -> int:
    """Tokens, from the summary of a finished evaluation; 0 where it has not finished."""
    return int(side.stage.summary().get("base_context_length", 0)) if side.stage.done else 0


def _row(a: Score, b: Score) -> dict[str, Any]:
    """One task at one length. `low`, `high` and `difference` are in per cent points, of documents in nats a token.

    Cells that failed or are missing have no settings, which are no others.
    """
    paired = a.identities == b.identities
    spread: Sequence[float | None] = (None, None)
    apart: float | None = None
    if a.losses and b.losses:
        spread = drawn_difference(a.losses, b.losses, paired=paired) or (None, None)
        apart = b.loss_facts()["loss"] - a.loss_facts()["loss"]
    elif a.percent is not None and b.percent is not None and a.suite != DOCUMENTS:
        spread = [100 * end for end in difference(a.points, b.points, paired=paired)]
        apart = b.percent - a.percent
    return {
        "task": a.task,
        "context_length_tokens": a.context_length_tokens,
        "a": a.facts(),
        "b": b.facts(),
        "difference": apart,
        "low": spread[0],
        "high": spread[1],
        "paired": paired,
        "same_settings": not (a.settings and b.settings) or _of_questions(a.settings) == _of_questions(b.settings),
        "mixed_sources": [] if paired else mixed_sources([a, b]),
    }


def _of_questions(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what says only which cells their section has: those of a row are of one task and length."""
    section = settings.get("section")
    if not isinstance(section, dict):
        return settings
    return {**settings, "section": {name: value for name, value in section.items() if name not in CHOOSES_CELLS}}
