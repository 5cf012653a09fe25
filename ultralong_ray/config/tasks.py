"""[[evaluate.tasks]]: which benchmark, at which lengths, on whose data. One section a kind, told apart by `kind`.

A section says what work it asks for (`works`: task, context length, depth) and which files it reads (`paths`); the
evaluation room does the rest.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ultralong_ray.config.made_tasks import (
    ManyshotTask,
    MultiroundTask,
    NeedleTask,
    RetrievedTask,
    RulerTask,
    ShortSkillsTask,
)
from ultralong_ray.config.read_tasks import InfinitebenchTask, LvevalTask, PerplexityTask, StandardTask

Task = Annotated[
    RulerTask
    | StandardTask
    | ShortSkillsTask
    | PerplexityTask
    | NeedleTask
    | MultiroundTask
    | ManyshotTask
    | RetrievedTask
    | LvevalTask
    | InfinitebenchTask,
    Field(discriminator="kind"),
]
