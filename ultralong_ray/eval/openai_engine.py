"""A model behind a server of the OpenAI protocol: requests in, greedy answers out.

Nothing is cut unnoticed: a prompt beyond the server's window is refused before it is sent, and a server that read
another number of prompt tokens than we did has another tokenizer or template, or dropped some of them. Why each answer
ended is kept in `finish_reasons`. Read against the OpenAI API reference and the servers of vLLM 0.18 (`max_model_len`
in /models, token ids as `prompt`, `continue_final_message`) and transformers 5.23.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from ultralong_ray.config.engines import EndpointEngine
from ultralong_ray.endpoint import EndpointClient, NoAnswer, Rejected
from ultralong_ray.eval.engine import Request, cut_answer
from ultralong_ray.types import UserError

logger = logging.getLogger(__name__)

CUT_SHORT = "length, after"  # begins the finish reason of an answer that the server ended before it was asked to
MOST_STOP_TEXTS = 4  # of the OpenAI API reference, "up to 4 sequences"
MODELS_ATTEMPTS = 2  # a server that is not up is found out by the first prompt
WINDOW_FIELDS = ("max_model_len", "max_context_length", "context_length", "context_window")  # of an entry of /models


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server sent for one request; counts are None where it did not say."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class OpenAIEngine:
    """One served model, ready to answer."""

    def __init__(self, folder: Path, config: EndpointEngine, model: str) -> None:
        """`folder` has the tokenizer, `model` is the recipe's name of it. Raises: UserError when it is not served."""
        if model not in config.served:
            raise UserError(
                f"evaluate.engine.served names no model of the server for {model!r} (it has "
                f"{', '.join(config.served)}); add it, or take {model!r} out of evaluate.models"
            )
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.finish_reasons: list[str] = []  # of the last `answers`, in order
        self._config, self._served = config, config.served[model]
        self._adds_bos = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        self._window: int | None = config.max_context_tokens
        self._window_known = self._window is not None

    def answers(self, requests: Iterable[Request]) -> list[str]:
        """One answer per request, in order; `concurrency` of them are under way at a time.

        Raises: UserError naming what the server refused or never answered, and the remedy.
        """
        return asyncio.run(self._answers(iter(requests)))

    def token_losses(self, input_ids: NDArray[np.int32]) -> NDArray[np.float32]:
        raise UserError("evaluate.engine: a served model gives no losses; perplexity needs kind in_process or sharded")

    def continuation_scores(
        self, prompt: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        raise UserError(
            "evaluate.engine: a served model gives no log-probabilities of given answers; ask standard/mmlu with kind "
            "in_process or sharded, or take it out of names"
        )

    def check(self) -> None:
        """Raises: UserError when nothing answers at the address: else every cell would wait for it."""
        asyncio.run(self._reach())

    async def _reach(self) -> None:
        async with self._client() as client:
            try:
                await client.get("/models", lambda body: None, self._config.max_attempts)
            except NoAnswer as error:
                raise UserError(
                    f"{self._config.base_url}/models: {error}. Start the server or look at it, or correct "
                    f"evaluate.engine.base_url, and submit again: stored cells are kept"
                ) from error
            except (Rejected, UserError) as error:
                logger.warning("%s/models: %s", self._config.base_url, error)  # prompts will say what is wrong

    def _client(self) -> EndpointClient:
        return EndpointClient(self._config, "evaluate.engine", f"evaluate.engine.served {self._served!r}")

    async def _answers(self, requests: Iterator[Request]) -> list[str]:
        numbered = enumerate(requests)
        found: dict[int, tuple[str, str]] = {}
        async with self._client() as client:
            await self._learn_window(client)

            async def work() -> None:
                for number, request in numbered:
                    completion = await self._ask(client, request)
                    found[number] = (
                        cut_answer(completion.text, request.stop, request.exact),
                        self._how_it_ended(request, completion),
                    )

            workers = [asyncio.create_task(work()) for _ in range(self._config.concurrency)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
        self.finish_reasons = [found[number][1] for number in range(len(found))]
        return [found[number][0] for number in range(len(found))]

    async def _learn_window(self, client: EndpointClient) -> None:
        """Ask the server, once, how long a prompt may be. One that does not say is believed to take any."""
        if self._window_known:
            return
        try:
            self._window = await client.get("/models", lambda body: window_of(body, self._served), MODELS_ATTEMPTS)
        except (NoAnswer, Rejected, UserError) as error:
            logger.warning("%s/models: %s; its window is not checked", self._config.base_url, error)
        self._window_known = True

    async def _ask(self, client: EndpointClient, request: Request) -> Completion:
        needed = len(request.ids) + request.max_new_tokens
        if self._window is not None and needed > self._window:
            raise UserError(
                f"evaluate.engine: {self._served!r} reads {self._window} tokens at most, and this prompt has "
                f"{len(request.ids)} with {request.max_new_tokens} to come; serve it with a longer window (vLLM: "
                f"--max-model-len {needed}), or ask for shorter context_lengths"
            )
        path = "/chat/completions" if self._config.api == "chat" else "/completions"
        try:
            completion = await client.post(path, self._body(request), parse_completion)
        except Rejected as error:
            raise UserError(
                f"{self._config.base_url}: the server refused a prompt of {len(request.ids)} tokens ({error})"
            ) from error
        except NoAnswer as error:
            raise UserError(
                f"{self._config.base_url}: no answer to one of its requests: {error}. Look at the server, "
                f"raise evaluate.engine.timeout_seconds or max_attempts, and submit again: stored cells are kept"
            ) from error
        self._check(request, completion)
        return completion

    def _body(self, request: Request) -> dict[str, Any]:
        config = self._config
        body: dict[str, Any] = {"model": self._served, "temperature": 0.0, **config.request_fields}
        # In chats too: max_completion_tokens, its newer name, is passed over by servers such as transformers 5.17.
        body["max_tokens"] = request.max_new_tokens
        if request.exact and request.stop:
            # Only to save time, since answers are cut here: servers may refuse more than the protocol's limit.
            body["stop"] = list(request.stop)[:MOST_STOP_TEXTS]
        if config.api == "completions":
            return {**body, "prompt": self._prompt(request)}
        if not request.messages:
            raise UserError(
                "evaluate.engine.api is chat, but this prompt is no chat: set evaluate.chat_template (or the task's) "
                'to true, or api = "completions"; standard tests always need completions'
            )
        messages = [{"role": role, "content": content} for role, content in request.messages]
        if request.answer_prefix and config.continue_answer:
            messages.append({"role": "assistant", "content": request.answer_prefix})
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return {**body, "messages": messages}

    def _prompt(self, request: Request) -> list[int] | str:
        """Ids, or a text to which the server's tokenizer adds the one BOS that it should have."""
        if self._config.prompt_as == "token_ids":
            return list(request.ids)
        bos = self.tokenizer.bos_token or ""
        return request.text.removeprefix(bos) if self._adds_bos and bos else request.text

    def _check(self, request: Request, completion: Completion) -> None:
        """Raises: UserError when the server read another prompt than the one that was sent."""
        read, sent = completion.prompt_tokens, len(request.ids)
        left_out = self._config.api == "chat" and request.answer_prefix and not self._config.continue_answer
        if read is not None and read != sent and not left_out:
            why = "it dropped some of them" if read < sent - 1 else "its tokenizer or chat template is another"
            raise UserError(
                f"evaluate.engine: the server read {read} tokens of a prompt that has {sent} here: {why}. Serve the "
                f"folder that the recipe evaluates, with a window that holds the prompt; a server that adds a BOS of "
                f'its own to text wants prompt_as = "token_ids"'
            )

    def _how_it_ended(self, request: Request, completion: Completion) -> str:
        """The server's reason, and of an answer that it ended too early, with how many tokens."""
        wrote = completion.completion_tokens
        if completion.finish_reason != "length" or wrote is None or wrote >= request.max_new_tokens:
            return completion.finish_reason
        logger.warning(
            "%s cut an answer after %d of %d tokens; it is scored as it is, and counted in the report",
            self._config.base_url,
            wrote,
            request.max_new_tokens,
        )
        return f"{CUT_SHORT} {wrote} of {request.max_new_tokens} tokens"


def parse_completion(body: Any) -> Completion:
    """The first choice of a (chat) completion; no text is an empty answer. Raises: ValueError for anything else, and
    where an error stands beside the choices: gateways say so, with status 200, that their server failed on the way."""
    try:
        choice = body["choices"][0]
        failed = body.get("error") or choice.get("error")
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        usage = body.get("usage") or {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no completion ({type(error).__name__}: {error})") from None
    if failed:
        raise ValueError("no completion (an error stands beside it)")
    if not isinstance(text, str | None):
        raise ValueError(f"no completion (its text is {type(text).__name__})")
    # JSON can name half of a character, which no file in UTF-8 holds
    text = (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    numbers = [count if isinstance(count, int) and not isinstance(count, bool) else None for count in counts]
    return Completion(text, str(choice.get("finish_reason") or ""), numbers[0], numbers[1])


def window_of(body: Any, model: str) -> int | None:
    """Tokens that /models says `model` reads at most. Raises: ValueError when it is no list of models."""
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise ValueError("no list of models")
    for entry in body["data"]:
        if isinstance(entry, dict) and entry.get("id") == model:
            values = [entry.get(name) for name in WINDOW_FIELDS]
            return next((value for value in values if isinstance(value, int) and value > 0), None)
    return None
