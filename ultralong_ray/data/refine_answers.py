"""Requests and answers of response refinement, what an answer is worth, and the log in which answers are kept. Pure.

The log is a folder of JSON lines, one answer each, keyed by a hash of the request's body: whoever asks the same again,
in this run or a later one, has the answer already. On a local disk every answer is appended as it arrives. Objects
cannot be appended to, so in object storage answers are written in batches, and a killed run loses the batch under way.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from ultralong_ray.config import RefineConfig
from ultralong_ray.storage import Location, explain_full_disk

BATCH_ANSWERS = 64
BATCH_SECONDS = 10.0

_PLACEHOLDER = re.compile(r"\{(question|response)\}")


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the endpoint: the body of the request, and the hash by which its answer is found again."""

    key: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, as it came; whether it is of use is decided by `fault_of` when the output is written."""

    key: str
    content: str | None = None
    finish_reason: str | None = None
    refusal: str | None = None
    prompt_tokens: int | None = None  # None: the server did not say
    completion_tokens: int | None = None
    model: str | None = None  # the one that answered, as the server names it
    fault: str = ""  # "malformed" or "rejected" where there is no answer
    detail: str = ""


def make_request(messages: Sequence[Mapping[str, str]], config: RefineConfig) -> Request:
    """The request that rewrites the last assistant turn of a conversation."""
    last = last_assistant_turn(messages)
    values = {"question": _question(messages[:last]), "response": messages[last]["content"]}
    text = _PLACEHOLDER.sub(lambda match: values[match[1]], config.prompt)
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    body = {"model": config.model, "messages": [*system, {"role": "user", "content": text}]}
    for name in ("temperature", "max_completion_tokens"):
        if getattr(config, name) is not None:
            body[name] = getattr(config, name)
    body |= config.request_fields
    return Request(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), body)


def last_assistant_turn(messages: Sequence[Mapping[str, str]]) -> int:
    """The position of the turn that is rewritten."""
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _question(messages: Sequence[Mapping[str, str]]) -> str:
    """One turn as it stands; a longer conversation with the speakers named."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def parse_answer(key: str, body: Any) -> Answer:
    """The answer in the body of a chat completion. Raises ValueError when it is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        answer = Answer(
            key,
            message.get("content"),
            choice.get("finish_reason"),
            message.get("refusal"),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
            body.get("model"),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__}: {error})") from None
    for name in ("content", "finish_reason", "refusal", "model"):
        if not isinstance(getattr(answer, name), str | None):
            raise ValueError(f"no chat completion ({name} is {type(getattr(answer, name)).__name__})")
    return answer


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def fault_of(answer: Answer, config: RefineConfig) -> tuple[str, str] | None:
    """(reason, detail) why an answer is set aside: rejected, malformed, refused or truncated; None for a good one."""
    if answer.fault:
        return answer.fault, answer.detail
    if answer.refusal or answer.finish_reason == "content_filter":
        return "refused", answer.refusal or "finish_reason content_filter"
    if answer.finish_reason == "length":
        return "truncated", f"cut after {answer.completion_tokens} tokens (refine.max_completion_tokens)"
    if answer.content is None or not answer.content.strip():
        return "malformed", f"empty answer, finish_reason {answer.finish_reason}"
    if answer.finish_reason != "stop":
        return "malformed", f"finish_reason {answer.finish_reason}"
    opening = answer.content.lstrip()
    pattern = next((p for p in config.refusals if re.match(p, opening, re.IGNORECASE)), None)
    return None if pattern is None else ("refused", f"begins like {pattern}")


def cost_usd(answer: Answer, config: RefineConfig) -> float:
    """What the answer cost at the recipe's prices; 0 where the server did not count its tokens."""
    spent = (answer.prompt_tokens or 0) * config.usd_per_million_input_tokens
    return (spent + (answer.completion_tokens or 0) * config.usd_per_million_output_tokens) / 1e6


class AnswerLog:
    """The answers below `folder`. Several runs may add to it at a time, each in files of its own."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._batch: list[bytes] = []
        self._batch_began = 0.0

    def read(self) -> dict[str, Answer]:
        """All answers by key. A line that a killed run left unfinished is passed over."""
        answers: dict[str, Answer] = {}
        for file in self._folder.files():
            for line in file.read_bytes().split(b"\n"):
                if line.endswith(b"}"):
                    answer = Answer(**json.loads(line))
                    answers.setdefault(answer.key, answer)
        return answers

    def append(self, answer: Answer) -> None:
        """Keep an answer. Raises UserError when the disk is full."""
        line = json.dumps(asdict(answer), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._folder.is_local:
            self._append_local(line)
            return
        self._batch_began = self._batch_began if self._batch else time.monotonic()
        self._batch.append(line)
        if len(self._batch) >= BATCH_ANSWERS or time.monotonic() - self._batch_began >= BATCH_SECONDS:
            self._flush()

    def _append_local(self, line: bytes) -> None:
        with explain_full_disk(self._folder.uri):
            if self._file is None:
                self._folder.make_dir()
                self._file = open(self._new_name().path, "ab", buffering=0)  # noqa: SIM115, closed in close()
            self._file.write(line)

    def _flush(self) -> None:
        if self._batch:
            self._new_name().write_bytes(b"".join(self._batch))
            self._batch.clear()

    def _new_name(self) -> Location:
        return self._folder / f"{uuid.uuid4().hex}.jsonl"

    def close(self) -> None:
        """Write what is still held back."""
        self._flush()
        if self._file is not None:
            self._file.close()
            self._file = None
