"""Which device a scan runs on, and in which memory its items are kept.

Owns the rules for the carry's devices.  Knows no sweep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from longtape.errors import UsageError
from longtape.protocols import Device
from longtape.torch.structure import Leaves

_standing_in: ContextVar[Device | None] = ContextVar("longtape device", default=None)


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Take the CPU's tensors for those of this device, such as one of `longtape.testing.device`."""
    token = _standing_in.set(device)
    try:
        yield
    finally:
        _standing_in.reset(token)


def device_of(init: Leaves, host_memory: int | str | None) -> Device | None:
    """The device that a carry lies on; None where it lies in the memory of the host.

    Raises:
        UsageError: It lies on several, or `host_memory` is given and there is none.
    """
    found = sorted({str(leaf.device) for leaf in init})
    if len(found) > 1 and any(leaf.device.type not in ("cpu", "meta") for leaf in init):
        raise UsageError(
            f"the tensors of the carry are on several devices ({', '.join(found)}), and a state is kept on one; move "
            "them to one device, counters included"
        )
    device = _standing_in.get()
    if device is not None and len(found) > 1:
        raise UsageError(f"the tensors of the carry are on several devices ({', '.join(found)}); move them to one")
    if device is None and init and init[0].device.type == "cuda":
        from longtape.torch.cuda import CudaDevice

        device = CudaDevice(init[0].device)
    if device is not None and device.is_capturing():
        raise UsageError(
            "a scan was called while a CUDA graph is being captured, which cannot hold its copies and decisions; "
            "call it outside of torch.cuda.graph"
        )
    if device is not None:
        return device
    if host_memory is not None:
        raise UsageError(_without_device(host_memory, found))
    return None


def _without_device(host_memory: int | str, found: list[str]) -> str:
    where = found[0] if found else "nowhere"
    asked = f"host_memory={host_memory!r} is pinned memory behind a CUDA device, but the carry is on {where}"
    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no CUDA device is found"
        return f"{asked}, and {why}; leave out host_memory, as memory is then the host's"
    return f"{asked}; move the carry to the device, or leave out host_memory"
