"""A real HTTP server for the chat-completions protocol, with faults to order: counts what it is asked.

The answers come from a function or from another server behind it (`forward_to`).
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.machine import http_handled_by

Body = dict[str, Any]
# A fault: a name below, or (HTTP status, text, headers). None: the request is answered.
Fault = str | tuple[int, str, dict[str, str]] | None


def completion(content: str | None, **changes: Any) -> Body:
    """The body of a chat completion; `finish_reason`, `refusal` and `usage` can be given."""
    message = {"role": "assistant", "content": content, "refusal": changes.get("refusal")}
    choice = {"index": 0, "message": message, "finish_reason": changes.get("finish_reason", "stop")}
    usage = changes.get("usage", {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15})
    return {"id": "x", "object": "chat.completion", "model": "served", "choices": [choice], "usage": usage}


def forward_to(address: str) -> Callable[[Body], Body]:
    """Answers from the server at `address`."""

    def ask(body: Body) -> Body:
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    return ask


class ChatServer:
    """`fault(n, body)` is asked for the n-th request (from 0); what it returns is done instead of answering."""

    def __init__(self, answer: Callable[[Body], Body]) -> None:
        self.answer = answer
        self.fault: Callable[[int, Body], Fault] = lambda n, body: None
        self.requests: list[Body] = []
        self.times: list[float] = []  # monotonic seconds
        self.answered: Counter[str] = Counter()  # by the last message of the request
        self.authorization: set[str | None] = set()
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.address = ""

    def asked(self) -> Counter[str]:
        """How often each question came, answered or not."""
        return Counter(body["messages"][-1]["content"] for body in self.requests)

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            number = len(self.requests)
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.authorization.add(handler.headers["Authorization"])
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        fault = self.fault(number, body)
        reply = self.answer(body) if fault is None else {}
        with self.lock:  # before the client can send the next one
            self.open -= 1
            if fault is None:
                self.answered[body["messages"][-1]["content"]] += 1
        self._respond(handler, reply, fault)

    def _respond(self, handler: BaseHTTPRequestHandler, reply: Body, fault: Fault) -> None:
        if fault == "cut":  # the connection goes in the middle of a body
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            handler.wfile.write(b'{"choices": [')
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif fault == "hang":
            self.ended.wait()
            handler.close_connection = True
        elif fault == "garbage":
            self._send(handler, 200, '{"choices": [}', {})
        elif isinstance(fault, tuple):
            self._send(handler, *fault)
        else:
            self._send(handler, 200, json.dumps(reply), {"Content-Type": "application/json"})

    def _send(self, handler: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str]) -> None:
        data = text.encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)


@contextlib.contextmanager
def serve(answer: Callable[[Body], Body]) -> Iterator[ChatServer]:
    """A running server on a free port; `address` is its base URL."""
    server = ChatServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if self.path == "/v1/chat/completions":
                server.handle(self)
            else:
                self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http_handled_by(Handler) as address:
        server.address = f"{address}/v1"
        try:
            yield server
        finally:
            server.ended.set()
