"""Programs that a model wrote: they pass by running to their end, within limits, and can do no harm meanwhile."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ultralong_ray.eval import sandbox
from ultralong_ray.eval.sandbox import Limits, run_program
from ultralong_ray.types import UserError

QUICK = Limits(seconds=1.0, memory_mib=256)
PATIENT = Limits(seconds=60.0, memory_mib=256)  # for programs that end by themselves, on a busy machine too


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import math, re, heapq, typing, collections\nassert math.gcd(4, 6) == 2", ""),
        ("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()", ""),
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "ended itself with status 0"),
        ("while True: pass", "not done within 1 s"),
        ("import time\ntime.sleep(60)", "not done within 1 s"),
        ("x = bytearray(2**30)", "MemoryError"),
        ("import os\nos.fork()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os, signal\nos.kill(1, 0)", "PermissionError"),
        ("import socket\nsocket.socket(socket.AF_UNIX)", "PermissionError"),
        ("open('new', 'w')", "PermissionError"),
        ("import os\nassert set(os.environ) <= {'LC_CTYPE'}", ""),
    ],
)
def test_what_passes_and_what_does_not(program: str, reason: str) -> None:
    outcome = run_program(program, QUICK if reason.startswith("not done") else PATIENT)
    assert outcome.passed == (not reason)
    assert outcome.reason.startswith(reason)


def test_nobody_is_reached_and_no_file_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "precious"
    file.write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        program = (
            f"import os, socket\n"
            f"file = {str(file)!r}\n"
            f"for act in (lambda: socket.create_connection(('127.0.0.1', {port}), 1), lambda: os.remove(file),\n"
            f"            lambda: open(file, 'w'), lambda: os.truncate(file, 0)):\n"
            f"    try:\n        act()\n    except OSError:\n        pass\n"
        )
        assert run_program(program, PATIENT).passed, "every attempt is refused, and the program goes on"
        with pytest.raises(BlockingIOError):  # nobody waits to be let in
            server.accept()
    assert file.read_text() == "x"


def test_without_a_filter_nothing_runs_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child.py"
    child.write_text(sandbox.CHILD.read_text().replace('sys.platform != "linux"', "True"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    with pytest.raises(UserError, match=r"grants no system call filter .* set allow_network = true"):
        run_program("pass", QUICK)
    assert run_program("pass", Limits(seconds=60.0, allow_network=True)).passed
