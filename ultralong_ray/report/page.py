"""Writes the report of a run: files of finished stages in, one page and its numbers out.

<stage>/report.html   self-contained: no script, no request, readable from disk, on a phone, on paper, in the dark
<stage>/report.json   every number of the page, each beside the file it came from
<stage>/report.md     the verdict and the main tables, for a terminal or a pull request
<stage>/recipe.toml   the resolved recipe, to run it again
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from ultralong_ray.config import Recipe
from ultralong_ray.report import words
from ultralong_ray.report.evaluation import verdict
from ultralong_ray.report.facts import run_facts
from ultralong_ray.report.figures import Axis, Line, heatmap, length_histogram, line_chart
from ultralong_ray.report.reading import guarded
from ultralong_ray.report.recipe_toml import recipe_toml
from ultralong_ray.report.scores import clipped
from ultralong_ray.report.templates import rendered
from ultralong_ray.report.tuning import tuning_charts
from ultralong_ray.stages import inputs
from ultralong_ray.storage import StageDirectory

# A page of a 40 x 10 grid with 5 samples a cell would pass 3 MB; what is left out is counted on the page.
SAMPLE_CHARACTERS = 1_000_000
SAMPLE_FIELD_CHARACTERS = 600
DECODED_SAMPLE_CHARACTERS = 6_000

# Keys of report.json that may be None, as notes call them
SECTIONS = {
    "passkey": "Passkey grid",
    "perplexity": "Perplexity",
    "benchmarks": "Benchmarks",
    "tuning": "Trials",
    "data": "Data",
    "sft_data": "Data of the fine-tuning",
}

# (model, context length in tokens, depth in per cent) -> answers of that cell
Answers = dict[tuple[str, int, float], list[dict[str, Any]]]


def write_report(recipe: Recipe, directories: dict[str, StageDirectory], stage: StageDirectory) -> dict[str, Any]:
    """Write the four files into `stage` and return its summary: where the page is, the verdict, the notes.

    `directories` maps stage names to directories; stages that are absent or unfinished leave their section empty with
    the reason on the page. Nothing but finished stages is read, so the report can be made anywhere the files are.
    """
    facts, toml = run_facts(recipe, directories), recipe_toml(recipe)
    if (pages := guarded([], "", _pages, facts, toml)) is None:
        facts = _without_what_cannot_be_shown(facts, toml)
        pages = _pages(facts, toml)
    (stage.location / "recipe.toml").write_bytes(toml.encode())
    (stage.location / "report.json").write_json(facts)
    for name, text in zip(("report.md", "report.html"), pages, strict=True):
        (stage.location / name).write_bytes(text.encode())
    page = (stage.location / "report.html").uri
    summary = {"report": page, "verdict": facts["verdict"], "notes": facts["notes"]}
    unfinished = [name for name in inputs(recipe, "report") if name not in directories or not directories[name].done]
    return {**summary, "num_failed": _num_failed(facts), "num_unfinished_stages": len(unfinished)}


def _pages(facts: dict[str, Any], toml: str) -> tuple[str, str]:
    """The Markdown and the page. Adds to `facts` how many answers there is room for."""
    answers = shown_answers(facts["passkey"])
    facts["answers"] = {"num_shown": sum(map(len, answers.values())), "num_stored": _num_stored(facts["passkey"])}
    return _render("page.md.j2", facts, toml, answers), _render("page.html.j2", facts, toml, answers)


def _without_what_cannot_be_shown(facts: dict[str, Any], toml: str) -> dict[str, Any]:
    """`facts` less the sections that cannot be drawn even on a page of their own, each with a note."""
    shown = {**facts, **dict.fromkeys(SECTIONS)}
    for name, title in SECTIONS.items():
        alone = {**facts, **dict.fromkeys(SECTIONS), name: facts[name]}
        if guarded(facts["notes"], title, _pages, alone, toml) is not None:
            shown[name] = facts[name]
    return {**shown, "verdict": verdict(shown["passkey"], shown["benchmarks"])}


def _num_failed(facts: dict[str, Any]) -> int:
    """Cells of the evaluation that count 0 because they failed; with any, this report is not the last one."""
    grids = facts["passkey"]["models"] if facts["passkey"] else []
    return sum(grid["num_failed"] for grid in grids) + len((facts["benchmarks"] or {}).get("failed_cells", []))


def _render(template: str, facts: dict[str, Any], toml: str, answers: Answers) -> str:
    """`facts` is report.json, `toml` the resolved recipe, `answers` those that have room on the page."""
    return rendered(
        template,
        facts=facts,
        toml=toml,
        charts=_charts(facts),
        answers=answers,
        max_decoded=DECODED_SAMPLE_CHARACTERS,
        examples_per_score=_examples_per_score(facts["benchmarks"]),
    )


def _charts(facts: dict[str, Any]) -> dict[str, Any]:
    """Every chart of the page as inline SVG; an empty one where there is nothing to draw."""
    passkey = facts["passkey"]
    return {
        "heatmaps": [heatmap(grid, passkey) for grid in passkey["models"]] if passkey else [],
        "needles": _needle_charts(facts["benchmarks"]),
        "documents": _document_charts(facts["benchmarks"]),
        "loss": {name: _loss_charts(name, training) for name, training in facts["training"].items() if training},
        "tuning": tuning_charts(facts["tuning"]),
        "perplexity": _perplexity_chart(facts["perplexity"]) if facts["perplexity"] else Markup(""),
        "lengths": _length_charts(facts["data"]) if facts["data"] else [],
    }


def _needle_charts(benchmarks: dict[str, Any] | None) -> dict[str, list[dict[str, Any]]]:
    """By suite, a heatmap per task and model where tasks have depths."""
    charts = {}
    for suite in (benchmarks or {}).get("suites", []):
        charts[suite["suite"]] = [
            {"title": f"{grid['task']}, {grid['label']}", "svg": heatmap(grid, grid, grid["task"])}
            for grid in suite["grids"]
        ]
    return charts


def _document_charts(benchmarks: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Loss by position, a chart per kind of documents at the greatest length that was asked."""
    suite = next((each for each in (benchmarks or {}).get("suites", []) if each["suite"] == "perplexity"), None)
    if suite is None:
        return []
    lines: dict[str, list[Line]] = {}
    for table in suite["models"]:
        for row in table["rows"]:
            measured = [score for score in row["scores"] if score and "bucket_loss" in score]
            if measured:
                longest = measured[-1]["bucket_end_tokens"], measured[-1]["bucket_loss"]
                lines.setdefault(row["name"], []).append(Line(table["label"], f"model-{table['model']}", *longest))
    across = Axis("position of the predicted token", "log2", lambda end: words.short_tokens(round(end)))
    up = Axis("loss, nats per token", "linear", words.tick)
    return [
        {"title": f"Loss by position: {name}", "svg": line_chart(f"documents-{name}", name, curves, across, up)}
        for name, curves in lines.items()
    ]


def _examples_per_score(benchmarks: dict[str, Any] | None) -> int:
    """As many answers of every score as fit into SAMPLE_CHARACTERS, but always one."""
    suites = (benchmarks or {}).get("suites", [])
    scores = [
        score for suite in suites for table in suite["models"] for row in table["rows"] for score in row["scores"]
    ]
    characters = sum(len(str(example)) for score in scores if score for example in score["examples"])
    largest = max((len(score["examples"]) for score in scores if score), default=1)
    return largest if characters <= SAMPLE_CHARACTERS else max(1, largest * SAMPLE_CHARACTERS // characters)


def _loss_charts(name: str, training: dict[str, Any]) -> list[Markup]:
    curves = training["curves"]
    steps = Axis("optimizer step", "linear", words.tokens, whole=True)
    what = "Continued pretraining" if name == "pretrain" else "Fine-tuning"
    loss = Line("loss", "loss", curves["step"], curves["loss"])
    rate = Line("learning rate", "rate", curves["step"], curves["learning_rate"])
    return [
        line_chart(f"{name}-loss", f"{what}: loss", [loss], steps, Axis("loss, nats per token", "linear", words.tick)),
        line_chart(
            f"{name}-rate",
            f"{what}: learning rate",
            [rate],
            steps,
            Axis("learning rate", "linear", words.tick, from_zero=True),
            height=150,
        ),
    ]


def _perplexity_chart(perplexity: dict[str, Any]) -> Markup:
    """Logarithmic where the curves span a factor of ten: a model beyond its window leaves every linear axis."""
    lines = [
        Line(curve["label"], f"model-{curve['model']}", curve["bucket_end_tokens"], curve["perplexity"])
        for curve in perplexity["models"]
    ]
    ends = [end for line in lines for end in line.xs]
    values = [value for line in lines for value in line.ys if value is not None]
    wide = bool(values) and max(values) > 10 * min(values)
    return line_chart(
        "perplexity",
        "Perplexity by position",
        lines,
        Axis(
            "position of the predicted token",
            "log2" if max(ends) >= 8 * min(ends) > 0 else "linear",
            lambda end: words.short_tokens(round(end)),
        ),
        Axis("perplexity", "log10" if wide else "linear", words.tick),
        height=300,
        edge=perplexity["base_window_tokens"],
    )


def _length_charts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """One histogram over all domains, then one per domain."""
    labels = [_bucket_label(lower, upper) for lower, upper in data["bucket_bounds_tokens"]]
    return [
        {
            "domain": chart["domain"],
            "svg": length_histogram(
                f"lengths-{index}",
                f"Document lengths, {chart['domain'] or 'all domains'}",
                labels,
                chart["before"],
                chart["after"],
            ),
        }
        for index, chart in enumerate(data["bucket_shares"])
    ]


def _bucket_label(lower: int | None, upper: int | None) -> str:
    if lower is None or upper is None:
        return f"< {words.short_tokens(upper)}" if upper is not None else f"{words.short_tokens(lower or 0)} +"
    return f"{words.short_tokens(lower)}-{words.short_tokens(upper)}"


def shown_answers(passkey: dict[str, Any] | None) -> Answers:
    """The answers that fit into SAMPLE_CHARACTERS: every cell gets one before any gets two, wrong ones first."""
    stored = {
        (grid["model"], cell["context_length_tokens"], cell["depth_percent"]): sorted(
            cell["samples"], key=lambda sample: bool(sample.get("right"))
        )
        for grid, cell in _cells(passkey)
    }
    left = SAMPLE_CHARACTERS
    shown: Answers = {key: [] for key in stored}
    for turn in range(max(map(len, stored.values()), default=0)):
        for key, samples in stored.items():
            if turn >= len(samples):
                continue
            texts = {name: _end(samples[turn].get(name)) for name in ("prompt_end", "expected", "answer")}
            cost = sum(map(len, texts.values())) + 250  # 250: the markup
            if cost <= left:
                left -= cost
                shown[key].append({"right": bool(samples[turn].get("right")), **texts})
    return shown


def _num_stored(passkey: dict[str, Any] | None) -> int:
    return sum(len(cell["samples"]) for _, cell in _cells(passkey))


def _cells(passkey: dict[str, Any] | None) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(grid, cell) of every cell that is there."""
    for grid in passkey["models"] if passkey else []:
        yield from ((grid, cell) for row in grid["cells"] for cell in row if cell is not None)


def _end(value: Any) -> str:
    """A prompt's question and an answer's last words are what one looks for."""
    return clipped(value, SAMPLE_FIELD_CHARACTERS, keep_end=True)
