"""A training state on disk: each rank writes its own shards, the union of all ranks' files is a checkpoint.

    checkpoint.json                identity (recipe fields, model shape, world), step; by rank 0
    rng-00000.pt                   random state of one rank
    deepspeed/                     DeepSpeed's shards: parameters, float32 masters, optimizer state

Files are written to a folder of the rank's own, so no shared disk is assumed; who carries them to storage is decided
by the caller. Read against DeepSpeed 0.19.8, whose ZeRO shards fit only the world size and stage that wrote them.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from ultralong_ray.storage import Location, explain_full_disk
from ultralong_ray.types import UserError

TAG = "deepspeed"
STATE_FILE = "checkpoint.json"
MODEL_PREFIX = "causal_lm."  # where LanguageModelLoss keeps the Hugging Face model
FULL_DISK_BYTES = 2**20


def save_checkpoint(engine: Any, folder: Path, step: int, identity: dict[str, Any]) -> None:
    """This rank's files of a checkpoint after `step` steps. Collective. Raises UserError when the disk is full."""
    rank = dist.get_rank()
    with explain_full_disk(str(folder)):
        try:
            engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
            torch.save(_random_state(), folder / f"rng-{rank:05d}.pt")
        except RuntimeError as error:  # torch's zip writer reports a failed write without its errno
            if shutil.disk_usage(folder).free > FULL_DISK_BYTES:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        if rank == 0:
            Location.of(folder / STATE_FILE).write_json({"step": step, "identity": identity})


def load_checkpoint(engine: Any, folder: Path, identity: dict[str, Any]) -> int:
    """Restore this rank from `folder` and return the number of steps done. Collective.

    Raises UserError, naming the fields that differ, when the checkpoint belongs to another recipe, model or world.
    """
    state = Location.of(folder / STATE_FILE).read_json()
    refuse_other(state["identity"], identity, str(folder))
    path, _ = engine.load_checkpoint(str(folder), tag=TAG)
    if path is None:
        raise UserError(f"{folder}: checkpoint of step {state['step']} is incomplete; delete it to use the one before")
    random_state = torch.load(folder / f"rng-{dist.get_rank():05d}.pt", weights_only=False)
    _restore_random_state(random_state)
    return int(state["step"])


def refuse_other(saved: dict[str, Any], current: dict[str, Any], where: str) -> None:
    """Raise UserError unless both identities are equal."""
    differing = [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if saved.get(key) != current.get(key)
    ]
    if differing:
        raise UserError(
            f"{where}: the checkpoint was made by another run ({'; '.join(differing)}). Restore those values, "
            f"or remove the stage's directory to start again"
        )


def files_of_rank(names: list[str], rank: int) -> list[str]:
    """Those files of a checkpoint that `rank` needs to restore itself; the other ranks' shards stay where they are."""
    mine = (f"zero_pp_rank_{rank}_", f"rng-{rank:05d}.")
    return [name for name in names if any(m in name for m in mine) or not ("zero_pp_rank_" in name or "rng-" in name)]


def full_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name as in the Hugging Face model, float32 tensor) of every parameter, one at a time; tied ones under each name.

    Stages 1-3 give the float32 master weights. At stage 0 there are no shards to join and the parameters come as the
    model computes with them.
    """
    shards = folder / TAG
    state: Any
    if any("zero_pp_rank_" in file.name for file in shards.iterdir()):
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG, lazy_mode=True)
    else:
        state = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    for name, value in state.items():
        yield name.removeprefix(MODEL_PREFIX), value.contiguous().detach().float()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
