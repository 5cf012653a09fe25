"""Kept tensors come back bit for bit, host buffers are reused, and nothing is left behind. On CPU: the streams are
torch.cpu's, which do nothing, so what is tested is the bookkeeping, and the order of waits by a recorder."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultralong_ray.train import activation_store, host_memory
from ultralong_ray.train.activation_store import MAX_LEAVING, ActivationStore, HostTensor
from ultralong_ray.train.host_memory import page_locked
from ultralong_ray.types import UserError


@pytest.fixture
def store() -> ActivationStore:
    return ActivationStore(torch.device("cpu"))


def tensors(count: int, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(3, 5, 2, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("place", ["device", "host"])
def test_what_is_taken_is_what_was_kept(store: ActivationStore, place: Any) -> None:
    kept_from = tensors(7)
    kept = [store.keep(tensor, place) for tensor in kept_from]
    for one, expected in zip(reversed(kept), reversed(kept_from), strict=True):
        assert torch.equal(one.take(), expected)
    with pytest.raises(RuntimeError, match="twice"):
        kept[0].take()


def test_host_tensors_that_left_hold_no_device_memory(store: ActivationStore) -> None:
    kept = [store.keep(tensor, "host") for tensor in tensors(MAX_LEAVING + 2)]
    assert [isinstance(one, HostTensor) and one._source is None for one in kept] == [True] * 2 + [False] * MAX_LEAVING


def test_host_tensors_leave_also_when_the_layers_after_them_keep_on_the_device(store: ActivationStore) -> None:
    kept = [store.keep(tensor, "host") for tensor in tensors(MAX_LEAVING)]
    assert all(isinstance(one, HostTensor) and one._source is not None for one in kept)
    others = [store.keep(tensor, "device") for tensor in tensors(MAX_LEAVING)]
    assert all(isinstance(one, HostTensor) and one._source is None for one in kept)
    assert all(torch.equal(one.take(), tensor) for one, tensor in zip(kept, tensors(MAX_LEAVING), strict=True))
    del others


def test_what_is_overwritten_after_leaving_does_not_change_what_was_kept(store: ActivationStore) -> None:
    source, expected = tensors(1)[0], tensors(1)[0]
    kept = store.keep(source, "host")
    for other in tensors(MAX_LEAVING):
        store.keep(other, "host")
    source.zero_()
    assert torch.equal(kept.take(), expected)


def test_host_buffers_are_reused_by_the_next_step(store: ActivationStore) -> None:
    for step in range(3):
        kept = [store.keep(tensor, "host") for tensor in tensors(6)]
        for one in reversed(kept):
            one.fetch()
            one.take()
        assert store.host_bytes == 6 * 3 * 5 * 2 * 2, step
    assert store.device_bytes == 0


def test_two_forward_passes_before_a_backward_pass_do_not_mix(store: ActivationStore) -> None:
    first, second = tensors(4), tensors(5)[:4]
    kept_first = [store.keep(tensor, "host") for tensor in first]
    kept_second = [store.keep(tensor, "host") for tensor in second]
    for kept, expected in ((kept_first, first), (kept_second, second)):
        assert all(torch.equal(one.take(), tensor) for one, tensor in zip(kept, expected, strict=True))


def test_a_step_that_failed_frees_what_it_kept(store: ActivationStore) -> None:
    kept = [store.keep(tensor, place) for tensor in tensors(6) for place in ("host", "device")]
    kept[0].fetch()
    del kept
    again = [store.keep(tensor, "host") for tensor in tensors(6)]
    # the last to leave are held until others follow
    assert store.host_bytes <= (6 + MAX_LEAVING) * 60
    assert store.device_bytes == 0
    assert all(torch.equal(one.take(), tensor) for one, tensor in zip(again, tensors(6), strict=True))


def test_bytes_on_the_device_are_counted(store: ActivationStore) -> None:
    kept = [store.keep(tensor, "device") for tensor in tensors(3, torch.float32)]
    assert store.device_bytes == 3 * 30 * 4
    kept[1].take()
    assert store.device_bytes == 2 * 30 * 4
    assert (store.device_peak_bytes, store.host_bytes) == (3 * 30 * 4, 0)


class RecordedStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log, self.events = name, log, 0

    def wait_stream(self, other: RecordedStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"{self.name} {self.events}")
        return f"{self.name} {self.events}"


class Recorder:
    """Stands where a store has torch.cuda or torch.cpu."""

    def __init__(self, store: ActivationStore) -> None:
        self.log: list[str] = []
        self.main = RecordedStream("main", self.log)
        store.streams, store._out, store._back = self, RecordedStream("out", self.log), RecordedStream("back", self.log)

    def current_stream(self) -> RecordedStream:
        return self.main

    def stream(self, stream: RecordedStream) -> Any:
        return contextlib.nullcontext()


def test_every_copy_waits_for_what_it_reads_and_for_what_it_overwrites(store: ActivationStore) -> None:
    recorder = Recorder(store)
    first, *others = [store.keep(tensor, "host") for tensor in tensors(MAX_LEAVING + 1)]
    # the fourth copy starts only after the first one's memory was handed back, behind its event
    assert recorder.log == [
        *(line for copy in range(1, 4) for line in ("out waits for main", f"out {copy}")),
        *("main waits for out 1", "out waits for main", "out 4"),
    ]
    recorder.log.clear()
    first.fetch()
    assert recorder.log == ["back waits for main", "back waits for out 1", "back 1"]
    recorder.log.clear()
    first.take()
    assert recorder.log == ["main waits for out 1", "main waits for back 1"]
    recorder.log.clear()
    others.append(store.keep(tensors(1)[0], "host"))  # into the buffer that `first` had
    assert recorder.log == ["main waits for out 2", "out waits for main", "out waits for back 1", "out 5"]
    recorder.log.clear()
    assert torch.equal(others[-1].take(), tensors(1)[0])  # still there: nothing comes back
    assert recorder.log == ["main waits for out 5"]


def test_host_memory_that_is_not_there_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "GROWTH_SECONDS", 0.0)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**20)
    with pytest.raises(UserError, match=r"2\.00 GiB more .* 3\.00 GiB are.*keep_attention_rows"):
        page_locked(2 * 2**30, "kept activations, 3.00 GiB are", activation_store.REMEDY)


def test_host_memory_that_comes_with_its_use_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some virtual machines show little memory until it is used."""
    shown = iter([2**20, 2**21, 2**32])
    monkeypatch.setattr(host_memory, "available_bytes", lambda: next(shown))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *_: 0))
    memory, address = page_locked(2**22, "kept activations", activation_store.REMEDY)
    assert memory.numel() == 2**22 and memory.data_ptr() == address and not list(shown)
