"""Clock, power and temperature of a GPU while something is timed: a power-limited GPU explains a lower MFU.

Flows in: a device. Flows out: medians over the samples. Read against torch 2.13, whose functions ask NVML through the
package nvidia-ml-py; without it, and on CPU, there is nothing to say.
"""

from __future__ import annotations

import statistics
import threading
from types import TracebackType

import torch

SAMPLE_SECONDS = 1.0


class GpuState:
    """Samples from entering to leaving; then `medians` by quantity and unit, empty where nothing could be read."""

    def __init__(self, device: torch.device) -> None:
        self.medians: dict[str, float] = {}
        self._device = device
        self._samples: list[tuple[float, float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> GpuState:
        if self._device.type == "cuda":
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        names = ("sm_clock_mhz", "power_watts", "temperature_celsius")
        columns = zip(*self._samples, strict=True)
        self.medians = {name: statistics.median(column) for name, column in zip(names, columns, strict=False)}

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            try:
                clock, watts = torch.cuda.clock_rate(self._device), torch.cuda.power_draw(self._device) / 1000
                self._samples.append((clock, watts, torch.cuda.temperature(self._device)))
            except (ModuleNotFoundError, RuntimeError):
                return
