"""A request of response refinement in, the answer of a chat-completions endpoint out, by way of `endpoint`."""

from __future__ import annotations

from types import TracebackType

from ultralong_ray.config import RefineConfig
from ultralong_ray.data.refine_answers import Answer, Request, parse_answer
from ultralong_ray.endpoint import EndpointClient, NoAnswer, Rejected

__all__ = ["ChatClient", "NoAnswer"]


class ChatClient:
    """An open connection pool to one endpoint; use as `async with`."""

    def __init__(self, config: RefineConfig) -> None:
        self._endpoint = EndpointClient(config, "refine", f"refine.model {config.model!r}")

    async def __aenter__(self) -> ChatClient:
        await self._endpoint.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._endpoint.__aexit__(kind, error, trace)

    async def ask(self, request: Request) -> Answer:
        """The answer, or one whose `fault` says why there is none.

        Raises NoAnswer after `max_attempts` failures, and UserError when no request can succeed: wrong key, address or
        model, an exhausted quota, a wait longer than `max_retry_after_seconds`.
        """
        try:
            return await self._endpoint.post(
                "/chat/completions", request.body, lambda body: parse_answer(request.key, body)
            )
        except Rejected as error:
            return Answer(request.key, fault="rejected", detail=str(error))
        except NoAnswer as error:
            if not error.malformed:
                raise
            return Answer(request.key, fault="malformed", detail=error.reason)
