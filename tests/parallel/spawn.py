"""Run a function in fresh processes that share a gloo group, and a tiny problem to run there."""

from __future__ import annotations

import gc
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ultralong_ray.config import PretrainConfig
from ultralong_ray.packed import PackedFile, PackedManifest, chunking, file_name, write_placements, write_sequences
from ultralong_ray.storage import Location
from ultralong_ray.types import LayerKeep, PackedSequence, Placement, TrainPlan

VOCAB = 61
# Imported once by the process that all ranks are forked from: importing them takes longer than most of the tests.
PRELOADED = [
    "torch",
    "transformers",
    "deepspeed",
    "pyarrow",
    "ultralong_ray.train.engine",
    "ultralong_ray.eval.sharded",
]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`function(*args)` on every rank of a gloo group of fresh processes; the picklable results by rank.

    A process has this one's environment, and of its modules only PRELOADED.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # DeepSpeed looks for its accelerator when it is imported, which in a child is before `_entry` runs.
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_entry, args=(function, rank, world_size, port, queue, args, dict(os.environ)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    answers = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    failed = [answer for answer in answers.values() if isinstance(answer, str) and answer.startswith("Traceback")]
    assert not failed, failed[0]
    assert [process.exitcode for process in processes] == [0] * world_size
    return [answers[rank] for rank in range(world_size)]


def _entry(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    queue: Any,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(*args)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
        os._exit(1)  # the others wait in a collective that this rank will never enter
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def section(**changes: Any) -> PretrainConfig:
    """A training section in which everything that could blur a comparison is off."""
    values: dict[str, Any] = {
        "steps": 1,
        "global_batch_sequences": 2,
        "learning_rate": 1e-2,
        "gradient_clip": None,
        "precision": "float32",
        "zero_stage": 3,
        "loss_tile_tokens": 24,
    }
    return PretrainConfig(**{**values, **changes})


def model_config(kv_heads: int, tied: bool = False, heads: int = 4) -> dict[str, Any]:
    """config.json of a 2-layer Llama."""
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def write_model(folder: Path, kv_heads: int, seed: int = 5, tied: bool = False, heads: int = 4) -> Location:
    """A Hugging Face folder with weights large enough that attention matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(kv_heads, tied, heads)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    model.save_pretrained(folder)
    return Location.of(folder)


def write_packed(folder: Path, ids: np.ndarray, weights: np.ndarray | None, starts: list[list[int]]) -> Location:
    """Packed sequences `ids` [sequences, length] whose documents begin at `starts`."""
    location, length = Location.of(folder), ids.shape[1]
    sequences = [
        PackedSequence(i, row.astype(np.int32), None if weights is None else weights[i].astype(np.uint8))
        for i, row in enumerate(ids)
    ]
    write_sequences(location / file_name(0), sequences, length, weights is not None)
    placements = [
        Placement(i, begin, end, f"{i}-{begin}", "text", 0, 0, end - begin)
        for i, row in enumerate(starts)
        for begin, end in zip(row, [*row[1:], length], strict=True)
    ]
    write_placements(location, placements)
    chunk_tokens, rows_per_group = chunking(length)
    files = (PackedFile(file_name(0), 0, len(ids)),)
    manifest = PackedManifest(length, len(ids), chunk_tokens, rows_per_group, weights is not None, VOCAB, files)
    manifest.write(location)
    return location


def plan(ulysses: int, ring: int, num_layers: int, **changes: Any) -> TrainPlan:
    """Everything kept on the device, one tile for the MLP."""
    values: dict[str, Any] = {"mlp_tile_tokens": 16384, "loss_tile_tokens": 24, "offload_optimizer": False}
    return TrainPlan(ulysses, ring, **{"keep": (LayerKeep(),) * num_layers, **values, **changes})
