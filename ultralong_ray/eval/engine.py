"""What every engine offers, and how an answer ends. Pure: no torch, no Ray.

A prompt goes to an engine as a `Request`, the same for all of them: the whole text, chat template and answer prefix
included, and its token ids. Engines choose the likeliest token each time and cut what they wrote with `cut_answer`, so
that the text that is scored ends at the same place whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt as the model reads it. `ids` are those of `text`, BOS included."""

    text: str
    ids: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()  # see `cut_answer`
    exact: bool = False  # as `cut_answer`
    messages: tuple[tuple[str, str], ...] = ()  # (role, content), for chat endpoints: what the template renders
    answer_prefix: str = ""  # with which `text` ends, behind the template's assistant header

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.ids) + self.max_new_tokens


class Engine(Protocol):
    """One model, ready to answer. Never cuts a prompt: one that it cannot read is a UserError."""

    tokenizer: Any

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """One answer per request, in order. Requests are made as they are taken: one may be a million tokens.

        Raises: UserError naming what the engine or its server refused, and the remedy.
        """
        ...

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Cross-entropy of every token after the first, in nats. input_ids: [seq]. Returns: float32 [seq - 1]."""
        ...

    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability behind the prompt in nats, and whether it is the greedy one."""
        ...


def cut_answer(text: str, stop: Sequence[str], exact: bool = False) -> str:
    """What counts of an answer. Without stop texts all of it; with them, what stands before the first one.

    White space in front of the answer is no stop and is removed where there are stop texts; with `exact` it is as good
    as any other text, which is how lm-evaluation-harness does it.
    """
    if not stop:
        return text
    text = text if exact else text.lstrip()
    ends = [place for mark in stop if (place := text.find(mark)) >= 0]
    return text[: min(ends)] if ends else text


def is_finished(text: str, stop: Sequence[str], exact: bool = False) -> bool:
    """Whether an answer so far holds a stop text, as `cut_answer` sees it, so that nothing more of it would count."""
    begun = text if exact else text.lstrip()
    return any(mark in begun for mark in stop)
