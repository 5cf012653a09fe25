"""A rank's training state copied into host memory, so that training goes on while the copy is written.

Flows in: tensors, on the GPU or not. Flows out: the same numbers as a few long runs of bytes. The memory is asked for
once and used for every checkpoint; on a GPU it is pinned, which makes the copy as fast as the link.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from ultralong_ray.types import UserError

# Pinned memory is handed out in powers of two: one block for everything could waste nearly half of it.
CHUNK_ELEMENTS = 2**26
FLOAT32_BYTES = 4


class HostCopy:
    """Room for `numel` float32 numbers; `fill` copies tensors into it one after the other.

    Raises UserError when the host has no such memory.
    """

    def __init__(self, numel: int, device: torch.device) -> None:
        self.device = device
        sizes = [min(CHUNK_ELEMENTS, numel - start) for start in range(0, numel, CHUNK_ELEMENTS)]
        pinned = device.type == "cuda"
        try:
            if pinned:
                torch.cuda.set_device(device)  # of this thread; pinning would otherwise open a context on the first GPU
            self.chunks = [torch.empty(size, dtype=torch.float32, pin_memory=pinned) for size in sizes]
        except RuntimeError as error:
            raise UserError(
                f'checkpoint_snapshot = "memory" needs {numel * FLOAT32_BYTES / 2**30:.1f} GiB of host memory per '
                f'worker beside the training itself, which is not to be had; set it to "disk" or "none" ({error})'
            ) from error

    def fill(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy float32 tensors [n]; together they must fill the room. Returns when all is on the host."""
        index = begin = 0  # where the next number goes: chunk and place in it
        for tensor in tensors:
            done = 0
            while done < tensor.numel():
                chunk = self.chunks[index]
                size = min(tensor.numel() - done, chunk.numel() - begin)
                chunk[begin : begin + size].copy_(tensor[done : done + size], non_blocking=True)
                done, begin = done + size, begin + size
                if begin == chunk.numel():
                    index, begin = index + 1, 0
        if index != len(self.chunks):
            raise ValueError(f"the tensors fill {index} of {len(self.chunks)} chunks")
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def pieces(self) -> Iterator[memoryview]:
        """All numbers in order, little-endian."""
        for chunk in self.chunks:
            yield chunk.numpy().data
