"""What all kinds of [[evaluate.tasks]] share. A section says what work it asks for and which files it reads."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field

from ultralong_ray.config.base import Positive, Section

Percent = Annotated[float, Field(ge=0, le=100)]
Depths = Annotated[tuple[Percent, ...], Field(min_length=1)]
Paths = tuple[str, ...]


class Work(NamedTuple):
    """One benchmark task at one context length and, where it has one, one depth. `task` is that of its `Sample`s."""

    task: str
    context_length_tokens: int
    depth_percent: float | None


class TaskSection(Section):
    """What all kinds share."""

    context_lengths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Tokens of prompt, chat template and answer together. Texts from files lose their middle beyond it."""
    chat_template: bool | None = None
    """Default: as evaluate.chat_template."""

    def names_of_tasks(self) -> list[str]:
        """The tasks of this section as samples and cells name them: "ruler/vt", "lveval/cmrc_mixup_16k"."""
        raise NotImplementedError

    def depths(self) -> tuple[float | None, ...]:
        """Depths at which every task is asked; (None,) where a task places its needles itself."""
        return (None,)

    def works(self) -> list[Work]:
        return [
            Work(name, length, depth)
            for name in self.names_of_tasks()
            for length in self.context_lengths
            for depth in self.depths()
        ]

    def paths(self) -> list[tuple[str, str]]:
        """(field, path) of everything that this section reads."""
        return []
