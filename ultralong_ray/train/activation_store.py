"""Where the tensors wait that a layer's backward pass needs of its forward pass: on the device or in host memory.

Flows in: a tensor of the forward pass and its place. Flows out: the same bits, on the device, in the backward pass. A
tensor that waits on the host travels on two side streams beside the computation: out as soon as it is made, back when
`fetch` is called, a layer ahead of its use. The host never waits for the device, so nothing here stops the queueing of
kernels. Read against torch 2.13 (torch.cpu has the names of torch.cuda's streams, and there they do nothing).
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, Literal

import torch

from ultralong_ray.train.host_memory import HostBuffer

REMEDY = (
    'Lower keep_attention_rows, set keep_attention or keep_inputs to "device", or raise the memory limit of the worker '
    "(and its limit of locked memory, ulimit -l)"
)
# Of how many tensors, the newest, those for the host may still be leaving. A layer makes three (input, attention
# output, log-sum-exp), so a tensor holds device memory until the next layer makes its like, wherever that one waits,
# which leaves a whole layer's time for the copy.
MAX_LEAVING = 3


class ActivationStore:
    """Keeps tensors of one device. Host buffers are reused for ever: by the next micro-batch and by the next step.

    `host_bytes` is what the host buffers take, `device_bytes` what waits on the device now, and `device_peak_bytes` the
    most that ever did (copies on their way not counted).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_bytes = 0
        self.device_bytes = 0
        self.device_peak_bytes = 0
        self.streams: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._out, self._back = self.streams.Stream(), self.streams.Stream()
        self._leaving: deque[HostTensor | None] = deque()  # None: one that waits on the device
        self._free: defaultdict[int, list[HostBuffer]] = defaultdict(list)  # by size in bytes

    def keep(self, tensor: torch.Tensor, place: Literal["device", "host"]) -> DeviceTensor | HostTensor:
        """Take charge of `tensor`, which nobody may write to from now on. The copy to the host starts here.

        Raises UserError when the host cannot give the memory.
        """
        while len(self._leaving) >= MAX_LEAVING:
            # The memory goes back to the current stream's pool: whoever gets it must come after the copy.
            if (oldest := self._leaving.popleft()) is not None:
                oldest.left()
        if place == "device":
            self._leaving.append(None)
            return DeviceTensor(self, tensor.detach())
        # A copy of scattered rows would be staged somewhere on its way: they are brought together here instead.
        kept = HostTensor(self, tensor.detach().contiguous())
        self._leaving.append(kept)
        return kept

    def send_out(self, kept: HostTensor, source: torch.Tensor) -> Any:
        """Start the copy of `source` to the host and return the event of its end."""
        self._out.wait_stream(self.streams.current_stream())
        wait(self._out, kept.buffer.free)
        with self.streams.stream(self._out):
            kept.buffer.viewed(source).copy_(source, non_blocking=True)
            return self._out.record_event()

    def bring_back(self, kept: HostTensor, target: torch.Tensor, out: Any) -> Any:
        """Start the copy to `target`, made on the current stream, and return the event of its end."""
        self._back.wait_stream(self.streams.current_stream())  # what had this memory before must be done with it
        wait(self._back, out)
        with self.streams.stream(self._back):
            target.copy_(kept.buffer.viewed(target), non_blocking=True)
            return self._back.record_event()

    def borrow(self, num_bytes: int) -> HostBuffer:
        """A host buffer of exactly this size, an old one where one is free."""
        if self._free[num_bytes]:
            return self._free[num_bytes].pop()
        held = f"kept activations, {self.host_bytes / 2**30:.2f} GiB are"
        buffer = HostBuffer(num_bytes, self.device, held, REMEDY)
        self.host_bytes += num_bytes
        return buffer

    def give_back(self, buffer: HostBuffer, last_use: Any) -> None:
        buffer.free = last_use
        self._free[buffer.num_bytes].append(buffer)

    def count(self, num_bytes: int) -> None:
        self.device_bytes += num_bytes
        self.device_peak_bytes = max(self.device_peak_bytes, self.device_bytes)


class DeviceTensor:
    """A tensor that waits where it is."""

    def __init__(self, store: ActivationStore, tensor: torch.Tensor) -> None:
        self._store = store
        self._tensor: torch.Tensor | None = tensor
        store.count(tensor.nbytes)

    def fetch(self) -> None:
        """Nothing to do; HostTensor has work here."""

    def take(self) -> torch.Tensor:
        """The tensor, which is no longer kept. Once only."""
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            raise RuntimeError("a kept tensor was asked for twice: backward ran twice through one forward pass")
        self._store.count(-tensor.nbytes)
        return tensor

    def __del__(self) -> None:
        if self._tensor is not None:
            self._store.count(-self._tensor.nbytes)


class HostTensor:
    """A tensor that waits in a host buffer. Dropped without being taken (a step that failed), it frees its buffer."""

    def __init__(self, store: ActivationStore, source: torch.Tensor) -> None:
        self._store = store
        self._shape, self._dtype = source.shape, source.dtype
        self._source: torch.Tensor | None = source
        self._target: torch.Tensor | None = None
        self._arrived: Any = None
        self._taken = True  # until there is something to take: a buffer that could not be had is not given back
        self.buffer = store.borrow(source.nbytes)
        self._out = store.send_out(self, source)
        self._taken = False

    def left(self) -> None:
        """Let go of the device memory, from the end of the copy on."""
        if self._source is not None:
            wait(self._store.streams.current_stream(), self._out)
            self._source = None

    def fetch(self) -> None:
        """Start the way back. What has not left yet need not come back."""
        if self._source is None and self._target is None and not self._taken:
            self._target = torch.empty(self._shape, dtype=self._dtype, device=self._store.device)
            self._arrived = self._store.bring_back(self, self._target, self._out)

    def take(self) -> torch.Tensor:
        """The tensor on the device, ready for the current stream; no longer kept. Once only."""
        if self._taken:
            raise RuntimeError("a kept tensor was asked for twice: backward ran twice through one forward pass")
        self.fetch()
        tensor = self._source if self._source is not None else self._target
        assert tensor is not None
        self._release()
        return tensor

    def _release(self) -> None:
        """The current stream goes on after both copies; then the buffer is free for the next tensor."""
        current = self._store.streams.current_stream()
        wait(current, self._out)
        wait(current, self._arrived)
        self._store.give_back(self.buffer, self._arrived)
        self._source = self._target = None
        self._taken = True

    def __del__(self) -> None:
        if not self._taken:
            self._release()


def wait(stream: Any, event: Any) -> None:
    """Let `stream` wait for `event`, where there is one: on CPU nothing is ever pending."""
    if event is not None:
        stream.wait_event(event)
