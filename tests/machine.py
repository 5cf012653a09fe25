"""What tests ask of the machine that they run on: ports that stay free, conditions that come true, servers."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECONDS = 400.0  # for what takes seconds on an idle machine
# Below all that Linux, macOS and Ray's workers are given where they ask for any port: nobody takes one of these in the
# time between its choice and the start of the server that is told it.
PORTS = range(20_000, 32_000)


def wait_for(
    condition: Callable[[], Any],
    seconds: float,
    what: str,
    every: float = 0.02,
    process: subprocess.Popen[Any] | None = None,
    said: Callable[[], str] = str,
) -> Any:
    """What `condition` gives once it is true. Fails after `seconds` or when `process` has ended, naming `what`.

    `said`: more words for the failure.
    """
    began = time.monotonic()
    while True:
        ended = process is not None and process.poll() is not None
        if found := condition():
            return found
        assert not ended, f"{what}: the process ended before with {process and process.returncode}; {said()}"
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s; {said()}"
        time.sleep(every)


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens, on any address."""
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
        if len(found) == count:
            break
    return found


@contextlib.contextmanager
def http_server(command: list[str], health: str, log: Path, **variables: str) -> Iterator[None]:
    """`command` as a process of its own, once it answers at the URL `health`; `variables`: more of its environment."""

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=10):
            return True
        return False

    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **variables})
    try:
        wait_for(answers, PATIENCE_SECONDS, health, 0.1, process, lambda: log.read_text()[-3000:])
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def http_handled_by(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server in threads of this process."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


@contextlib.contextmanager
def transformers_server(model: Path, log: Path) -> Iterator[str]:
    """The base URL of `transformers serve` with a model, as a process of its own."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs its serving extra: pip install 'transformers[serving]'")
    (port,) = free_ports(1)
    arguments = f"serve {model} --host 127.0.0.1 --port {port} --device cpu --dtype float32".split()
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *arguments]
    address = f"http://127.0.0.1:{port}"
    with http_server(command, f"{address}/health", log, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"):
        yield f"{address}/v1"
