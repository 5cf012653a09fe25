"""What a GPU did while something was timed, with torch's own questions answered by hand."""

from __future__ import annotations

import time

import pytest
import torch

from tests.machine import PATIENCE_SECONDS
from ultralong_ray.benchmark import gpu_state
from ultralong_ray.benchmark.gpu_state import GpuState

GPU = torch.device("cuda", 0)


def test_medians_of_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = [1980, 1620, 1605]
    monkeypatch.setattr(gpu_state, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: clocks.pop() if len(clocks) > 1 else clocks[0])
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 690_500)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 70)
    deadline = time.monotonic() + PATIENCE_SECONDS
    with GpuState(GPU) as state:
        while len(state._samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        del state._samples[3:]
        state._over.set()
    assert state.medians["power_watts"] == 690.5 and state.medians["temperature_celsius"] == 70
    assert state.medians["sm_clock_mhz"] in (1620, 1980)


def test_without_nvml_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(device: torch.device) -> int:
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.")

    monkeypatch.setattr(gpu_state, "SAMPLE_SECONDS", 0.001)
    monkeypatch.setattr(torch.cuda, "clock_rate", absent)
    with GpuState(GPU) as state:
        state._thread.join(PATIENCE_SECONDS)
    assert state.medians == {}
    with GpuState(torch.device("cpu")) as state:
        pass
    assert state.medians == {}
