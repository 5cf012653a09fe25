"""A rank's training state copied into host memory, so that training goes on while the copy is written.

Flows in: tensors, on the GPU or not. Flows out: the same numbers as a few long runs of bytes. The memory is asked for
once and used for every checkpoint; on a GPU it is page-locked, which makes the copy as fast as the link.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ultralong_ray.train.host_memory import HostBuffer

PIECE_ELEMENTS = 2**26  # written at a time
FLOAT32_BYTES = 4
REMEDY = (
    'Set checkpoint_snapshot to "disk" or "none", or raise the memory limit of the worker (and its limit of locked '
    "memory, ulimit -l)"
)


class HostCopy:
    """Room for `numel` float32 numbers; `fill` copies tensors into it one after the other.

    Raises UserError when the host has no such memory.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread; page-locking would otherwise be done for the first GPU
        buffer = HostBuffer(numel * FLOAT32_BYTES, device, "the snapshot of a checkpoint", REMEDY)
        self.numbers = buffer.viewed(torch.empty(numel, dtype=torch.float32, device="meta"))
        self._buffer = buffer  # what is page-locked is let go with it

    def fill(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy float32 tensors [n]; together they must fill the room. Returns when all is on the host."""
        done = 0
        for tensor in tensors:
            self.numbers[done : done + tensor.numel()].copy_(tensor, non_blocking=True)
            done += tensor.numel()
        if done != self.numbers.numel():
            raise ValueError(f"the tensors have {done} numbers, there is room for {self.numbers.numel()}")
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def pieces(self) -> Iterator[memoryview]:
        """All numbers in order, little-endian."""
        for piece in self.numbers.split(PIECE_ELEMENTS):
            yield piece.numpy().data
