"""A TCP proxy before an HTTP server: counts what passes, and now and then answers, cuts or refuses instead.

Requests are told from the rest of a connection by their method, which is enough for clients that do not pipeline.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

METHODS = (b"GET ", b"PUT ", b"HEAD ", b"POST ", b"DELETE ")
SLOW_DOWN = b"503 Slow Down", b"<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>"
DENIED = b"403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
EXPIRED = (
    b"400 Bad Request",
    b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired</Message></Error>",
)

# number of a request, its first line -> None: pass on; (status, body): answer; "reset": drop the connection at once;
# "cut": drop it in the middle of the answer
Fault = tuple[bytes, bytes] | str | None


class FaultProxy:
    """`faults` decides what happens to each request; `bytes_to_client` counts what it has passed back.

    The store is away, and drops connections, for the next `refusals_left` requests and until `down_until`.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.port = 0
        self.faults: Callable[[int, bytes], Fault] = lambda number, line: None
        self.refusals_left = 0.0  # math.inf: until it is set again
        self.down_until = 0.0  # monotonic seconds
        self.requests: list[bytes] = []
        self.refused = 0
        self.injected = 0
        self.bytes_to_client = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._away():
            _reset(writer)
            return
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        cut = asyncio.Event()
        back = asyncio.create_task(self._answers(upstream_reader, writer, cut))
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                if data.startswith(METHODS):
                    fault = self._fault(data.split(b"\r\n", 1)[0])
                    if isinstance(fault, tuple):
                        status, body = fault
                        head = b"HTTP/1.1 %b\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n" % (
                            status,
                            len(body),
                        )
                        body = b"" if data.startswith(b"HEAD ") else body
                        writer.write(head + b"Connection: close\r\n\r\n" + body)
                        await writer.drain()
                        break
                    if fault == "reset":
                        _reset(writer)
                        break
                    if fault == "cut":
                        cut.set()
                upstream_writer.write(data)
                await upstream_writer.drain()
        back.cancel()
        upstream_writer.close()
        writer.close()

    def _fault(self, line: bytes) -> Fault:
        self.requests.append(line)
        fault = "reset" if self._away() else self.faults(len(self.requests), line)
        self.injected += fault is not None
        return fault

    def _away(self) -> bool:
        away = self.refusals_left > 0 or time.monotonic() < self.down_until
        if away:
            self.refusals_left = max(0.0, self.refusals_left - 1)
            self.refused += 1
        return away

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                if cut.is_set():
                    writer.write(data[: len(data) // 2])
                    _reset(writer)
                    return
                self.bytes_to_client += len(data)
                writer.write(data)
                await writer.drain()
        writer.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@contextmanager
def running(upstream_port: int) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream_port)
    started, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(started, stop)), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
