"""Requests to a server that speaks the OpenAI protocol: a body out, its parsed answer in, however often it is sent.

Tried again: time-outs, lost connections, 408, 425, 429, 5xx and bodies that are not what was asked for; with
exponential backoff and full jitter (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog 2015), or as long
as the server's Retry-After asks, in which time no other request is sent either. Not tried again: what the server
refuses for good. The key goes into the Authorization header and nowhere else; it is blotted out of whatever a server
says. Read against aiohttp 3.14.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Protocol, TypeVar

import aiohttp

from ultralong_ray.types import UserError

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRIED = {408, 425, 429}
QUOTED_CHARACTERS = 300  # of what a server says


class EndpointSettings(Protocol):
    """The part of a recipe's section that says how a server is reached."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key_env(self) -> str: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def max_attempts(self) -> int: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def backoff_seconds(self) -> float: ...
    @property
    def max_backoff_seconds(self) -> float: ...
    @property
    def max_retry_after_seconds(self) -> float: ...


class NoAnswer(Exception):
    """A request that failed `max_attempts` times; `malformed` when the server did answer, but not as asked."""

    def __init__(self, reason: str, attempts: int, malformed: bool) -> None:
        super().__init__(f"{reason} ({attempts} attempts)")
        self.reason, self.malformed = reason, malformed


class Rejected(Exception):
    """What a server refused for good and no other request need share: `HTTP 400: too long`."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that may succeed when it is made again."""

    reason: str
    retry_after_seconds: float | None = None
    malformed: bool = False


@dataclass(frozen=True, slots=True)
class _Parsed:
    """Tells an answer from a Failure, whatever the answer is."""

    value: Any


class EndpointClient:
    """An open connection pool to one server; use as `async with`. `section` names the recipe's section in messages."""

    def __init__(self, settings: EndpointSettings, section: str, model_field: str) -> None:
        """`model_field` is how messages name the model that is asked for: "refine.model 'm'"."""
        self._settings, self._section, self._model_field = settings, section, model_field
        self._key = _key(settings, section)
        self._not_before = 0.0  # monotonic seconds
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> EndpointClient:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_seconds),
            connector=aiohttp.TCPConnector(limit=self._settings.concurrency),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, path: str, body: Mapping[str, Any], parse: Callable[[Any], T]) -> T:
        """What `parse` makes of the answer's JSON; its ValueError means that the answer is malformed.

        Raises: NoAnswer after `max_attempts` failures; Rejected; UserError when no request can succeed: wrong key,
        address or model, an exhausted quota, a wait longer than `max_retry_after_seconds`.
        """
        return await self._send("POST", path, body, parse, self._settings.max_attempts)

    async def get(self, path: str, parse: Callable[[Any], T], attempts: int) -> T:
        """As `post`, without a body, and sent `attempts` times at most."""
        return await self._send("GET", path, None, parse, attempts)

    async def _send(self, method: str, path: str, body: Any, parse: Callable[[Any], T], attempts: int) -> T:
        failure = Failure("")
        for attempt in range(1, attempts + 1):
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            outcome = await self._attempt(method, path, body, parse)
            if isinstance(outcome, _Parsed):
                return outcome.value
            failure = outcome
            log.debug("attempt %d: %s", attempt, failure.reason)
            if attempt < attempts:
                await self._wait(attempt, failure)
        raise NoAnswer(failure.reason, attempts, failure.malformed)

    async def _attempt(self, method: str, path: str, body: Any, parse: Callable[[Any], Any]) -> _Parsed | Failure:
        assert self._session is not None
        address = f"{self._settings.base_url}{path}"
        try:
            async with self._session.request(method, address, json=body, allow_redirects=False) as response:
                # JSON is UTF-8 (RFC 8259); a charset that the server names may be none that Python decodes
                text = (await response.read()).decode(errors="replace")
                return self._judge(path, response.status, text, response.headers, parse)
        except TimeoutError:
            return Failure(f"no answer within {self._section}.timeout_seconds {self._settings.timeout_seconds:g}")
        except (aiohttp.ClientError, OSError) as error:
            return Failure(self._clean(f"{type(error).__name__}: {error}"))

    def _judge(
        self, path: str, status: int, text: str, headers: Mapping[str, str], parse: Callable[[Any], Any]
    ) -> _Parsed | Failure:
        said = self._clean(" ".join(text.split()))[:QUOTED_CHARACTERS]  # in this order: a key may be cut in two
        base_url = self._settings.base_url
        if status == 200:
            try:
                return _Parsed(parse(json.loads(text)))
            except (ValueError, RecursionError) as error:
                return Failure(f"{error}: {said}", malformed=True)
        if status == 429 and "insufficient_quota" in text:
            raise UserError(f"{base_url}: the quota of this key is used up ({said}). Answers are kept")
        if status in RETRIED or status >= 500:
            return Failure(f"HTTP {status}: {said}", _retry_after(headers))
        if status in (401, 403):
            name = self._settings.api_key_env
            raise UserError(
                f"{base_url}: HTTP {status} ({said}). Check the key in "
                f"{f'the environment variable {name}' if name else f'{self._section}.api_key_env'} and what it may do"
            )
        if status == 404 or status < 400:
            raise UserError(
                f"{base_url}{path}: HTTP {status} ({said}). Check {self._section}.base_url and {self._model_field}"
            )
        raise Rejected(f"HTTP {status}: {said}")

    async def _wait(self, attempt: int, failure: Failure) -> None:
        settings = self._settings
        asked = failure.retry_after_seconds
        jitter = random.random()
        if asked is None:
            longest = min(settings.max_backoff_seconds, settings.backoff_seconds * 2.0 ** (attempt - 1))
            await asyncio.sleep(jitter * longest)
            return
        if asked > settings.max_retry_after_seconds:
            raise UserError(
                f"{settings.base_url} asks to wait {asked:.0f} s, more than {self._section}.max_retry_after_seconds "
                f"{settings.max_retry_after_seconds}. Answers are kept: submit again later"
            )
        self._not_before = max(self._not_before, time.monotonic() + asked)
        # Those who wait together do not come back together.
        await asyncio.sleep(asked + jitter * min(settings.backoff_seconds, settings.max_backoff_seconds))

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _key(settings: EndpointSettings, section: str) -> str:
    """The key from the environment. Raises UserError when it is not set."""
    if not settings.api_key_env:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise UserError(
            f"{section}.api_key_env: the environment variable {settings.api_key_env} is not set. Put the key of "
            f'{settings.base_url} into it, or set {section}.api_key_env = "" for a server that wants none'
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
