"""The templates beside this file to text: HTML is escaped, Markdown is not. jinja2 was read at 3.1.6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from ultralong_ray.report import words
from ultralong_ray.report.figures import answers_anchor, score_colour


def rendered(template: str, **values: Any) -> str:
    """Text that can be written as UTF-8. Half characters, which JSON lets through, are replaced.

    Raises jinja2.UndefinedError where the template asks for a value that is not among them.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        tokens=words.tokens,
        short_tokens=words.short_tokens,
        number=words.number,
        duration=words.duration,
        colour=score_colour,
    )
    text = environment.get_template(template).render(anchor=answers_anchor, **values)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
