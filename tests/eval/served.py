"""A real HTTP server of the OpenAI protocol for tests: one model "m", answers from a function, faults to order."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.machine import http_handled_by


class Served:
    """What the server does and what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], str | None] = lambda body: "ok"
        self.fault: Callable[[], Any] = lambda: None  # "cut", "garbage", "hang", (status, text), None: answer
        self.window: int | None = None
        self.finish_reason, self.completion_tokens = "stop", 1
        self.prompt_tokens: int | None = None  # None: as many as were sent
        self.content_type = "application/json"
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.address = ""

    def post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            fault = self.fault()
        text = self._answer(body) if fault is None else '{"choices": []}'
        with self.lock:  # before the client can send the next one
            self.open -= 1
        if fault == "cut":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "hang":
            self.ended.wait()
            handler.close_connection = True
        elif fault is None or fault == "garbage":
            send(handler, 200, text, self.content_type)
        else:
            send(handler, *fault)

    def _answer(self, body: dict[str, Any]) -> str:
        text = self.reply(body)
        said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        sent = len(body["prompt"]) if "prompt" in body else 3
        usage = {"prompt_tokens": self.prompt_tokens or sent, "completion_tokens": self.completion_tokens}
        choice = {"index": 0, "finish_reason": self.finish_reason, **said}
        return json.dumps({"choices": [choice], "usage": usage})


def send(handler: BaseHTTPRequestHandler, status: int, text: str, content_type: str = "application/json") -> None:
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Type", content_type)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


@contextlib.contextmanager
def serve() -> Iterator[Served]:
    """A running server on a free port; `address` is its base URL."""
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/v1/models":
                return send(self, 404, "no such page")
            entry = {"id": "m", **({"max_model_len": served.window} if served.window else {})}
            send(self, 200, json.dumps({"object": "list", "data": [entry]}))

        def do_POST(self) -> None:
            served.post(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http_handled_by(Handler) as address:
        served.address = f"{address}/v1"
        try:
            yield served
        finally:
            served.ended.set()
