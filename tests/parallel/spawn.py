"""Run a function in fresh processes that share a gloo group, and a tiny problem to run there."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

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

    A process has this one's environment, and of its modules only PRELOADED. When one fails, or ends without an answer,
    the others are ended and its traceback is the failure.
    """
    with started(function, world_size, *args) as ranks:
        answers: dict[int, Any] = {}
        waited_for = {rank.answer: number for number, rank in enumerate(ranks)}
        while waited_for:
            for answer in connection.wait(list(waited_for)):
                assert isinstance(answer, connection.Connection)
                number = waited_for.pop(answer)
                try:
                    failed, answers[number] = answer.recv()
                except EOFError:
                    failed, answers[number] = True, f"rank {number} ended without an answer"
                assert not failed, answers[number]
        for rank in ranks:
            rank.process.join()
        assert [rank.process.exitcode for rank in ranks] == [0] * world_size
        return [answers[number] for number in range(world_size)]


@dataclass(frozen=True)
class Rank:
    """A running process, and the end at which it says whether it failed, and its result or traceback."""

    process: Any
    answer: connection.Connection


@contextmanager
def started(function: Callable[..., Any], world_size: int, *args: Any) -> Iterator[list[Rank]]:
    """The ranks of `run_distributed` while they run. Nothing of them is alive afterwards."""
    # DeepSpeed looks for its accelerator when it is imported, which in a child is before `_entry` runs.
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # This process keeps the store in which they meet, at a port that nobody else can have by now.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[Rank] = []
    try:
        for number in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            place = (number, world_size, store.port)
            process = context.Process(target=_entry, args=(function, args, place, writer, dict(os.environ)))
            process.start()
            writer.close()  # else its end would go unnoticed
            ranks.append(Rank(process, reader))
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.answer.close()


def _entry(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    place: tuple[int, int, int],
    answer: connection.Connection,
    environment: dict[str, str],
) -> None:
    """`place`: rank, number of ranks, port of their store."""
    rank, world_size, port = place
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        answer.send((False, function(*args)))
    except BaseException:
        answer.send((True, traceback.format_exc()))
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
