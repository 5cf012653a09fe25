"""The states of all random generators that training may draw from, as bytes and back."""

from __future__ import annotations

import io
import pickle
import random
from typing import Any

import numpy as np
import torch

from ultralong_ray.types import UserError


def random_state() -> bytes:
    """Of Python, numpy, torch and this process's GPU."""
    generator, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {  # plain numbers and tensors, so that reading them back never runs code
        "python": random.getstate(),
        "numpy": (generator, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore_random_state(data: bytes) -> None:
    """Continue the draws of the process that called `random_state`.

    Raises UserError for data with anything that could run code.
    """
    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the random states of this checkpoint hold more than numbers, which could run code: another version wrote "
            "them, or somebody changed them. Remove this checkpoint to go on from the one before"
        ) from error
    random.setstate(state["python"])
    generator, keys, *rest = state["numpy"]
    np.random.set_state((generator, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
