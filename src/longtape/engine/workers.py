"""The threads that move bytes; the only file of the package that starts any.

Owns the writer and reader threads of one run.  A worker takes a transfer, calls the
tier, notes when it began and ended and what went wrong, and hands it back; it
decides nothing and touches no bookkeeping.  Between transfers it sleeps in a system
call, so that it never competes with compute threads that spin.

Invariant: a transfer is run by exactly one worker or cancelled by the executor's
thread, whichever claims it first; a finished transfer is handed back exactly once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from longtape.actions import Key
from longtape.protocols import Slot, Tier


class Transfer:
    """One item on its way.  `error` and the times are valid once it has been handed back."""

    __slots__ = (
        "_claim",
        "began",
        "cpu_seconds",
        "ended",
        "error",
        "handover_seconds",
        "is_repeat",
        "is_write",
        "key",
        "nbytes",
        "slot",
    )

    def __init__(self, key: Key, slot: Slot, *, is_write: bool, is_repeat: bool = False) -> None:
        self.key, self.slot, self.is_write, self.is_repeat = key, slot, is_write, is_repeat
        self.nbytes = slot.data.nbytes
        self.began = self.ended = 0.0
        self.cpu_seconds = self.handover_seconds = 0.0
        """What the worker computed for it, and what it took to submit it."""
        self.error: Exception | None = None
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """True for the first caller only, who alone may run or cancel it."""
        return self._claim.acquire(blocking=False)

    @property
    def seconds(self) -> float:
        """How long the tier took."""
        return self.ended - self.began


class Workers:
    """Writer and reader threads over one tier."""

    def __init__(self, tier: Tier, clock: Callable[[], float], *, writers: int = 1, readers: int = 1) -> None:
        self._tier, self._clock = tier, clock
        self._to_write: SimpleQueue[Transfer | None] = SimpleQueue()
        self._to_read: SimpleQueue[Transfer | None] = SimpleQueue()
        self._finished: SimpleQueue[Transfer] = SimpleQueue()
        self._threads = [self._start("write", k, self._to_write) for k in range(writers)]
        self._threads += [self._start("read", k, self._to_read) for k in range(readers)]

    def _start(self, name: str, number: int, source: SimpleQueue[Transfer | None]) -> threading.Thread:
        # Daemons: a transfer stuck in the kernel must not keep the interpreter from ending.
        thread = threading.Thread(target=self._work, args=(source,), name=f"longtape-{name}-{number}", daemon=True)
        thread.start()
        return thread

    def _work(self, source: SimpleQueue[Transfer | None]) -> None:
        while (transfer := source.get()) is not None:
            if transfer.claim():
                self._run(transfer)
                self._finished.put(transfer)
            del transfer

    def _run(self, transfer: Transfer) -> None:
        transfer.began, computed = self._clock(), time.thread_time()
        try:
            if transfer.slot.guard is not None:  # a device may still be copying from these bytes, or to them
                transfer.slot.guard.wait()
                transfer.began = self._clock()
            if transfer.is_write:
                self._tier.write(transfer.key, transfer.slot.data)
            else:
                self._tier.read(transfer.key, transfer.slot.data)
        except Exception as error:  # handed back, and dealt with on the executor's thread
            transfer.error = error
        transfer.ended, transfer.cpu_seconds = self._clock(), time.thread_time() - computed

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer; returns at once."""
        began = self._clock()
        (self._to_write if transfer.is_write else self._to_read).put(transfer)
        transfer.handover_seconds = self._clock() - began

    def next_finished(self, timeout: float | None) -> Transfer | None:
        """A finished transfer; waits up to `timeout` seconds for one, or without bound if None."""
        try:
            return self._finished.get(timeout=timeout) if timeout != 0 else self._finished.get_nowait()
        except Empty:
            return None

    def close(self, timeout: float) -> bool:
        """Let the threads end; False if one is still stuck in a transfer after `timeout` seconds in all."""
        until = time.monotonic() + timeout
        for thread in self._threads:
            (self._to_write if "write" in thread.name else self._to_read).put(None)
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)


def close_aside(tier: Tier, patience: float = 0.02) -> None:
    """Close a tier without making the caller wait long.

    A file system may take a tenth of a second a gigabyte to give back the room of a
    file; that needs nobody's attention, and a run of some seconds would be a twentieth
    longer.  Should the process end first, the system closes the file.
    """
    thread = threading.Thread(target=tier.close, name="longtape-close", daemon=True)
    thread.start()
    thread.join(patience)


class Aside:
    """One thread that does what it is given, in order, while the caller goes on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task, which must not raise; the thread starts with the first."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"longtape-{self._name}", daemon=True)
            self._thread.start()
        self._tasks.put(task)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task

    def close(self, timeout: float) -> bool:
        """Let the thread end after what is queued; False if it is still busy after `timeout` seconds."""
        if self._thread is None:
            return True
        self._tasks.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()
