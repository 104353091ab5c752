"""A CUDA device as `longtape.protocols.Device`: streams, events, memory, in PyTorch's terms.

Owns two streams for copies; the third is whatever stream the caller is on, which autograd
makes the same one in the backward pass.  Knows no job and no slot.

The memory that is reserved here is read and written by streams of our own.  It is one tensor
that lives as long as the run, and nothing that the framework's allocator may hand to others
is ever touched by a copy stream: so no `record_stream` is needed, and the allocator, which
reuses memory in the order of one stream, need not know of the others.

Events are made with ``blocking=True``: a thread that waits for one sleeps, where it would
otherwise spin on a core that the workers need.

Written against the documentation of PyTorch and of CUDA's runtime; it has not been run on a
device yet.  Source: CUDA Runtime API, *Stream Management*, *Event Management* and
*Memory Management* (cudaHostRegister).
"""

from __future__ import annotations

import torch

from longtape.errors import BudgetError, DeviceError
from longtape.protocols import Bytes, Event
from longtape.sizes import format_bytes
from longtape.tiers.aligned import address_of

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""


class CudaEvent:
    """Implements `longtape.protocols.Event`."""

    __slots__ = ("inner",)

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.inner = torch.cuda.Event(enable_timing=True, blocking=True)
        self.inner.record(stream)

    def is_over(self) -> bool:
        try:
            return bool(self.inner.query())
        except RuntimeError as error:
            raise _lost(error) from error

    def wait(self) -> None:
        try:
            self.inner.synchronize()
        except RuntimeError as error:
            raise _lost(error) from error


class CudaStream:
    """Implements `longtape.protocols.Stream`."""

    __slots__ = ("inner",)

    def __init__(self, inner: torch.cuda.Stream) -> None:
        self.inner = inner

    def record(self) -> CudaEvent:
        try:
            return CudaEvent(self.inner)
        except RuntimeError as error:
            raise _lost(error) from error

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        try:
            self.inner.wait_event(event.inner)
        except RuntimeError as error:
            raise _lost(error) from error

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        try:
            with torch.cuda.stream(self.inner):
                target.copy_(source, non_blocking=True)
        except RuntimeError as error:
            raise _lost(error) from error

    def touches(self, memory: torch.Tensor, *, writes: bool) -> None:
        pass

    def synchronize(self) -> None:
        try:
            self.inner.synchronize()
        except RuntimeError as error:
            raise _lost(error) from error


class CudaDevice:
    """Implements `longtape.protocols.Device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.name = f"{torch.cuda.get_device_name(device)} ({device})"
        self.out = CudaStream(torch.cuda.Stream(device))
        self.into = CudaStream(torch.cuda.Stream(device))

    @property
    def compute(self) -> CudaStream:
        """The stream the caller is on."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def reserve(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self._device)
            raise BudgetError(
                f"{format_bytes(nbytes)} of the memory of {self.name} were asked for, of which "
                f"{format_bytes(free)} of {format_bytes(total)} are free; give a smaller memory, or free some"
            ) from error

    def pin(self, memory: Bytes) -> None:
        if not memory.nbytes:
            return
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(address_of(memory), memory.nbytes, _PORTABLE))
        if code:
            raise BudgetError(
                f"{format_bytes(memory.nbytes)} of host memory could not be pinned: CUDA refuses (error {code}); "
                "give a smaller host_memory, or raise the limit of locked memory (ulimit -l)"
            )

    def unpin(self, memory: Bytes) -> None:
        if memory.nbytes:
            with torch.cuda.device(self._device):  # what that answers does not matter: a device may be lost
                torch.cuda.cudart().cudaHostUnregister(address_of(memory))

    def seconds(self, began: Event, ended: Event) -> float:
        assert isinstance(began, CudaEvent)
        assert isinstance(ended, CudaEvent)
        try:
            return float(began.inner.elapsed_time(ended.inner)) / 1e3
        except RuntimeError as error:
            raise _lost(error) from error

    def begin_peak(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return int(torch.cuda.memory_allocated(self._device))

    def peak_nbytes(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device))

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())


def _lost(error: RuntimeError) -> DeviceError:
    return DeviceError(
        f"the device failed while the sweeps were running: {error}; what it held is lost, so begin anew, "
        "in a new process if the device does not answer any more"
    )
