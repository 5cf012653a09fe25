"""[evaluate.engine]: who answers the questions of an evaluation. One section a kind, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ultralong_ray.config.base import NonNegative, Positive, PositiveFloat, Section, operational, server_address


class InProcessEngine(Section):
    """The Hugging Face model in the worker, on one GPU or on CPU."""

    kind: Literal["in_process"] = "in_process"
    batch_tokens: Positive = operational(131_072)
    """Of the prompts and answers that are decoded together: so many keys and values are in memory, beside those of the
    prompt that is being read. A longer prompt is answered alone. 1: one at a time."""


class ShardedEngine(Section):
    """One prompt's keys and values spread over `degree` processes, each with the whole weights.

    Every one of them asks Ray for evaluate.cpus_per_task and evaluate.gpus_per_task.
    """

    kind: Literal["sharded"]
    degree: Positive
    ulysses_degree: Positive | None = None
    """Processes that split the heads; the ring has the rest. Default: as many as the heads allow."""


class EndpointEngine(Section):
    """Any server of the OpenAI protocol: vLLM, SGLang, Ray Serve LLM, `transformers serve`.

    The prompts are written with the tokenizer of the model's folder, which must be the server's.
    """

    kind: Literal["openai"]
    base_url: str = operational("http://localhost:8000/v1")
    served: Annotated[dict[str, str], Field(min_length=1)]
    """Name of the recipe's model to the name by which the server has it: { final = "ultralong-1m" }."""
    api: Literal["completions", "chat"] = "completions"
    """completions: the prompt goes as it is. chat: as messages, and the server's chat template writes it."""
    prompt_as: Literal["token_ids", "text"] = "token_ids"
    """Of completions. Text for servers that take no ids (`transformers serve`)."""
    continue_answer: bool = True
    """Of chat: send the beginning of the answer as an unfinished turn (vLLM, SGLang). False: leave it out."""
    max_context_tokens: Positive | None = None
    """What the server reads at most, prompt and answer; default: what /models says (max_model_len)."""
    request_fields: dict[str, Any] = Field(default_factory=dict)
    """More fields of the request, for instance seed."""
    api_key_env: str = operational("")
    """Name of the environment variable that holds the key, which itself is never written anywhere. "": no key."""
    concurrency: Positive = operational(8)
    """Requests of one worker under way at a time."""
    max_attempts: Positive = operational(6)
    """Times that one request is sent before it counts as failed."""
    timeout_seconds: PositiveFloat = operational(600.0)
    """For one attempt, answer included."""
    backoff_seconds: PositiveFloat = operational(1.0)
    """Longest wait after the first failed attempt; doubled with each, up to max_backoff_seconds."""
    max_backoff_seconds: PositiveFloat = operational(60.0)
    max_retry_after_seconds: NonNegative = operational(600)

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return server_address(value, "evaluate.engine")


class VllmEngine(Section):
    """vLLM on this cluster by way of `ray.data.llm`; the extra `vllm` must be installed on every node."""

    kind: Literal["vllm"]
    tensor_parallel_degree: Positive = operational(1)
    replicas: Positive = operational(1)
    """Models that answer side by side; each asks Ray for tensor_parallel_degree GPUs."""
    batch_size: Positive = operational(32)
    """Prompts that a replica is given at a time."""
    max_model_len: Positive | None = None
    """Tokens of a prompt and its answer; default: the window that the model's config.json names."""
    engine_arguments: dict[str, Any] = Field(default_factory=dict)
    """More arguments of vLLM's engine, by its names."""


EngineConfig = Annotated[InProcessEngine | ShardedEngine | EndpointEngine | VllmEngine, Field(discriminator="kind")]
