"""What makes a sweep through Devito operators resumable: its outputs, its adjoint, its fingerprint.

Found from the operators themselves.  What an operator writes row by row, each time a row
of its own, is made durable once; everything else as it stands at each point.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import devito
import numpy as np

from longtape.devito.job import OperatorsJob
from longtape.devito.kernels import Array, Kernel, Rows, bytes_of
from longtape.durable.fingerprints import of_bytes
from longtape.protocols import Bytes, Slot


class _Written:
    """What an operator writes, wavefields aside."""

    def __init__(self, kernel: Kernel, besides: Collection[str] = ()) -> None:
        self._kernel = kernel
        self._rows: dict[str, Rows] = {}
        self._whole: list[str] = []
        sums = kernel.added_to()
        for function in kernel.written():
            name = function.name
            if name in besides or name not in kernel.arrays:
                continue
            rows = kernel.rows(function)
            if rows is None or name in sums:
                self._whole.append(name)
            else:
                self._rows[name] = rows

    def rows(self, first: int, last: int) -> list[Bytes]:
        """Those of times `first` to `last`, of all functions."""
        return [bytes_of(view) for view in self._views(first, last)]

    def put_rows(self, first: int, last: int, arrays: Iterable[Bytes]) -> None:
        _fill(self._views(first, last), arrays)

    def _views(self, first: int, last: int) -> list[Array]:
        return [self._kernel.arrays[name][rows.at(first, last)] for name, rows in self._rows.items()]

    def whole(self) -> list[Bytes]:
        return [bytes_of(self._kernel.arrays[name]) for name in self._whole]

    def put_whole(self, arrays: Iterable[Bytes]) -> None:
        _fill([self._kernel.arrays[name] for name in self._whole], arrays)


def _fill(targets: Iterable[Array], arrays: Iterable[Bytes]) -> None:
    for target, kept in zip(targets, arrays, strict=True):
        np.copyto(target, kept.view(target.dtype).reshape(target.shape))


class Kept:
    """Implements `longtape.protocols.Durable` and `Standing`."""

    def __init__(self, forward: Kernel, reverse: Kernel, wavefields: Collection[str], job: OperatorsJob) -> None:
        self._reverse, self._wavefields, self._job = reverse, wavefields, job
        self._outputs, self._adjoint = _Written(forward, wavefields), _Written(reverse)
        self._standing: list[Bytes] | None = None
        """What an earlier process left, until the forward sweep begins."""
        self._first: list[Array] = []

    def state(self) -> list[tuple[str, Bytes]]:
        return self._job.state()

    def run_again(self, start: int, stop: int) -> None:
        """Into copies; the wavefields' buffers, whose other levels are looked at too, are put aside meanwhile."""
        self._first = self._first or [buffer.copy() for buffer in self._job.buffers()]
        before, self._job.written_before = self._job.written_before, self._job.first(stop)
        self._job.advance(start, stop)
        self._job.written_before = before

    def put_initial(self, slot: Slot) -> None:
        for buffer, kept in zip(self._job.buffers(), self._first, strict=False):  # none, where no step was run
            np.copyto(buffer, kept)
        self._first = []
        self._job.begin_again()

    def rows(self, start: int, stop: int) -> list[Bytes]:
        self._job.settle()
        return self._outputs.rows(*self._times(start, stop))

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        self._outputs.put_rows(*self._times(start, stop), arrays)

    def standing(self) -> list[Bytes]:
        self._job.settle()
        return [np.array([self._job.written_before], np.int64).view(np.uint8), *self._outputs.whole()]

    def put_standing(self, arrays: list[Bytes]) -> None:
        written_before, *self._standing = arrays
        self._job.written_before = int(written_before.view(np.int64)[0])

    def begin(self) -> None:
        """The forward sweep begins."""
        if self._standing is not None:
            self._outputs.put_whole(self._standing)
            self._standing = None

    def seed(self) -> str:
        kernel = self._reverse
        unseen = {f.name for f in kernel.written()} - kernel.read() - kernel.added_to()
        names = sorted(set(kernel.arrays) - unseen - set(self._wavefields))
        return of_bytes([_text(repr((names, numbers(kernel)))), *(bytes_of(kernel.arrays[name]) for name in names)])

    def adjoint(self) -> list[Bytes]:
        return self._adjoint.whole()

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        self._adjoint.put_whole(arrays)

    def bars(self, start: int, stop: int) -> list[Bytes]:
        return self._adjoint.rows(*self._times(start, stop))

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        self._adjoint.put_rows(*self._times(start, stop), arrays)

    def _times(self, start: int, stop: int) -> tuple[int, int]:
        return self._job.first(start), self._job.first(stop) - 1


def fingerprint(forward: Kernel, reverse: Kernel, stride: int, prints: Mapping[str, str]) -> dict[str, str]:
    """What must be the same for a run to be gone on with.

    Args:
        forward: The forward operator.
        reverse: The reverse operator; what its arrays hold may be set after the forward sweep, and is the seed.
        stride: Times.
        prints: Of the contents of what the forward operator reads.
    """
    found = {"front end": "devito.Sweep", "version of Devito": str(devito.__version__), "stride": str(stride)}
    for kernel, role in ((forward, "forward"), (reverse, "reverse")):
        shapes = {name: (str(array.dtype), array.shape) for name, array in sorted(kernel.arrays.items())}
        found[f"code of the {role} operator {kernel.name}"] = of_bytes([_text(kernel.code)])
        found[f"shapes for operator {kernel.name}"] = of_bytes([_text(repr(shapes))])
    numbers_of_both = {**numbers(forward), "": (reverse.first, reverse.last)}
    found["numbers such as dt"] = of_bytes([_text(repr(sorted(numbers_of_both.items())))])
    return found | {f"array {name}": of for name, of in prints.items()}


def numbers(kernel: Kernel) -> dict[str, str]:
    """The scalar arguments that a result depends on."""
    return {name: repr(value) for name, value in sorted(kernel.scalars.items()) if not name.startswith("nthreads")}


def _text(text: str) -> Bytes:
    return np.frombuffer(text.encode(), np.uint8)
