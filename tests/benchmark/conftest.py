"""Ranks of a benchmark that start quickly."""

from __future__ import annotations

import pytest
import torch.multiprocessing as multiprocessing

from tests.parallel.spawn import PRELOADED
from ultralong_ray.benchmark import launch


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are fresh processes as ever, but what all of them import is imported once (tests/parallel/spawn.py)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    monkeypatch.setattr(launch.multiprocessing, "get_context", lambda method: context)
