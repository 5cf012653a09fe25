"""The micro-batches of each step, read one step ahead by a thread while the device computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from ultralong_ray.config import TrainConfig
from ultralong_ray.packed import PackedReader
from ultralong_ray.parallel.shard import read_slice
from ultralong_ray.parallel.topology import Topology, sequences_of_micro_batch
from ultralong_ray.train.order import sequences_of_step
from ultralong_ray.train.step import MicroBatch, to_device


def accumulation_steps(train: TrainConfig, topology: Topology) -> int:
    """Forward passes of one rank per optimizer step."""
    return train.global_batch_sequences // (topology.dp_size * train.micro_batch_sequences)


def read_step(
    step: int, reader: PackedReader, train: TrainConfig, topology: Topology, device: torch.device
) -> list[MicroBatch]:
    """What this rank computes in step `step` (1-based), on `device`."""
    sequences = sequences_of_step(step, train.global_batch_sequences, reader.manifest.num_sequences, train.seed)
    micro_batches = []
    for index in range(accumulation_steps(train, topology)):
        chosen = sequences_of_micro_batch(sequences, topology, index, train.micro_batch_sequences)
        part = read_slice(reader, chosen, topology, train.mask_documents)
        micro_batches.append(to_device(part, device))
    return micro_batches


def read_ahead(
    first_step: int, num_steps: int, reader: PackedReader, train: TrainConfig, topology: Topology, device: torch.device
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, micro-batches) for first_step..num_steps. An error while reading surfaces at the step it belongs to."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        pending = None
        for step in range(first_step, num_steps + 1):
            current = pending or pool.submit(read_step, step, reader, train, topology, device)
            pending = pool.submit(read_step, step + 1, reader, train, topology, device) if step < num_steps else None
            yield step, current.result()
