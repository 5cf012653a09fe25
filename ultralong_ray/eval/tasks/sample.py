"""One question to a model, as plain values: what every task hands to an engine and to `score`.

Data flows: task -> Sample -> (engine) answer -> score. A `Sample` is JSON-ready, so a worker can be sent one, store it
and score it again later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Turn:
    """One earlier message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt in parts, and how its answer is judged.

    The user's message is `context + question`, with nothing between them; the model's answer starts with
    `answer_prefix`, which stands after the chat template's assistant header. Samples of equal `turns` and a common
    start of `context` can share the work of that start.
    """

    task: str  # "ruler/vt", "lveval/cmrc_mixup_16k", "infinitebench/code_run", ...
    index: int
    context: str
    question: str
    answer_prefix: str
    references: tuple[Any, ...]  # texts; numbers for InfiniteBench's code_run, math_find and math_calc
    max_new_tokens: int
    metric: str  # a key of score.METRICS
    turns: tuple[Turn, ...] = ()
    prompt_tokens: int = 0  # of the whole prompt as the model reads it; 0: not measured yet
    stop: tuple[str, ...] = ()  # texts that end the answer; none of the official benchmarks has any
    facts: dict[str, Any] = field(default_factory=dict)  # depths, keywords, what was cut or reduced: JSON-ready
