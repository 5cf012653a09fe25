"""Host memory that a GPU copies to and from at the speed of the link: page-locked, of exactly the size asked for.

Flows in: a number of bytes and a device. Flows out: a buffer; ordinary memory where the device is no GPU. Read against
torch 2.13 (torch.cuda.cudart).
"""

from __future__ import annotations

import contextlib
import mmap
import time
import weakref
from typing import Any

import torch

from ultralong_ray.types import UserError

GROWTH_SECONDS = 30.0
LOOK_SECONDS = 0.2


class HostBuffer:
    """`num_bytes` of host memory, page-locked for a CUDA device. `free`: the event after which it may be written.

    Raises UserError where the host has no more: so much "more could not be page-locked for" `purpose`, and `remedy`.
    """

    def __init__(self, num_bytes: int, device: torch.device, purpose: str, remedy: str) -> None:
        self.num_bytes = num_bytes
        self.free: Any = None
        if device.type != "cuda":
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
            return
        self._bytes, address = page_locked(num_bytes, purpose, remedy)
        runtime: Any = torch.cuda.cudart()
        weakref.finalize(self, runtime.cudaHostUnregister, address)

    def viewed(self, like: torch.Tensor) -> torch.Tensor:
        """The buffer with the type and shape of `like`."""
        return self._bytes.view(like.dtype).view(like.shape)


def page_locked(num_bytes: int, purpose: str, remedy: str) -> tuple[torch.Tensor, int]:
    """Page-locked memory of exactly this size, and its address. torch's own allocator rounds up to a power of two.

    Raises UserError where the host has no more.
    """
    words = f"host memory is full: {num_bytes / 2**30:.2f} GiB more could not be page-locked for {purpose}. {remedy}"
    if not _becomes_available(num_bytes):
        raise UserError(words)
    try:
        mapped = mmap.mmap(-1, num_bytes)
    except OSError as error:
        raise UserError(f"{words} ({error})") from error
    with contextlib.suppress(OSError):  # a kernel without them
        mapped.madvise(mmap.MADV_HUGEPAGE)  # 512 times fewer pages to lock
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    runtime: Any = torch.cuda.cudart()
    status = runtime.cudaHostRegister(memory.data_ptr(), num_bytes, 0)
    if int(status) != 0:
        raise UserError(f"{words} (CUDA error {int(status)})")
    return memory, memory.data_ptr()


def _becomes_available(num_bytes: int) -> bool:
    """Whether so much is free, at once or within GROWTH_SECONDS: virtual machines are given memory as they use it."""
    deadline = time.monotonic() + GROWTH_SECONDS
    while available_bytes() < num_bytes:
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def available_bytes() -> int:
    """Memory that the host can still give, by Linux's own estimate."""
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo names no MemAvailable")
