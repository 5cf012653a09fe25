"""Where the time of a step went, seen on rank 0 in one step of many. Read against torch 2.11-2.13.

Flows in: steps to run. Flows out: after a watched step, seconds by part as watch/trace_events.py tells them apart. The
first step (compilation, first collectives) is not watched, the second is, then every 50th: reading the trace costs rank
0 a moment in which the others wait. A profiler that does not work here costs its numbers and a warning, never the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from ultralong_ray.parallel.kernels.kernel import Kernel
from ultralong_ray.watch.trace_events import ATTENTION_SPAN, step_parts

logger = logging.getLogger(__name__)

FIRST_WATCHED, WATCH_EVERY = 2, 50


class StepProfiler:
    """`events` are those of the last watched step, None until there was one."""

    def __init__(self, device: torch.device, active: bool) -> None:
        self._on_gpu = device.type == "cuda"
        self._active = active
        self._steps = 0
        self.events: list[dict[str, Any]] | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around one step, which must have waited for the device when it ends."""
        self._steps += 1
        self.events = None
        profiler = self._started() if self._active and self._steps % WATCH_EVERY == FIRST_WATCHED else None
        yield
        if profiler is not None:
            self._stop(profiler)

    def parts(self, step_seconds: float) -> dict[str, float] | None:
        """Part -> seconds of the step just done; None where it was not watched."""
        return None if self.events is None else step_parts(self.events, self._on_gpu, step_seconds)

    def _started(self) -> Any:
        profiler = torch.profiler.profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU])
        try:
            profiler.start()
        except Exception:
            return self._give_up()
        return profiler

    def _stop(self, profiler: Any) -> None:
        try:
            profiler.stop()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(file))
                self.events = json.loads(file.read_bytes())["traceEvents"]
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        self._active = False
        logger.warning("the profiler does not work here; the parts of a step are not measured", exc_info=True)


def spanned(kernel: Kernel) -> Kernel:
    """The same kernel, whose calls a profiler sees as attention."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with record_function(ATTENTION_SPAN):
            return kernel.forward(*args, **kwargs)

    def backward(*args: Any, **kwargs: Any) -> Any:
        with record_function(ATTENTION_SPAN):
            return kernel.backward(*args, **kwargs)

    return dataclasses.replace(kernel, forward=forward, backward=backward)
