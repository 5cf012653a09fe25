"""The states of all random generators that training may draw from, as bytes and back."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import torch


def random_state() -> bytes:
    """Of Python, numpy, torch and this process's GPU."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_random_state(data: bytes) -> None:
    """Continue the draws of the process that called `random_state`."""
    state = torch.load(io.BytesIO(data), weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
