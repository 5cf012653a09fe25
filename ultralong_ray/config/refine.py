"""[refine]: rewriting the responses of SFT samples with a model behind a chat-completions endpoint."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ultralong_ray.config.base import NonNegative, Positive, PositiveFloat, Section, operational, server_address
from ultralong_ray.config.sections import ChatSource

DEFAULT_PROMPT = """Below are a question and an answer to it. Write a better answer: correct, complete, well explained \
and in the same language. Show the steps where there are any, and keep a final result that is right. Reply with the \
answer alone, without a word about this request or about the first answer.

# Question

{question}

# Answer

{response}"""
# Openings with which chat models decline; compared without regard to case.
REFUSALS = (
    r"i['\u2019]?m (very |so )?sorry,? (but )?i (can['\u2019]?t|cannot|am (not able|unable))",
    r"(i['\u2019]?m|i am) (not able|unable) to (assist|help|fulfil|provide|comply|answer)",
    r"i (can['\u2019]?t|cannot|won['\u2019]?t) (assist|help|fulfil|provide|comply|answer)",
    r"as an ai( language)? model,? i (can['\u2019]?t|cannot|am|do not|don['\u2019]?t)",
)


class RefineConfig(Section):
    """UltraLong refined its responses with GPT-4o and GPT-4o-mini (arXiv 2504.06214, section 3.2)."""

    sources: Annotated[tuple[ChatSource, ...], Field(min_length=1)]
    """Chat samples, as [[sft.sources]]. The last assistant turn of each is rewritten."""
    num_samples: Positive | None = None
    """Samples to rewrite, chosen by hash; default: all."""
    base_url: str = operational("https://api.openai.com/v1")
    """Any server that has /chat/completions below this address."""
    api_key_env: str = operational("OPENAI_API_KEY")
    """Name of the environment variable that holds the key, which itself is never written anywhere. "": no key."""
    model: str
    system: str | None = None
    prompt: str = DEFAULT_PROMPT
    """{question}: the conversation before the answer; {response}: the answer that is there. Without {response} the
    model answers afresh."""
    temperature: Annotated[float, Field(ge=0.0)] | None = 0.0
    """None: not sent, for models that take no temperature."""
    max_completion_tokens: Positive | None = 4096
    """Longer answers are cut by the server and set aside. None: not sent."""
    request_fields: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request, for instance top_p, seed or reasoning_effort."""
    refusals: tuple[str, ...] = REFUSALS
    """Regular expressions: an answer that begins like one of them is set aside."""
    keep_original: bool = False
    """True: a sample whose new answer was set aside stays in the output with its old answer."""
    concurrency: Positive = operational(16)
    """Requests under way at a time."""
    max_attempts: Positive = operational(8)
    """Times that one request is sent before it counts as failed."""
    timeout_seconds: PositiveFloat = operational(120.0)
    """For one attempt, answer included."""
    backoff_seconds: PositiveFloat = operational(1.0)
    """Longest wait after the first failed attempt; doubled with each, up to max_backoff_seconds."""
    max_backoff_seconds: PositiveFloat = operational(60.0)
    max_retry_after_seconds: NonNegative = operational(600)
    """A server that asks for a longer wait than this stops the run, which can be submitted again later."""
    usd_per_million_input_tokens: Annotated[float, Field(ge=0.0)] = operational(0.0)
    usd_per_million_output_tokens: Annotated[float, Field(ge=0.0)] = operational(0.0)
    budget_usd: PositiveFloat | None = operational(None)
    """No request is sent once the answers, those of earlier runs included, have cost this much."""

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return server_address(value, "refine")

    @field_validator("refusals")
    @classmethod
    def _are_patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"refine.refusals {pattern!r} is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _prompt_and_budget(self) -> RefineConfig:
        if "{question}" not in self.prompt:
            raise ValueError("refine.prompt has no {question}, so every request would be the same")
        if self.budget_usd is not None and not (
            self.usd_per_million_input_tokens or self.usd_per_million_output_tokens
        ):
            raise ValueError(
                "refine.budget_usd needs refine.usd_per_million_input_tokens and refine.usd_per_million_output_tokens"
            )
        return self
