"""Programs that a model wrote, run where they can do no harm: program text in, passed or why not out.

Each program gets a fresh interpreter (sandbox_child.py) in an empty folder, with no environment, a limit on wall-clock
and CPU seconds and on memory, and a system call filter under which it cannot open a socket, start a program, send a
signal or write a file. It has the standard library alone and no installed packages (`-S`), unlike the harness, whose
programs can import what stands beside it: one that imports numpy has not passed here. HumanEval's
authors ask for such a place (github.com/openai/human-eval, execution.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ultralong_ray.types import UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 20.0  # for an interpreter to start on a busy machine; not part of the program's time
NO_FILTER = "no filter: "  # how the child says that there is no system call filter


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program."""

    seconds: float = 5.0
    memory_mib: int = 1024
    allow_network: bool = False  # run even where the kernel grants no system call filter


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reason` is empty for a program that ran to its end without an exception."""

    passed: bool
    reason: str = ""


def run_program(program: str, limits: Limits) -> Outcome:
    """Run it to its end. A program that ends itself early, whatever its exit status, has not passed.

    Raises: UserError when the kernel grants no system call filter and `allow_network` is false.
    """
    token = secrets.token_hex(16)  # written by the child behind the program's last line
    task = {"program": program, "token": token, "seconds": limits.seconds, "memory_mib": limits.memory_mib}
    task["allow_network"] = limits.allow_network
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        reader, writer = os.pipe()
        child = subprocess.Popen(
            [sys.executable, "-I", "-B", "-S", str(CHILD), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        try:
            said = _finish(child, json.dumps(task).encode(), reader, limits.seconds + START_SECONDS)
        finally:
            os.close(reader)
    if said.startswith(NO_FILTER):
        raise UserError(
            f"evaluate.tasks: this machine grants no system call filter ({said.removeprefix(NO_FILTER)}), so programs "
            f"that a model wrote could reach the network; evaluate elsewhere, or set allow_network = true"
        )
    if said == token:
        return Outcome(True)
    if said:
        return Outcome(False, said)
    if child.returncode == -signal.SIGALRM or child.returncode == -signal.SIGXCPU:
        return Outcome(False, f"not done within {limits.seconds:g} s")
    if child.returncode == -signal.SIGKILL:
        return Outcome(False, "killed: too slow to start, or out of memory")
    return Outcome(False, f"ended itself with status {child.returncode}")


def _finish(child: subprocess.Popen[bytes], task: bytes, reader: int, seconds: float) -> str:
    """What the child wrote to `reader`. Nothing of it is alive afterwards."""
    try:
        child.communicate(task, timeout=seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # the child's own group; processes that it may have started included
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    os.set_blocking(reader, False)
    try:
        return os.read(reader, 4096).decode("utf-8", "replace")
    except BlockingIOError:
        return ""
