"""The threads that move bytes; the only file of the package that starts any.

Owns the writer and reader threads of one run.  A worker takes a transfer, calls the
tier, notes when it began and ended and what went wrong, and hands it back; it
decides nothing and touches no bookkeeping.  Between transfers it sleeps in a system
call, so that it never competes with compute threads that spin.

Invariants: a transfer is run by exactly one worker or cancelled by the executor's
thread, whichever claims it first; a finished transfer is handed back exactly once;
threads end when whoever started them ends them or is garbage, which they never keep it from
being; the last worker to end closes the tier.
"""

from __future__ import annotations

import errno
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

from longtape.actions import Key
from longtape.errors import StorageError
from longtape.protocols import Slot, Tier

CLOSING_SECONDS = 0.02
"""The caller waits for a tier to be closed no longer than this.

A file system may take a tenth of a second a gigabyte to give back the room of a file; that needs
nobody's attention, and a run of some seconds would be a twentieth longer.  Should the process
end first, the system closes the file.
"""


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
    """Writer and reader threads over one tier.

    Args:
        tier: Which; closed by the last of the threads.
        clock: Seconds.
        writers: How many threads write.
        readers: How many read.

    Raises:
        StorageError: A thread cannot be started.
    """

    def __init__(self, tier: Tier, clock: Callable[[], float], *, writers: int = 1, readers: int = 1) -> None:
        self._clock = clock
        self._to_write: SimpleQueue[Any] = SimpleQueue()
        self._to_read: SimpleQueue[Any] = SimpleQueue()
        self._desk = _Desk(tier, clock)
        self._threads: list[threading.Thread] = []
        for name, count, source in (("write", writers, self._to_write), ("read", readers, self._to_read)):
            for number in range(count):
                thread = _thread(f"{name}-{number}", self._desk.work, source, weakref.ref(self, source.put))
                self._threads.append(thread)
                self._desk.staff += 1
                try:
                    _start(thread)
                except StorageError:
                    self._threads.remove(thread)
                    self._desk.staff -= 1
                    self.close(0.0)
                    raise

    def move_to(self, tier: Tier) -> None:
        """Serve another tier, which closes the one so far with itself; while nothing is under way."""
        self._desk.tier = tier

    def submit(self, transfer: Transfer) -> None:
        """Queue a transfer; returns at once."""
        began = self._clock()
        (self._to_write if transfer.is_write else self._to_read).put(transfer)
        transfer.handover_seconds = self._clock() - began

    def next_finished(self, timeout: float | None) -> Transfer | None:
        """A finished transfer; waits up to `timeout` seconds for one, or without bound if None."""
        try:
            return self._desk.finished.get(timeout=timeout) if timeout != 0 else self._desk.finished.get_nowait()
        except Empty:
            return None

    def let_go(self) -> None:
        """Have the threads end after what is queued; waits for nothing, and takes no lock."""
        for source in (self._to_write, self._to_read):
            for _ in self._threads:
                source.put(None)

    def close(self, timeout: float) -> bool:
        """Let the threads end; False if one is still stuck in a transfer after `timeout` seconds in all.

        The tier is closed by then or, where that takes longer than `CLOSING_SECONDS`, soon; but a lent one is
        waited for, since what comes next may begin in it.
        """
        self.let_go()
        until = time.monotonic() + timeout
        if self._threads and not self._desk.is_idle.wait(timeout):
            return False
        if not getattr(self._desk.tier, "is_lent", False):
            until = time.monotonic() + CLOSING_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return True


class _Desk:
    """What the workers of a run share; all that their threads refer to."""

    def __init__(self, tier: Tier, clock: Callable[[], float]) -> None:
        self.tier, self._clock = tier, clock
        self.finished: SimpleQueue[Transfer] = SimpleQueue()
        self.staff = 0
        """Threads that were started and have not ended."""
        self.is_idle = threading.Event()
        """No thread will touch the tier but to close it."""
        self._leaving = threading.Lock()

    def work(self, source: SimpleQueue[Any], owner: weakref.ref[Workers]) -> None:
        """Move what comes, until what comes is no transfer: None, or `owner`, which is garbage."""
        while isinstance(transfer := source.get(), Transfer):
            if transfer.claim():
                self._run(transfer)
                self.finished.put(transfer)
            del transfer
        with self._leaving:
            self.staff -= 1
            is_last = self.staff == 0
        if is_last:
            self.is_idle.set()
            self.tier.close()

    def _run(self, transfer: Transfer) -> None:
        transfer.began, computed = self._clock(), time.thread_time()
        try:
            if transfer.slot.guard is not None:  # a device may still be copying from these bytes, or to them
                transfer.slot.guard.wait()
                transfer.began = self._clock()
            if transfer.is_write:
                self.tier.write(transfer.key, transfer.slot.data)
            else:
                self.tier.read(transfer.key, transfer.slot.data)
        except Exception as error:  # handed back, and dealt with on the executor's thread
            transfer.error = error
        transfer.ended, transfer.cpu_seconds = self._clock(), time.thread_time() - computed


class Aside:
    """One thread that does what it is given, in order, while the caller goes on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Any] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, unless it runs.  Raises `StorageError` where that is refused."""
        if self._thread is None:
            thread = _thread(self._name, _do_all, self._tasks, weakref.ref(self, self._tasks.put))
            _start(thread)
            self._thread = thread

    def submit(self, task: Callable[[], object]) -> None:
        """Queue a task, which must not raise; the thread starts with the first.  Raises as `start` does."""
        self.start()
        self._tasks.put(task)

    def let_go(self, *last: Callable[[], object]) -> None:
        """Have the thread end after what is queued and the `last` tasks; waits for nothing, and takes no lock."""
        for task in last:
            self._tasks.put(task)
        self._tasks.put(None)

    def close(self, timeout: float) -> bool:
        """Let the thread end after what is queued; False if it is still busy after `timeout` seconds."""
        if self._thread is None:
            return True
        self._tasks.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()


def _do_all(tasks: SimpleQueue[Any], owner: weakref.ref[Aside]) -> None:
    while (task := tasks.get()) is not None and task is not owner:
        task()
        del task


def _thread(
    name: str, work: Callable[..., None], source: SimpleQueue[Any], owner: weakref.ref[Any]
) -> threading.Thread:
    # A daemon: a transfer stuck in the kernel must not keep the interpreter from ending.  `owner` puts itself into
    # the queue when it is garbage, and the thread keeps it until then.
    return threading.Thread(target=work, args=(source, owner), name=f"longtape-{name}", daemon=True)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError as error:
        raise StorageError(
            errno.EAGAIN, f"the system starts no more threads ({error}), and storage needs some; see to its limits"
        ) from error
