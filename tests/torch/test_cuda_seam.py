"""What `longtape.torch.cuda` asks of PyTorch, held against a stand-in for `torch.cuda` that copies at once.

This shows that the calls are the right ones and that errors are turned into ours.  It is no
substitute for a device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from random_scans import case_of
from simulated import quickly

from longtape.errors import BudgetError, DeviceError
from longtape.torch import scan
from longtape.torch.cuda import CudaDevice
from longtape.torch.devices import standing_in

DEVICE = torch.device("cpu")


class FakeStream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.lost = False
        self.waited: list[Any] = []

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: unspecified launch failure")


class FakeEvent:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        assert enable_timing
        assert blocking
        self.at: float | None = None
        self.stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.at, self.stream = time.perf_counter(), stream

    def query(self) -> bool:
        self.synchronize()
        return True

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.synchronize()

    def elapsed_time(self, end_event: FakeEvent) -> float:
        assert self.at is not None
        assert end_event.at is not None
        return 1e3 * (end_event.at - self.at)


class FakeCuda:
    """As much of `torch.cuda` as is used."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.on: list[FakeStream] = [FakeStream()]
        self.code = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, {"Stream": FakeStream, "Event": FakeEvent}[name])
        for name in (
            "current_stream",
            "stream",
            "device",
            "cudart",
            "get_device_name",
            "memory_allocated",
            "max_memory_allocated",
            "reset_peak_memory_stats",
            "is_current_stream_capturing",
            "mem_get_info",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.on[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.on.append(stream)
        yield
        self.on.pop()

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        yield

    def cudart(self) -> Any:
        def register(address: int, nbytes: int, flags: int) -> int:
            assert flags == 1
            if not self.code:
                self.registered[address] = nbytes
            return self.code

        return SimpleNamespace(
            cudaHostRegister=register, cudaHostUnregister=lambda address: self.registered.pop(address) and 0
        )

    def get_device_name(self, device: Any) -> str:
        return "A fake"

    def memory_allocated(self, device: Any) -> int:
        return 5

    def max_memory_allocated(self, device: Any) -> int:
        return 12

    def reset_peak_memory_stats(self, device: Any) -> None:
        pass

    def is_current_stream_capturing(self) -> bool:
        return False

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return 1 << 20, 1 << 30


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.mark.parametrize("capture", [False, True])
def test_a_scan_through_it(cuda: FakeCuda, capture: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)
    case, expected = case_of("lstm", 24)
    device, reports = CudaDevice(DEVICE), []
    with standing_in(device):
        found = case.outcome(
            scan, memory=1_000 if not capture else 8_000, host_memory=4_000, capture=capture, on_report=reports.append
        )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None)
    report = reports[-1].device
    assert report.name == "A fake (cpu)"
    assert report.peak_bytes == 7
    assert not cuda.registered
    assert len(cuda.on) == 1


def test_copies_are_asked_for_on_their_stream(cuda: FakeCuda) -> None:
    device = CudaDevice(DEVICE)
    seen = []

    class Target:
        def copy_(self, source: Any, non_blocking: bool = False) -> None:
            seen.append((cuda.on[-1], source, non_blocking))

    device.out.copy(Target(), "source")  # type: ignore[arg-type]
    assert seen == [(device.out.inner, "source", True)]
    assert device.compute.inner is cuda.on[0]
    event = device.compute.record()
    device.into.wait(event)
    assert device.into.inner.waited == [event.inner]


def test_memory_is_pinned_where_it_is_and_as_much(cuda: FakeCuda) -> None:
    device, memory = CudaDevice(DEVICE), np.zeros(100, np.uint8)
    device.pin(memory)
    assert cuda.registered == {memory.ctypes.data: 100}
    device.unpin(memory)
    assert cuda.registered == {}
    device.pin(memory[:0])
    device.unpin(memory[:0])
    cuda.code = 2
    with pytest.raises(BudgetError, match=r"100 B of host memory could not be pinned: CUDA refuses \(error 2\)"):
        device.pin(memory)


def test_errors_of_the_device_are_ours(cuda: FakeCuda) -> None:
    device = CudaDevice(DEVICE)
    event = device.out.record()
    device.out.inner.lost = True
    for call in (event.is_over, event.wait, device.out.synchronize):
        with pytest.raises(DeviceError, match="the device failed .* unspecified launch failure; .*begin anew"):
            call()


def test_memory_that_the_device_has_not(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(BudgetError, match="4 KiB of the memory of A fake .* 1 MiB of 1 GiB are free"):
        CudaDevice(DEVICE).reserve(4096)


def test_peaks_and_times(cuda: FakeCuda) -> None:
    device = CudaDevice(DEVICE)
    assert (device.begin_peak(), device.peak_nbytes(), device.is_capturing()) == (5, 12, False)
    began = device.compute.record()
    assert 0.0 <= device.seconds(began, device.compute.record()) < 1.0
