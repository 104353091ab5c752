"""Arrays that leave a device for a slot while steps go on.

Owns the copies under way and the moment at which their bytes are put into the slot; knows no
step and no plan.

JAX has the first half of the way as a memory kind: ``jax.device_put`` to ``pinned_host`` returns at
once, and XLA copies behind whatever it has to compute.  The second half, from there into the
slot, is a copy in the host's memory by whoever wants the bytes first: a worker that is to write them to
disk, or the job that loads them.  The slot's guard is what they wait for.

Any thread may wait.  Invariant: the bytes are put into the slot once, or never if they were given up.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from longtape.jax.arrays import Array
from longtape.protocols import Slot

MOST_LEAVING = 2
"""Items on their way at once.  Each takes its bytes of pinned memory beside the slot's."""


def pinned_beside(arrays: Sequence[Any]) -> SingleDeviceSharding | None:
    """Pinned memory of the host beside the device that arrays are on; None where that is the host's memory anyway."""
    devices = {device for array in arrays if isinstance(array, jax.Array) for device in array.devices()}
    if len(devices) != 1 or (device := devices.pop()).platform == "cpu":
        return None
    kinds = {memory.kind for memory in device.addressable_memories()}
    return SingleDeviceSharding(device, memory_kind="pinned_host") if "pinned_host" in kinds else None


class Leaving:
    """Implements `longtape.protocols.Event` for one slot."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Array]] = []
        self._lock = threading.Lock()

    def add(self, array: Any, target: Array, sharding: SingleDeviceSharding) -> None:
        """Send an array; its first rows, as many as the target has, are put there."""
        self._pairs.append((jax.device_put(array, sharding), target))

    def is_over(self) -> bool:
        return not self._pairs

    def wait(self) -> None:
        with self._lock:
            for array, target in self._pairs:
                arrived = np.asarray(array)  # waits for the copy
                np.copyto(target, arrived if arrived.shape == target.shape else arrived[: len(target)])
            self._pairs = []

    def give_up(self) -> None:
        """The slot is wanted for something else."""
        with self._lock:
            self._pairs = []


class WayOut:
    """The way from a device into slots.

    Args:
        sharding: Of the pinned memory on it.
    """

    def __init__(self, sharding: SingleDeviceSharding) -> None:
        self._sharding = sharding
        self._leaving = deque[Leaving]()

    def send(self, slot: Slot) -> Sender:
        """Begin to fill a slot anew."""
        if isinstance(slot.guard, Leaving):
            slot.guard.give_up()
        while self._leaving and (self._leaving[0].is_over() or len(self._leaving) >= MOST_LEAVING):
            self._leaving.popleft().wait()
        leaving = Leaving()
        self._leaving.append(leaving)
        slot.guard = leaving
        return Sender(leaving, self._sharding)


class Sender:
    """Puts arrays into one slot."""

    def __init__(self, leaving: Leaving, sharding: SingleDeviceSharding) -> None:
        self._leaving, self._sharding = leaving, sharding

    def __call__(self, array: Any, target: Array) -> None:
        self._leaving.add(array, target, self._sharding)
