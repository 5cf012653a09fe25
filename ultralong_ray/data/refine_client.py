"""A request in, the answer of a chat-completions endpoint out, however often it has to be sent.

Tried again: time-outs, lost connections, 408, 425, 429, 5xx and bodies that are no chat completion; with exponential
backoff and full jitter (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog 2015), or as long as the
server's Retry-After asks, in which time no other request is sent either. Not tried again: what the server refuses for
good. The key goes into the Authorization header and nowhere else; it is blotted out of whatever a server says.

Read against aiohttp 3.14.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType

import aiohttp

from ultralong_ray.config import RefineConfig
from ultralong_ray.data.refine_answers import Answer, Request, parse_answer
from ultralong_ray.types import UserError

log = logging.getLogger(__name__)

RETRIED = {408, 425, 429}
QUOTED_CHARACTERS = 300  # of what a server says


class NoAnswer(Exception):
    """A request that failed `max_attempts` times."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that may succeed when it is made again."""

    reason: str
    retry_after_seconds: float | None = None
    malformed: bool = False  # the server answered, but not with a chat completion


class ChatClient:
    """An open connection pool to one endpoint; use as `async with`."""

    def __init__(self, config: RefineConfig) -> None:
        self._config = config
        self._key = _key(config)
        self._not_before = 0.0  # monotonic seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> ChatClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=self._config.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, request: Request) -> Answer:
        """The answer, or one whose `fault` says why there is none.

        Raises NoAnswer after `max_attempts` failures, and UserError when no request can succeed: wrong key, address or
        model, an exhausted quota, a wait longer than `max_retry_after_seconds`.
        """
        failure = Failure("")
        for attempt in range(1, self._config.max_attempts + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            outcome = await self._attempt(request)
            if isinstance(outcome, Answer):
                return outcome
            failure = outcome
            log.debug("attempt %d: %s", attempt, failure.reason)
            if attempt < self._config.max_attempts:
                await self._wait(attempt, failure)
        if failure.malformed:
            return Answer(request.key, fault="malformed", detail=failure.reason)
        raise NoAnswer(f"{failure.reason} ({self._config.max_attempts} attempts)")

    async def _attempt(self, request: Request) -> Answer | Failure:
        assert self._session is not None
        address = f"{self._config.base_url}/chat/completions"
        try:
            async with self._session.post(address, json=request.body, allow_redirects=False) as response:
                return self._judge(request, response.status, await response.text(errors="replace"), response.headers)
        except TimeoutError:
            return Failure(f"no answer within refine.timeout_seconds {self._config.timeout_seconds:g}")
        except (aiohttp.ClientError, OSError) as error:
            return Failure(self._clean(f"{type(error).__name__}: {error}"))

    def _judge(self, request: Request, status: int, text: str, headers: Mapping[str, str]) -> Answer | Failure:
        said = self._clean(" ".join(text.split())[:QUOTED_CHARACTERS])
        if status == 200:
            try:
                return parse_answer(request.key, json.loads(text))
            except ValueError as error:
                return Failure(f"{error}: {said}", malformed=True)
        if status == 429 and "insufficient_quota" in text:
            raise UserError(f"{self._config.base_url}: the quota of this key is used up ({said}). Answers are kept")
        if status in RETRIED or status >= 500:
            return Failure(f"HTTP {status}: {said}", _retry_after(headers))
        if status in (401, 403):
            name = self._config.api_key_env
            raise UserError(
                f"{self._config.base_url}: HTTP {status} ({said}). Check the key in "
                f"{f'the environment variable {name}' if name else 'refine.api_key_env'} and what it may do"
            )
        if status == 404 or status < 400:
            raise UserError(
                f"{self._config.base_url}/chat/completions: HTTP {status} ({said}). Check refine.base_url and "
                f"refine.model {self._config.model!r}"
            )
        return Answer(request.key, fault="rejected", detail=f"HTTP {status}: {said}")

    async def _wait(self, attempt: int, failure: Failure) -> None:
        config = self._config
        asked = failure.retry_after_seconds
        jitter = random.random()
        if asked is None:
            longest = min(config.max_backoff_seconds, config.backoff_seconds * 2.0 ** (attempt - 1))
            await asyncio.sleep(jitter * longest)
            return
        if asked > config.max_retry_after_seconds:
            raise UserError(
                f"{config.base_url} asks to wait {asked:.0f} s, more than refine.max_retry_after_seconds "
                f"{config.max_retry_after_seconds}. Answers are kept: submit again later"
            )
        self._not_before = max(self._not_before, time.monotonic() + asked)
        # Those who wait together do not come back together.
        await asyncio.sleep(asked + jitter * min(config.backoff_seconds, config.max_backoff_seconds))

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key(config: RefineConfig) -> str:
    """The key from the environment. Raises UserError when it is not set."""
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"refine.api_key_env: the environment variable {config.api_key_env} is not set. Put the key of "
            f'{config.base_url} into it, or set refine.api_key_env = "" for a server that wants none'
        )
    return key


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
